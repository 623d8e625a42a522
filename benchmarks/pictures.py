"""The pictures and the table of the README and the docs, from the examples."""

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks import report

ROOT = pathlib.Path(__file__).parents[1]
PICTURES = {'train_cnn.py': 'curves.png', 'pooling.py': 'pooling.png'}


def run(args: argparse.Namespace) -> int:
  del args
  for script, picture in PICTURES.items():
    with tempfile.TemporaryDirectory() as out:
      example = ROOT / 'examples' / script
      subprocess.run([sys.executable, example, '--out', out], check=True)
      shutil.copy(pathlib.Path(out, picture), ROOT / 'docs' / 'figures')
      if script == 'train_cnn.py':
        table = pathlib.Path(out, 'accuracy.md').read_text().strip()
        report.quote(ROOT / 'README.md', 'cnn', table)
  return 0


def add_command(commands: Any) -> None:
  parser = commands.add_parser('pictures', help=__doc__.splitlines()[0])
  parser.set_defaults(run=run)
