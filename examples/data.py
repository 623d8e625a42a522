"""Labelled images for the examples: what packages ship, or files of one's own.

Nothing is unpickled and nothing is fetched.
"""

from collections.abc import Callable, Sequence
import gzip
import pathlib
import re
from typing import NamedTuple
import zlib

import jax
from matplotlib import cbook, image
import numpy as np
import skimage.data
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split

# IDX, the format of MNIST, opens with a magic number, big-endian. The magic
# number of unsigned bytes is 2048 and the number of dimensions.
MAGIC = {'images': 2051, 'labels': 2049}
# CIFAR-10's binary version is records of a label and the planes of an image.
PLANES = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32
ACCEPTED = (
  'MNIST as IDX files (train-images, train-labels, t10k-images and '
  't10k-labels, each as it is or as .gz) or CIFAR-10 in the binary version '
  '(data_batch_1.bin to data_batch_5.bin, test_batch.bin)'
)


class Dataset(NamedTuple):
  """Images (n, height, width, channels), float32 in [0, 1]; int32 labels."""

  name: str
  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray


def digits() -> Dataset:
  """The 1,797 scans of handwritten digits, 8x8, that scikit-learn ships.

  A fifth of each class is the test set, the same at every call.
  """
  bunch = load_digits()
  images = np.float32(bunch.images[..., None] / 16)
  labels = bunch.target.astype(np.int32)
  train_images, test_images, train_labels, test_labels = train_test_split(
    images, labels, test_size=0.2, stratify=labels, random_state=0
  )
  return Dataset('digits', train_images, train_labels, test_images, test_labels)


