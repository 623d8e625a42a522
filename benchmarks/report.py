"""Tables: on the terminal, and in the documents that quote them."""

import argparse
from collections.abc import Iterable, Sequence
import pathlib
import re

from rich.console import Console
from rich.table import Table

Rows = Sequence[Sequence[str]]


def show(title: str, header: Sequence[str], rows: Rows) -> None:
  """Prints a table; the first column is text, the others are numbers."""
  table = Table(title=title)
  for index, name in enumerate(header):
    table.add_column(name, justify='right' if index else 'left')
  for row in rows:
    table.add_row(*row)
  Console().print(table)


def markdown(header: Sequence[str], rows: Rows) -> str:
  """The same table in Markdown."""
  lines = [header, ['---'] + ['---:'] * (len(header) - 1), *rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def publish(
  name: str,
  title: str,
  header: Sequence[str],
  rows: Rows,
  documents: Iterable[pathlib.Path],
) -> None:
  """Prints a table, and puts it between the marks `name` of the documents."""
  show(title, header, rows)
  for path in documents:
    quote(path, name, markdown(header, rows))


def add_update(parser: argparse.ArgumentParser) -> None:
  """The option that names the documents."""
  parser.add_argument(
    '--update',
    type=pathlib.Path,
    nargs='*',
    default=[],
    help='documents whose tables to replace',
  )


def bars(
  path: pathlib.Path,
  labels: Sequence[str],
  series: dict[str, Sequence[float]],
  title: str,
  line: float | None = None,
) -> None:
  """Draws a group of bars for each label, one bar a series."""
  import matplotlib as mpl

  mpl.use('Agg')
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(figsize=(9, 0.4 * len(labels) + 1.2))
  height = 0.8 / len(series)
  for index, (name, values) in enumerate(series.items()):
    shift = height * (index - len(series) / 2 + 0.5)
    places = [place + shift for place in range(len(labels))]
    axes.barh(places, values, height, label=name)
  axes.set_yticks(range(len(labels)), labels, fontsize=8)
  axes.invert_yaxis()
  if line is not None:
    axes.axvline(line, color='black', linewidth=0.8)
  axes.set_xlabel(title)
  axes.legend(fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=110)
  plt.close(figure)


def quote(path: pathlib.Path, name: str, text: str) -> None:
  """Puts a text between the marks `<!-- NAME -->` and `<!-- /NAME -->`."""
  document, found = re.subn(
    rf'(<!-- {name} -->\n).*?(<!-- /{name} -->)',
    lambda match: f'{match[1]}{text}\n{match[2]}',
    path.read_text(),
    flags=re.DOTALL,
  )
  if not found:
    raise ValueError(f'{path} has no marks <!-- {name} --> to put a text in.')
  path.write_text(document)
