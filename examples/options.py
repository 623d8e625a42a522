"""The options that the examples share."""

import argparse
from collections.abc import Sequence
import pathlib

import numpy as np

import data
import figures

# Fewer, and a test or a batch of some example would lack a class.
LEAST_TRAIN, LEAST_TEST = 1024, 100


def make_parser(
  description: str, instead_of: str = ''
) -> argparse.ArgumentParser:
  """`--out` and `--small`, and `--data` where it can take the place of data."""
  parser = argparse.ArgumentParser(description=description)
  parser.add_argument(
    '--out', type=pathlib.Path, default=pathlib.Path('out'), help='folder'
  )
  parser.add_argument(
    '--small', action='store_true', help='a part, to see it run, no more'
  )
  if instead_of:
    parser.add_argument(
      '--data',
      type=ten_classes_in,
      metavar='DIR',
      help=f'folder with MNIST (IDX files) or CIFAR-10 (binary version), to '
      f'take instead of {instead_of}',
    )
  return parser


def parse(
  argv: Sequence[str] | None, description: str, instead_of: str = ''
) -> argparse.Namespace:
  """The options of an example that has no others."""
  return finish(make_parser(description, instead_of), argv)


def finish(
  parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
  """The arguments parsed; of a small run says that it is one."""
  args = parser.parse_args(arguments(argv))
  if args.small:
    print('A small run, to see it run: its numbers say nothing of the claims.')
  return args


def arguments(argv: Sequence[str] | None) -> Sequence[str] | None:
  """The arguments; none in a notebook, whose own are not meant for us."""
  return [] if argv is None and figures.in_notebook() else argv


def dataset_in(text: str) -> data.Dataset:
  """An argument's type: a folder with images."""
  try:
    dataset = data.load_directory(text)
  except ValueError as error:
    raise argparse.ArgumentTypeError(str(error)) from error
  n, *shape = dataset.train_images.shape
  if n < 2 or min(shape[:2]) < 4:
    raise argparse.ArgumentTypeError(
      f'{text} has {n} training images of shape {tuple(shape)}, accepted are '
      'at least 2 of at least 4x4 pixels'
    )
  return dataset


def ten_classes_in(text: str) -> data.Dataset:
  """An argument's type: a folder with images of ten classes."""
  dataset = dataset_in(text)
  for name, labels, least in (
    ('training', dataset.train_labels, LEAST_TRAIN),
    ('test', dataset.test_labels, LEAST_TEST),
  ):
    classes = np.unique(labels).tolist()
    if len(labels) < least or classes != list(range(10)):
      raise argparse.ArgumentTypeError(
        f'{text} has {len(labels)} {name} images of classes {classes}, '
        f'accepted are at least {least}, of all the classes from 0 to 9'
      )
  return dataset
