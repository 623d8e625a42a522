"""Showing an inspection: as text, as a table, as plots."""

import math
from typing import Any, TypeAlias

import numpy as np

from normkit.tools._advice import largest, mean, rms
from normkit.tools._extras import needed

Inspection: TypeAlias = Any  # of normkit.tools._inspection, which is above
Layer: TypeAlias = Any

_HEAD = (
  'layer',
  'elements',
  'mean off',
  'at most',
  'deviation off',
  'dead',
  'exploding',
  'small scale',
  'saturated',
  'gradient',
)


def text(found: Inspection) -> str:
  """The tables and the advice as plain text."""
  blocks = [_plain(cells) for cells in _tables(found)]
  return '\n'.join([*blocks, *_told(found)])


def table(found: Inspection) -> Any:
  """A `rich.table.Table` of layers, with the advice below."""
  with needed('tools'):
    from rich.table import Table  # noqa: PLC0415, optional
    from rich.text import Text  # noqa: PLC0415

  caption = Text('\n'.join(_told(found)), justify='left')
  table = Table(caption=caption)
  head, *rows = _tables(found)[0]
  for i, title in enumerate(head):
    table.add_column(title, justify='right' if i else 'left')
  for row in rows:
    table.add_row(*map(Text, row))
  return table


def figure(layers: tuple[Layer, ...]) -> Any:
  """Four plots of each layer's channels, as a `matplotlib.figure.Figure`."""
  with needed('tools'):
    from matplotlib.figure import Figure  # noqa: PLC0415, optional

  size = max(6.4, 1 + 0.5 * len(layers))
  figure = Figure(figsize=(size, 7), layout='constrained')
  panels = figure.subplots(2, 2, sharex=True).ravel()
  none = np.full(1, np.nan)
  drawn = {
    'running mean off (deviations)': lambda layer: layer.shift,
    'running / batch deviation (log2)': lambda layer: layer.stretch,
    '|scale|': lambda layer: none if layer.scale is None else layer.scale,
    'outputs above zero (share)': lambda layer: layer.positive,
  }
  for axes, (title, of) in zip(panels, drawn.items(), strict=True):
    for i, layer in enumerate(layers):
      values = np.ravel(of(layer))
      x = np.full(values.shape, i)
      axes.plot(x, np.abs(values) if '|' in title else values, 'k_', alpha=0.5)
    axes.set_ylabel(title)
    axes.grid(axis='y', alpha=0.3)
  names = [layer.name for layer in layers]
  for axes in panels[2:]:
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize='small')
    axes.set_xlabel('layer, a mark for each channel')
  return figure


def check_ending(path: Any) -> None:
  """Raises unless figures can be written to files of this ending."""
  with needed('tools'):
    from matplotlib.backend_bases import FigureCanvasBase  # noqa: PLC0415

  known = FigureCanvasBase.get_supported_filetypes()
  if path.suffix[1:].lower() not in known:
    raise ValueError(
      f'{str(path)!r} has no ending of a picture. Give one of '
      f'{", ".join(f".{name}" for name in sorted(known))}.'
    )


def _told(found: Inspection) -> list[str]:
  return [*map(str, found.advice)] or ['nothing seems wrong']


def _tables(found: Inspection) -> list[list[tuple[str, ...]]]:
  """Cells of the layers, and of the weights if there are any, with heads."""
  layers: list[tuple[str, ...]] = [_HEAD, *map(_cells, found.layers)]
  tables = [layers] if found.layers or not found.norms else []
  if found.norms:
    told: tuple[str, ...] = 'norm', 'kind', 'elements', 'epsilon', 'dead'
    others: list[tuple[str, ...]] = [
      (
        n.name or '.',
        n.kind,
        f'{n.elements}',
        f'{n.epsilon:g}',
        _percent(float(n.dead.mean())),
      )
      for n in found.norms
    ]
    tables.append([told, *others])
  if found.weights:
    head: tuple[str, ...]
    head = 'weight before a norm', 'norm', 'gradient', 'learning rate / norm²'
    rows = [
      (w.name, f'{w.norm:.3g}', _percent(w.gradient), _number(w.rate))
      for w in found.weights
    ]
    tables.append([head, *rows])
  return tables


def _cells(layer: Layer) -> tuple[str, ...]:
  seen = layer.seen
  return (
    layer.name,
    f'{layer.elements:.0f}' if seen else '-',
    _number(rms(layer.shift)),
    _number(largest(layer.shift)),
    _number(rms(layer.stretch)),
    _percent(float(layer.dead.mean()) if seen else math.nan),
    _percent(float(layer.exploding.mean()) if seen else math.nan),
    _percent(float(layer.small.mean())),
    _percent(mean(layer.saturated)),
    _percent(layer.gradient),
  )


def _number(value: float) -> str:
  return '-' if math.isnan(value) else f'{value:.2g}'


def _percent(value: float) -> str:
  return '-' if math.isnan(value) else f'{value:.1%}'


def _plain(rows: list[tuple[str, ...]]) -> str:
  """Rows of cells as lines, the first column to the left."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join(
    '  '.join(
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in rows
  )
