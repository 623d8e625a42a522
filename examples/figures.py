"""One look for the figures of the examples.

Colors are Okabe and Ito's, told apart also by people who see few; the marks and
the kinds of lines tell them apart in print. No global state of matplotlib is
touched.
"""

from collections.abc import Sequence
import pathlib
import sys
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

# Color, mark and line; the norms keep theirs in every figure.
LOOKS = {
  'batch': ('#D55E00', 'o', '-'),
  'renorm': ('#CC79A7', 's', '-'),
  'ghost': ('#E69F00', 'D', '--'),
  'group': ('#0072B2', '^', '-'),
  'layer': ('#56B4E9', 'v', '-'),
  'instance': ('#009E73', 'P', '-'),
  'none': ('#555555', 'x', '--'),
  'other': ('#000000', '*', ':'),
}

DPI = 150
WIDTH = 900  # pixels, in a notebook


def make(
  title: str, rows: int = 1, columns: int = 1
) -> tuple[Figure, np.ndarray]:
  """A figure and its axes, (rows, columns): a page wide, 3 inches a row."""
  figure = Figure(figsize=(9, 3 * rows + 0.6), layout='constrained')
  axes = figure.subplots(rows, columns, squeeze=False)
  for each in axes.flat:
    each.spines[['top', 'right']].set_visible(False)
    each.grid(alpha=0.3)
  figure.suptitle(title)
  return figure, axes


def look(name: str | int) -> dict[str, Any]:
  """Color, mark and line of a norm, or of a number from 0 to 7."""
  name = list(LOOKS)[name] if isinstance(name, int) else name
  color, marker, line = LOOKS[name]
  return {
    'color': color,
    'marker': marker,
    'linestyle': line,
    'markerfacecolor': 'none',
  }


def draw(
  axes: Axes,
  x: Sequence[float] | np.ndarray,
  runs: Sequence[Any] | np.ndarray,
  label: str,
  name: str | int | None = None,
) -> None:
  """A line of means over the runs, in a band of a standard deviation each way.

  `runs` has a row a run, of the length of x; one run has no band. `name`
  chooses the look, else the label does.
  """
  values = np.asarray(runs, dtype=float)
  style = look(label if name is None else name)
  mean = values.mean(0)
  axes.plot(x, mean, label=label, **style)
  if len(values) > 1:
    spread = values.std(0, ddof=1)
    axes.fill_between(
      x,
      mean - spread,
      mean + spread,
      color=style['color'],
      alpha=0.15,
      linewidth=0,
    )


def legend(figure: Figure, title: str | None = None) -> None:
  """One legend for all axes, to their right, each label once."""
  found: dict[str, Any] = {}
  for axes in figure.axes:
    handles, labels = axes.get_legend_handles_labels()
    found = dict(zip(labels, handles, strict=True)) | found
  figure.legend(
    found.values(),
    found.keys(),
    title=title,
    loc='outside right upper',
    frameon=False,
  )


def in_notebook() -> bool:
  """Whether a notebook runs this, where figures are shown below the cell."""
  shell = sys.modules.get('IPython')
  return shell is not None and hasattr(shell.get_ipython(), 'kernel')


def save(out: pathlib.Path, **drawn: Figure) -> None:
  """Writes figures by name into the folder, and shows them in a notebook.

  The folder is made if need be.
  """
  out.mkdir(parents=True, exist_ok=True)
  for name, figure in drawn.items():
    path = out / f'{name}.png'
    figure.savefig(path, dpi=DPI)
    print(f'Wrote {path}.')
    if in_notebook():
      from IPython import display  # noqa: PLC0415

      display.display(display.Image(filename=path, width=WIDTH))
