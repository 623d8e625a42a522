"""The examples in a small setting: their files, messages and numbers."""

import contextlib
import csv
import gzip
import io
import os
import pathlib
import re
import subprocess
import sys

import cells
from images import idx
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / 'examples'
STEPS = 20
LAYERS = (16, True), (32, True)
SHORT = f'--steps={STEPS}', '--seeds=1', '--lr=0.03'


@pytest.fixture(scope='module')
def data(example):
  return example('data')


@pytest.fixture(scope='module')
def train_cnn(example):
  """The script, whose network has here two convolutions."""
  module = example('train_cnn')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(module, 'LAYERS', LAYERS)
    yield module


# Files in the formats of MNIST and CIFAR-10.

RNG = np.random.default_rng(0)
MNIST = {
  'train-images-idx3-ubyte': RNG.integers(0, 256, (40, 9, 8), np.uint8),
  'train-labels-idx1-ubyte': RNG.integers(0, 10, 40, np.uint8),
  't10k-images-idx3-ubyte': RNG.integers(0, 256, (12, 9, 8), np.uint8),
  't10k-labels-idx1-ubyte': RNG.integers(0, 10, 12, np.uint8),
}


TRAIN_IMAGES, TRAIN_LABELS, *_ = (idx(a) for a in MNIST.values())


def write(path, files):
  """Writes `{name: bytes}`; those whose name ends in .gz compressed."""
  for name, content in files.items():
    zipped = name.endswith('.gz')
    (path / name).write_bytes(gzip.compress(content) if zipped else content)
  return path


def mnist(**changes):
  """The files of a small MNIST, some changed; None leaves one out."""
  files = {name: idx(array) for name, array in MNIST.items()}
  for key, content in changes.items():
    (name,) = (n for n in files if n.startswith(key.replace('_', '-')))
    files[name] = content
  return {name: c for name, c in files.items() if c is not None}