def part(dataset: Dataset, small: bool) -> Dataset:
  """Of a small run, some of the images, evenly spread; of others, all."""
  if not small:
    return dataset

  def some(array: np.ndarray, most: int) -> np.ndarray:
    return array[:: -(-len(array) // most)]

  train, test = 512, 128
  return Dataset(
    dataset.name,
    some(dataset.train_images, train),
    some(dataset.train_labels, train),
    some(dataset.test_images, test),
    some(dataset.test_labels, test),
  )


def as_images(dataset: Dataset, shape: tuple[int, int, int]) -> Dataset:
  """The same in images of another shape: no more detail than before.

  Colors are averaged where there are to be fewer channels, and grey is repeated
  where there are to be more.
  """
  *size, channels = shape

  def convert(images: np.ndarray) -> np.ndarray:
    other = images.shape[-1] != channels
    if other:
      images = images.mean(-1, keepdims=True)
    if images.shape[1:3] != (*size,):
      images = enlarge(images, size)
    return np.repeat(images, channels, -1) if other else images

  if dataset.train_images.shape[1:] == shape:
    return dataset
  pixels = 'x'.join(map(str, shape))
  return map_images(f'{dataset.name}, {pixels}', dataset, convert)


def as_sequences(dataset: Dataset) -> Dataset:
  """Three neighbouring rows of each image as three channels, (n, 28, 3).

  Rows 3 to 5 of 8, or as far down in larger images; colors are averaged. The
  class is to be told from these three rows.
  """
  middle = 7 * dataset.train_images.shape[1] // 16

  def rows(images: np.ndarray) -> np.ndarray:
    three = images[:, middle - 1 : middle + 2].mean(-1)
    return enlarge(three.transpose(0, 2, 1), (28,))

  return map_images(f'three rows of {dataset.name}', dataset, rows)


def map_images(
  name: str, dataset: Dataset, function: Callable[[np.ndarray], np.ndarray]
) -> Dataset:
  """The same data set with other images."""
  return dataset._replace(
    name=name,
    train_images=function(dataset.train_images),
    test_images=function(dataset.test_images),
  )


def enlarge(images: np.ndarray, size: Sequence[int]) -> np.ndarray:
  """Images of another size, by cubic interpolation, clipped to [0, 1]."""
  shape = (len(images), *size, images.shape[-1])
  return np.clip(jax.image.resize(images, shape, 'cubic'), 0, 1)


# Photographs are cut into blocks of BLOCK pixels a side, BLOCKS of each, the
# first TEST_BLOCKS of them for the test. No pixel is in two blocks.
BLOCK, BLOCKS, TEST_BLOCKS = 64, 50, 10
PATCH, STRIDE = 32, 16


def photographs() -> Dataset:
  """Patches of ten photographs, 32x32x3; the class is which photograph.

  A fifth of the 64x64 blocks of each photograph is the test set; nine patches
  that overlap are cut from each block, and no pixel of a photograph is in both
  sets. 3,600 training and 900 test images, in equal shares. Patches of plain
  black are in several photographs, and can't be told apart.
  """
  images, labels = [], []
  for label, photograph in enumerate(load_photographs().values()):
    for corner in block_corners(photograph.shape, label):
      images.append(patches(photograph, corner))
      labels.append(label)
  of_blocks = to_float(np.stack(images)), np.int32(labels)
  is_test = np.arange(len(labels)) % BLOCKS < TEST_BLOCKS
  arrays = []
  for chosen in (~is_test, is_test):
    blocks, of = (a[chosen] for a in of_blocks)
    arrays.append(blocks.reshape(-1, *blocks.shape[2:]))
    arrays.append(np.repeat(of, blocks.shape[1]))
  return Dataset('patches of ten photographs', *arrays)


def load_photographs() -> dict[str, np.ndarray]:
  """Ten photographs that packages ship, (height, width, 3), bytes.

  Two of scikit-learn, one of matplotlib, seven of scikit-image.
  """
  china, flower = load_sample_images().images
  with cbook.get_sample_data('grace_hopper.jpg') as file:
    hopper = image.imread(file, format='jpg')
  return {
    'china': china,
    'flower': flower,
    'hopper': hopper,
    'astronaut': skimage.data.astronaut(),
    'coffee': skimage.data.coffee(),
    'galaxies': skimage.data.hubble_deep_field(),
    'tissue': skimage.data.immunohistochemistry(),
    'motorcycle': skimage.data.stereo_motorcycle()[0],
    'retina': skimage.data.retina(),
    'rocket': skimage.data.rocket(),
  }


def block_corners(shape: tuple[int, ...], seed: int) -> np.ndarray:
  """The upper left corners of BLOCKS blocks of an image, chosen at random."""
  grid = np.indices([size // BLOCK for size in shape[:2]])
  corners = BLOCK * grid.reshape(2, -1).T
  return np.random.default_rng(seed).permutation(corners)[:BLOCKS]


def patches(photograph: np.ndarray, corner: np.ndarray) -> np.ndarray:
  """The patches of a block, (patches, PATCH, PATCH, 3)."""
  row, column = corner
  starts = range(0, BLOCK - PATCH + 1, STRIDE)
  places = [(row + i, column + j) for i in starts for j in starts]
  return np.stack([photograph[i:, j:][:PATCH, :PATCH] for i, j in places])


def load_directory(path: str | pathlib.Path) -> Dataset:
  """MNIST or CIFAR-10 from the files of a directory, told by their content.

  Files with 'test' or 't10k' in their names are the test set, the others the
  training set. Files that are neither IDX nor CIFAR-10 are passed over.

  Raises:
    ValueError: naming the file, what was found and what is accepted.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    raise ValueError(
      f'{path} is not a directory. Give a directory that holds {ACCEPTED}.'
    )
  files = list_files(path)
  kinds = {file: kind_of(file) for file in files}
  found = set(filter(None, kinds.values()))
  if not found:
    raise ValueError(
      f'{path} holds {listing(files) or "no file"}. Accepted is {ACCEPTED}.'
    )
  files = [f for f in files if kinds[f]]
  if 'cifar' not in found:
    return load_idx(path, kinds)
  if found != {'cifar'}:
    raise ValueError(
      f'{path} holds both CIFAR-10 and IDX files: {listing(files)}. Accepted '
      'is one data set.'
    )
  return load_cifar(path, files)


def list_files(path: pathlib.Path) -> list[pathlib.Path]:
  """The files of a directory; not X.gz where there is X, nor hidden ones."""
  files = sorted(
    f for f in path.iterdir() if f.is_file() and not f.name.startswith('.')
  )
  names = {f.name for f in files}
  return [f for f in files if f.suffix != '.gz' or f.stem not in names]


def kind_of(file: pathlib.Path) -> str | None:
  """'images', 'labels', 'cifar', or None if it is none of them."""
  magic = int.from_bytes(read(file, 4), 'big')
  for kind, number in MAGIC.items():
    if magic == number:
      return kind
  if 'ubyte' in file.name:
    raise ValueError(
      f'{file} begins with the magic number {magic}. Accepted are '
      f'{MAGIC["images"]} (IDX images) and {MAGIC["labels"]} (IDX labels).'
    )
  claimed = re.match(r'(data|test)_batch.*\.bin$', file.name)
  if (problem := cifar_problem(file)) and claimed:
    raise ValueError(
      f'{file} {problem}. Accepted are whole CIFAR-10 records of {RECORD} '
      'bytes, each a label from 0 to 9 and 3 planes of 32x32 pixels.'
    )
  return None if problem else 'cifar'


def cifar_problem(file: pathlib.Path) -> str | None:
  """What keeps a file from being CIFAR-10 records, or None."""
  size = file.stat().st_size
  if size == 0 or size % RECORD:
    return f'has {size} bytes, which is not a number of whole records'
  largest = np.fromfile(file, np.uint8)[::RECORD].max()
  return f'has the label {largest}' if largest > 9 else None


def load_idx(
  path: pathlib.Path, kinds: dict[pathlib.Path, str | None]
) -> Dataset:
  """The training and test set of IDX files."""

  def find(test: bool, kind: str) -> pathlib.Path:
    files = [f for f in kinds if kinds[f] == kind and is_test(f) == test]
    return only(path, files, f'{"test" if test else "training"} {kind}')

  arrays = []
  for test in (False, True):
    images_file, labels_file = find(test, 'images'), find(test, 'labels')
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if len(images) != len(labels):
      raise ValueError(
        f'{labels_file} holds {len(labels)} labels, but {images_file} holds '
        f'{len(images)} images. Accepted is one label for each image.'
      )
    arrays += [to_float(images[..., None]), labels.astype(np.int32)]
  return check_shapes(Dataset(str(path), *arrays))


def load_cifar(path: pathlib.Path, files: Sequence[pathlib.Path]) -> Dataset:
  """The training and test set of CIFAR-10's binary files."""
  arrays = []
  for test in (False, True):
    chosen = [f for f in files if is_test(f) == test]
    if not chosen:
      raise ValueError(
        f'{path} holds no {"test" if test else "training"} batch, only '
        f'{listing(files)}. Accepted is {ACCEPTED}.'
      )
    records = np.concatenate([np.fromfile(f, np.uint8) for f in chosen])
    records = records.reshape(-1, RECORD)
    images = records[:, 1:].reshape(-1, *PLANES).transpose(0, 2, 3, 1)
    arrays += [to_float(images), records[:, 0].astype(np.int32)]
  return Dataset(str(path), *arrays)


def read_idx(file: pathlib.Path, ndim: int) -> np.ndarray:
  """The array of an IDX file of unsigned bytes."""
  content, start = read(file), 4 + 4 * ndim
  shape = np.frombuffer(content[4:start].ljust(4 * ndim, b'\0'), '>u4')
  shape = tuple(int(n) for n in shape)
  expected = start + int(np.prod(shape, dtype=object))
  if len(content) != expected or 0 in shape:
    raise ValueError(
      f'{file} has {len(content)} bytes. Accepted are at least one element '
      f'and, for the shape {shape} in its header, {expected} bytes.'
    )
  return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read(file: pathlib.Path, size: int = -1) -> bytes:
  """The first `size` bytes of a file, or all, decompressed if it is gzip."""
  with file.open('rb') as plain:
    zipped = plain.read(2) == b'\x1f\x8b'
  try:
    with gzip.open(file) if zipped else file.open('rb') as stream:
      return stream.read(size)
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(
      f'{file} is damaged gzip data: {error}. Accepted is a whole file.'
    ) from error


def is_test(file: pathlib.Path) -> bool:
  """Whether a file's name says that it belongs to the test set."""
  return bool(re.search('test|t10k', file.name.lower()))


def only(
  path: pathlib.Path, files: Sequence[pathlib.Path], what: str
) -> pathlib.Path:
  """The one file of its sort; raises if there is none, or several."""
  if len(files) != 1:
    raise ValueError(
      f'{path} holds {listing(files) or "no file"} as {what}. Accepted is one '
      f'such file of {ACCEPTED}.'
    )
  return files[0]


def listing(files: Sequence[pathlib.Path]) -> str:
  """The names of files, for a message."""
  return ', '.join(f.name for f in files)


def check_shapes(dataset: Dataset) -> Dataset:
  """Raises unless training and test images are of one size."""
  train, test = dataset.train_images.shape[1:], dataset.test_images.shape[1:]
  if train != test:
    raise ValueError(
      f'{dataset.name} has training images of shape {train} and test images '
      f'of shape {test}. Accepted is one shape.'
    )
  return dataset


def to_float(images: np.ndarray) -> np.ndarray:
  """Bytes as float32 in [0, 1]."""
  return images.astype(np.float32) / 255
