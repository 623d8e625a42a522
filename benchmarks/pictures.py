"""The pictures and the table of the README and the docs, from the examples."""

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import Any

from PIL import Image

from benchmarks import report

ROOT = pathlib.Path(__file__).parents[1]
FIGURES = ROOT / 'docs' / 'figures'
PICTURES = {'train_cnn.py': 'curves.png', 'pooling.py': 'pooling.png'}
GALLERY = (
  'articles',
  'deploy',
  'detection',
  'faster',
  'gradients',
  'interpret',
  'placement',
  'regularization',
  'sequences',
  'style',
  'train_eval',
)


def run_gallery(name: str) -> None:
  """Runs an example, and keeps its pictures, in few colors."""
  with tempfile.TemporaryDirectory() as out:
    script = ROOT / 'examples' / f'{name}.py'
    subprocess.run([sys.executable, script, '--out', out], check=True)
    for path in sorted(pathlib.Path(out).glob('*.png')):
      picture = Image.open(path).convert('RGB').quantize(128)
      picture.save(FIGURES / 'gallery' / path.name, optimize=True)


def run(args: argparse.Namespace) -> int:
  for name in args.gallery:
    run_gallery(name)
  if args.gallery:
    return 0
  for script, picture in PICTURES.items():
    with tempfile.TemporaryDirectory() as out:
      example = ROOT / 'examples' / script
      subprocess.run([sys.executable, example, '--out', out], check=True)
      shutil.copy(pathlib.Path(out, picture), FIGURES)
      if script == 'train_cnn.py':
        table = pathlib.Path(out, 'accuracy.md').read_text().strip()
        report.quote(ROOT / 'README.md', 'cnn', table)
  return 0


def add_command(commands: Any) -> None:
  parser = commands.add_parser('pictures', help=__doc__.splitlines()[0])
  parser.add_argument(
    '--gallery',
    nargs='*',
    choices=GALLERY,
    default=[],
    help='those of these examples instead, some minutes each',
  )
  parser.set_defaults(run=run)