def cifar(n, seed=0):
  """Labels, images and the bytes of n records of CIFAR-10."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 10, n, np.uint8)
  images = rng.integers(0, 256, (n, 32, 32, 3), np.uint8)
  planes = images.transpose(0, 3, 1, 2).reshape(n, -1)
  return labels, images, np.hstack([labels[:, None], planes]).tobytes()


def assert_dataset(dataset, train, test):
  train_images, train_labels, test_images, test_labels = dataset[1:]
  for images, labels, wanted in (
    (train_images, train_labels, train),
    (test_images, test_labels, test),
  ):
    assert images.dtype == np.float32
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(images, np.float32(wanted[0]) / 255)
    np.testing.assert_array_equal(labels, wanted[1])


def test_digits_are_scaled_and_split_the_same_each_time(data):
  first, second = data.digits(), data.digits()
  assert first.train_images.shape == (1437, 8, 8, 1)
  assert first.test_images.shape == (360, 8, 8, 1)
  assert first.train_images.dtype == np.float32
  assert first.train_labels.dtype == np.int32
  assert (first.train_images.min(), first.train_images.max()) == (0, 1)
  assert np.bincount(first.test_labels).min() >= 34
  for a, b in zip(first[1:], second[1:], strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('suffix', ['', '.gz'])
def test_mnist_loads(data, tmp_path, suffix):
  write(tmp_path, {name + suffix: c for name, c in mnist().items()})
  write(tmp_path, {'readme.txt': b'not images', '.hidden-ubyte': b'', 'e': b''})
  train_images, train_labels, test_images, test_labels = MNIST.values()
  assert_dataset(
    data.load_directory(tmp_path),
    (train_images[..., None], train_labels),
    (test_images[..., None], test_labels),
  )


def test_mnist_is_known_by_content_and_the_plain_file_wins(data, tmp_path):
  files = zip('ab', list(mnist().values())[:2], strict=True)
  tests = zip(('test 1', 'TEST 2'), list(mnist().values())[2:], strict=True)
  write(tmp_path, {**dict(files), **dict(tests), 'a.gz': TRAIN_IMAGES})
  dataset = data.load_directory(tmp_path)
  assert dataset.train_images.shape == (40, 9, 8, 1)
  assert dataset.test_labels.shape == (12,)
  assert dataset.name == str(tmp_path)


@pytest.mark.parametrize(
  'names',
  [
    ('data_batch_1.bin', 'data_batch_2.bin', 'test_batch.bin'),
    ('1', '2', 'test'),
  ],
)
def test_cifar_loads(data, tmp_path, names):
  sets = [cifar(n, seed) for seed, n in enumerate((4, 3, 2))]
  contents = (content for *_, content in sets)
  write(tmp_path, dict(zip(names, contents, strict=True)))
  write(tmp_path, {'batches.meta.txt': b'airplane\nautomobile\n'})
  (labels_1, images_1, _), (labels_2, images_2, _), (labels, images, _) = sets
  assert_dataset(
    data.load_directory(tmp_path),
    (np.concatenate([images_1, images_2]), np.r_[labels_1, labels_2]),
    (images, labels),
  )


BROKEN = {
  'nothing known': (
    {'readme.txt': b'hello'},
    r'holds readme\.txt\. Accepted is MNIST as IDX.* or CIFAR-10',
  ),
  'empty': ({}, r'holds no file\. Accepted is MNIST as IDX'),
  'wrong magic': (
    mnist(train_images=b'\0\0\x0d\3' + TRAIN_IMAGES[4:]),
    r'train-images-idx3-ubyte begins with the magic number 3331\. Accepted '
    r'are 2051 .* and 2049',
  ),
  'truncated images': (
    mnist(train_images=TRAIN_IMAGES[:-1]),
    r'train-images-idx3-ubyte has 2895 bytes\. Accepted .* '
    r'shape \(40, 9, 8\) in its header, 2896 bytes',
  ),
  'truncated labels': (
    mnist(train_labels=TRAIN_LABELS[:-3]),
    r'train-labels-idx1-ubyte has 45 bytes\. .* 48 bytes',
  ),
  'truncated header': (
    mnist(train_images=TRAIN_IMAGES[:9]),
    r'train-images-idx3-ubyte has 9 bytes\. Accepted',
  ),
  'too long': (
    mnist(train_images=TRAIN_IMAGES + b'\0'),
    r'has 2897 bytes\. .* 2896 bytes',
  ),
  'no images in it': (
    mnist(train_images=idx(np.zeros((0, 9, 8), np.uint8))),
    r'has 16 bytes\. Accepted are at least one element',
  ),
  'count mismatch': (
    mnist(train_labels=idx(MNIST['train-labels-idx1-ubyte'][:-2])),
    r'train-labels-idx1-ubyte holds 38 labels, but .*'
    r'train-images-idx3-ubyte holds 40 images\. Accepted is one label for each',
  ),
  'labels missing': (
    mnist(t10k_labels=None),
    r'holds no file as test labels\. Accepted is one such file of MNIST',
  ),
  'two of one kind': (
    {**mnist(), 'more': TRAIN_IMAGES},
    r'holds more, train-images-idx3-ubyte as training images\. Accepted is one',
  ),
  'two shapes': (
    mnist(t10k_images=idx(np.zeros((12, 8, 8), np.uint8))),
    r'shape \(9, 8, 1\) and test images of shape \(8, 8, 1\)\. Accepted is one',
  ),
  'two data sets': (
    {**mnist(), 'test_batch.bin': cifar(1)[-1]},
    r'both CIFAR-10 and IDX files: t10k.*, test_batch\.bin, train.* Accepted',
  ),
  'truncated CIFAR-10': (
    {'data_batch_1.bin': cifar(2)[-1][:-7], 'test_batch.bin': cifar(1)[-1]},
    r'data_batch_1\.bin has 6139 bytes, which is not a number of whole records'
    r'\. Accepted are whole CIFAR-10 records of 3073 bytes',
  ),
  'empty CIFAR-10': (
    {'data_batch_1.bin': b''},
    r'data_batch_1\.bin has 0 bytes',
  ),
  'CIFAR-10 label': (
    {'data_batch_1.bin': b'\x0a' + cifar(1)[-1][1:]},
    r'data_batch_1\.bin has the label 10\. Accepted .* a label from 0 to 9',
  ),
  'CIFAR-10 without a test set': (
    {'data_batch_1.bin': cifar(1)[-1]},
    r'holds no test batch, only data_batch_1\.bin\. Accepted',
  ),
}


@pytest.mark.parametrize(
  ('files', 'message'), BROKEN.values(), ids=BROKEN.keys()
)
def test_a_broken_directory_says_what_is_wrong(data, tmp_path, files, message):
  with pytest.raises(ValueError, match=message):
    data.load_directory(write(tmp_path, files))


@pytest.mark.parametrize('end', [3, -9, -20])
def test_damaged_gzip_is_named(data, tmp_path, end):
  write(tmp_path, mnist(train_images=gzip.compress(TRAIN_IMAGES)[:end]))
  with pytest.raises(ValueError, match=r'train-images.* is damaged gzip data'):
    data.load_directory(tmp_path)


def test_a_directory_that_is_not_there(data, tmp_path):
  with pytest.raises(ValueError, match=r'nowhere is not a directory\. Give'):
    data.load_directory(tmp_path / 'nowhere')


# The scripts.


def run_alone(*command):
  """Runs Python in a process of its own; returns what it printed."""
  # Compiled as quickly as here, and shared.
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  env |= {
    'JAX_PLATFORMS': 'cpu',
    'COLUMNS': '200',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir or '',
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }
  done = subprocess.run(
    [sys.executable, *command],
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def run(train_cnn, out, *flags):
  """Runs train_cnn.py for a few steps; returns what it printed."""
  printed = io.StringIO()
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('COLUMNS', '200')
    with contextlib.redirect_stdout(printed):
      cells.run(train_cnn, f'--out={out}', *SHORT, *flags)
  return printed.getvalue()


# As above, where there is one device until the script asks for more.
ALONE = f"""
import sys
sys.path[:0] = {str(EXAMPLES)!r}, {str(EXAMPLES.parent / 'tests')!r}
import cells, train_cnn
train_cnn.LAYERS = {LAYERS}
cells.run(train_cnn, *sys.argv[1:])
"""


def losses(out):
  """The losses of each norm, in order of step."""
  found = {}
  with (out / 'losses.csv').open(newline='') as file:
    for row in csv.DictReader(file):
      found.setdefault(row['norm'], []).append(float(row['loss']))
  return found


def accuracies(text):
  """The test accuracy of each norm in a table, printed or in Markdown."""
  rows = re.findall(r'^[│|] (\w+) +[│|] +([\d.]+) [│|]', text, re.MULTILINE)
  return {name: float(number) for name, number in rows}


@pytest.fixture(scope='module')
def norms(request):
  """The norms that are trained: one, and with `--all` the script's choice."""
  every = ['batch', 'layer', 'group', 'instance', 'none']
  return every if request.config.option.all else every[:1]


