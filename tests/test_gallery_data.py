"""Images of one's own that the examples refuse."""

import re

import cells
from images import idx
import numpy as np
import pytest

RNG = np.random.default_rng(0)


def pictures(n, shape):
  """Noise, and labels of all ten classes."""
  return RNG.integers(0, 256, (n, *shape), np.uint8), np.arange(n) % 10


def write_mnist(folder, train=1024, test=100, classes=10):
  """Files like MNIST's, of 12x12 pixels."""
  for name, n in (('train', train), ('t10k', test)):
    images, labels = pictures(n, (12, 12))
    (folder / f'{name}-images').write_bytes(idx(images))
    (folder / f'{name}-labels').write_bytes(idx(labels % classes))
  return folder


def test_color_is_no_ink(example, photographs_folder, capsys):
  with pytest.raises(SystemExit):
    cells.run(example('detection'), f'--data={photographs_folder}')
  assert 'accepted are grey images' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    ({'train': 1023}, 'has 1023 training images .* at least 1024'),
    ({'test': 99}, 'has 99 test images .* at least 100'),
    ({'classes': 9}, r'classes \[0, .* 8\], .* all the classes from 0 to 9'),
  ],
)
def test_few_images_or_classes_are_refused(
  example, tmp_path, capsys, files, message
):
  folder = write_mnist(tmp_path, **files)
  with pytest.raises(SystemExit):
    example('options').parse([f'--data={folder}'], 'An example.', 'the digits')
  assert re.search(message, capsys.readouterr().err)