@pytest.fixture(scope='module')
def everything(train_cnn, norms, tmp_path_factory):
  """What the script prints and writes."""
  out = tmp_path_factory.mktemp('everything')
  flags = ['--norm=batch'] if len(norms) == 1 else []
  return run(train_cnn, out, *flags), out


def test_norms_are_compared(everything, norms):
  printed, out = everything
  found = accuracies(printed)
  assert list(found) == norms
  assert all(0 <= percent <= 100 for percent in found.values())
  assert found['batch'] > 40
  assert found == accuracies((out / 'accuracy.md').read_text())
  assert (out / 'curves.png').read_bytes().startswith(b'\x89PNG')


def test_losses_are_written_for_every_step(everything, norms):
  _, out = everything
  assert list(losses(out)) == norms
  for curve in losses(out).values():
    assert len(curve) == STEPS
    assert np.isfinite(curve).all()
    assert curve[-1] < curve[0]


def test_checkpoint_predicts_as_the_table_says(train_cnn, data, everything):
  printed, out = everything
  splits = train_cnn.split(data.digits(), seed=0)
  model = train_cnn.make_model('batch', 10, jax.devices()[:1])
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), splits.test.images, train=False)
  )
  with ocp.StandardCheckpointer() as checkpointer:
    variables = checkpointer.restore(out / 'checkpoint', shapes)
  assert (variables['batch_stats']['Norm_0']['count'] == STEPS).all()
  _, accuracy = train_cnn.evaluate(model, variables, splits.test)
  assert f'{100 * accuracy:.2f}' == f'{accuracies(printed)["batch"]:.2f}'
  (epoch,) = re.findall(rf' 1 +{STEPS} +[\d.]+ +([\d.]+) +([\d.]+)', printed)
  scores = train_cnn.evaluate(model, variables, splits.validation)
  np.testing.assert_allclose(np.float64(epoch), scores, atol=1e-4)


@pytest.mark.second_tier
def test_two_devices_give_the_losses_of_one(everything, tmp_path):
  """Two that are made before JAX starts, in a process of their own."""
  _, out = everything
  flags = '--norm=batch', '--devices=2', f'--out={tmp_path}'
  run_alone('-c', ALONE, *SHORT, *flags)
  np.testing.assert_allclose(
    losses(tmp_path)['batch'], losses(out)['batch'], rtol=1e-5
  )


@pytest.mark.second_tier
def test_mnist_trains(train_cnn, tmp_path):
  folder = tmp_path / 'mnist'
  folder.mkdir()
  write(folder, {f'{name}.gz': content for name, content in mnist().items()})
  flags = f'--data={folder}', '--norm=group', '--batch-size=9'
  printed = run(train_cnn, tmp_path / 'out', *flags)
  assert '36 train, 4 validation, 12 test images' in printed
  assert list(accuracies(printed)) == ['group']
  assert len(losses(tmp_path / 'out')['group']) == STEPS


def test_a_checkpoint_that_differs_is_an_error(
  train_cnn, data, tmp_path, monkeypatch
):
  images = data.digits().test_images[:8]
  model = train_cnn.make_model('batch', 10, jax.devices()[:1])
  key = jax.random.key(0, impl='rbg')
  variables = train_cnn.training.initial(model, key, images)
  run = train_cnn.Run(model, 0, variables, [], [], 0.0)
  train_cnn.save_and_check(run, images, tmp_path / 'a')

  def restore(*_):
    stats = jax.tree.map(lambda a: a + 1, variables['batch_stats'])
    return {**variables, 'batch_stats': stats}

  monkeypatch.setattr(ocp.StandardCheckpointer, 'restore', restore)
  with pytest.raises(RuntimeError, match='other predictions than those saved'):
    train_cnn.save_and_check(run, images, tmp_path / 'b')


WRONG = {
  '--norm=bach': r"--norm: invalid choice: 'bach' .*batch.*none",
  '--steps=0': "--steps: got '0', accepted is a whole number from 1",
  '--steps=many': "--steps: got 'many', accepted is a whole number from 1",
  '--batch-size=-1': "--batch-size: got '-1', accepted is a whole number",
  '--batch-size=5000': '--batch-size: got 5000, accepted is at most 1293',
  '--seed=1.5': "--seed: got '1.5', accepted is a whole number from 0",
  '--seeds=0': "--seeds: got '0', accepted is a whole number from 1",
  '--lr=0': "--lr: got '0', accepted is a finite number above 0",
  '--lr=inf': "--lr: got 'inf', accepted is a finite number above 0",
  '--lr=fast': "--lr: got 'fast', accepted is a finite number above 0",
  '--devices=0': "--devices: got '0', accepted is a whole number from 1",
  '--devices=3': '--devices: got 3, accepted is a divisor of --batch-size',
  '--data=nowhere': '--data: nowhere is not a directory',
  '--out=a[0]': r"--out: got 'a\[0\]', accepted is a path without \[",
  f'--out={__file__}': '--out: got .*, accepted is a directory',
}


@pytest.mark.parametrize(('flag', 'message'), WRONG.items(), ids=WRONG.keys())
def test_a_wrong_option_is_named(train_cnn, capsys, flag, message):
  with pytest.raises(SystemExit) as stopped:
    train_cnn.parse([flag])
  assert stopped.value.code == 2
  assert re.search(f'error: argument {message}', capsys.readouterr().err)


def test_a_loss_that_is_not_finite_ends_the_run(train_cnn, tmp_path):
  flags = '--norm=none', '--seeds=1', '--steps=4', '--batch-size=8'
  flags = *flags, f'--out={tmp_path}'
  with pytest.raises(SystemExit, match=r'is nan by step 4\. --lr=1e\+30 is'):
    cells.run(train_cnn, *flags, '--lr=1e30')


def test_more_devices_than_there_are(train_cnn, capsys):
  with pytest.raises(SystemExit) as stopped:
    train_cnn.parse(['--devices=64', f'--batch-size={64 * jax.device_count()}'])
  assert stopped.value.code == 2
  assert 'argument --devices: 64 devices were asked' in capsys.readouterr().err


def test_few_or_small_images_are_refused(train_cnn, tmp_path, capsys):
  files = mnist()
  for name, array in MNIST.items():
    files[name] = idx(array[:, :3] if array.ndim > 1 else array)
  with pytest.raises(SystemExit):
    train_cnn.parse([f'--data={write(tmp_path, files)}'])
  assert 'at least 4x4 pixels' in capsys.readouterr().err


# What is pooled in each form of parallelism.


@pytest.mark.second_tier
def test_pooling(tmp_path):
  """How many means each form uses, and whose mean is off under a mask."""
  printed = run_alone(EXAMPLES / 'pooling.py', '--out', tmp_path)
  counts = re.findall(r'^(.*): (\d+) means$', printed, re.MULTILINE)
  alone = {
    'pmap, groups of four': 2,
    'shard_map, no name': 8,
    'jit, virtual_batch_size=4': 16,
  }
  assert len(counts) == 8
  assert {name: int(n) for name, n in counts if n != '1'} == alone
  errors = re.findall(r'│ (.*?) *│ +[\d.]+ │ +(\S+) │', printed)
  off = [name for name, error in errors if float(error) > 1e-6]
  assert len(errors) == 7
  assert off == ['flax, pmap, axis_name']
  assert (tmp_path / 'pooling.png').stat().st_size > 10_000


# Which norm for which batch.


@pytest.mark.second_tier
def test_batch_size(
  example, tmp_path, digits_folder, monkeypatch, capsys, verdicts
):
  """Errors of a short run, in the terminal, in files and in a document."""
  names = 'batch-size', 'skewed', 'costs'
  document = tmp_path / 'document.md'
  document.write_text(''.join(f'<!-- {n} -->\n<!-- /{n} -->\n' for n in names))
  out = tmp_path / 'out'
  flags = '--small', f'--data={digits_folder}', f'--out={out}'
  monkeypatch.setattr(sys, 'path', sys.path.copy())
  with jax.numpy_rank_promotion('allow'):  # optax's schedules
    cells.run(example('batch_size'), *flags, '--update', document)
  printed = capsys.readouterr().out
  assert re.search(r'renorm: [\d.]+ to [\d.]+ %', printed)
  for name in names:
    table = (out / f'{name}.md').read_text()
    rows = [line.split()[1] for line in table.splitlines()[2:]]
    assert rows == ['batch', 'renorm']
    assert table in document.read_text()
  for picture in ('batch_size.png', 'skewed.png'):
    assert (out / picture).read_bytes().startswith(b'\x89PNG')


def test_folds_are_disjoint_and_skewed_batches_hold_few_classes(
  example,
):
  batch_size = example('batch_size')
  digits = batch_size.load(batch_size.data.digits(), folds=5)
  assert len(np.unique(digits.test)) == digits.test.size == 1795
  streams = {
    10: batch_size.mixed(digits, 4000).reshape(5, 100, 40),
    2: batch_size.skewed(digits, 3, 40, classes=2),
  }
  for classes, batches in streams.items():
    for fold, test in zip(batches, digits.test, strict=True):
      assert not np.isin(fold, test).any()
    found = [len(set(digits.labels[b])) for b in batches.reshape(-1, 40)]
    assert max(found) == classes
  assert set(found) == {2}
