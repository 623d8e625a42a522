"""Eight host devices, no silent rank promotion, the same examples each run.

Tests are in two tiers: those marked `second_tier` wait for `pytest --all`.
Programs are compiled quickly and kept in pytest's cache, for the other worker
and the next run; a file whose tests run long compiled programs, or read them,
has `pytestmark = pytest.mark.optimized`. `JAX_PLATFORMS` chooses another
platform than the CPU, `--hypothesis-profile long` draws twenty times as many
examples, others each run.
"""

from collections.abc import Callable
import gc
import importlib
import itertools
import os
import pathlib
import re
import shutil
from types import ModuleType

import hypothesis
from images import idx
import jax
import numpy as np
import pytest

jax.config.update('jax_platforms', os.environ.get('JAX_PLATFORMS') or 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
hypothesis.settings.register_profile(
  'normkit', derandomize=True, deadline=None, max_examples=10
)
hypothesis.settings.register_profile('long', deadline=None, max_examples=200)
hypothesis.settings.load_profile('normkit')


def pytest_addoption(parser):
  parser.addoption(
    '--all', action='store_true', help='run the second tier of tests too'
  )


def pytest_configure(config):
  config.pluginmanager.register(Tiers(config))
  config.pluginmanager.register(Compiling(config))


class Tiers:
  """Without `--all`, leaves out the second tier and says how many that are."""

  def __init__(self, config):
    self.config = config
    self.waiting = 0

  def pytest_collection_modifyitems(self, items):
    if self.config.option.all:
      return
    second = [i for i in items if i.get_closest_marker('second_tier')]
    items[:] = [i for i in items if not i.get_closest_marker('second_tier')]
    self.waiting = len(second)
    self.config.hook.pytest_deselected(items=second)
    if hasattr(self.config, 'workeroutput'):
      self.config.workeroutput['waiting'] = self.waiting

  @pytest.hookimpl(optionalhook=True)
  def pytest_testnodedown(self, node):
    output = getattr(node, 'workeroutput', {})
    self.waiting = max(self.waiting, output.get('waiting', 0))

  def pytest_terminal_summary(self, terminalreporter):
    if self.waiting:
      terminalreporter.write_line(
        f'{self.waiting} more tests here are of the second tier:'
        ' `pytest --all` runs them too'
      )


class Compiling:
  """Compiles quickly, shares what it compiled, and drops it in time.

  That is after each file, and when a worker has grown by half a gibibyte.
  """

  def __init__(self, config):
    self.most_resident = resident() + GROWTH_BYTES
    if not hasattr(config, 'cache'):  # -p no:cacheprovider
      return
    folder = config.cache.mkdir('jax')
    if not hasattr(config, 'workerinput') and size(folder) > MOST_BYTES:
      shutil.rmtree(folder)
    jax.config.update('jax_compilation_cache_dir', str(folder))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)

  @pytest.hookimpl(wrapper=True)
  def pytest_runtest_protocol(self, item, nextitem):
    is_optimized = item.get_closest_marker('optimized') is not None
    jax.config.update('jax_disable_most_optimizations', not is_optimized)
    result = yield
    is_last = nextitem is None or nextitem.path != item.path
    if is_last or resident() > self.most_resident:
      jax.clear_caches()
      gc.collect()
      self.most_resident = resident() + GROWTH_BYTES
    return result


MOST_BYTES = 1 << 30
GROWTH_BYTES = 1 << 29


def resident() -> int:
  """The process's memory, where Linux tells it."""
  statm = pathlib.Path('/proc/self/statm')
  if not statm.exists():
    return 0
  return int(statm.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def size(folder: pathlib.Path) -> int:
  return sum(path.stat().st_size for path in folder.iterdir())


EXAMPLES = pathlib.Path(__file__).parents[1] / 'examples'


@pytest.fixture(scope='session')
def example():
  """Imports a module of the examples; a script's folder is on its path."""
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(EXAMPLES)
    yield importlib.import_module


@pytest.fixture
def run_small(tmp_path, capsys) -> Callable[..., str]:
  """Runs an example in a small setting: what it prints; its figures exist."""

  def run(module: ModuleType, *figures: str, data: str = '') -> str:
    out = tmp_path / 'out'
    flags = [f'--data={data}'] if data else []
    with jax.numpy_rank_promotion('allow'):  # optax's schedules and masks
      module.main(['--small', f'--out={out}', *flags])
    for name in figures:
      content = (out / f'{name}.png').read_bytes()
      assert content.startswith(b'\x89PNG')
    return capsys.readouterr().out

  return run


@pytest.fixture
def takes_images(run_small) -> Callable[..., None]:
  """Asserts that an example with images from files finds other numbers."""

  def check(module: ModuleType, printed: str, folder: str) -> None:
    again = run_small(module, data=folder)
    before, after = (re.findall(r'(\S+) ± ', text) for text in (printed, again))
    assert len(after) > 4 and before != after
    assert 'nan' not in again.lower()

  return check


@pytest.fixture(scope='session')
def digits_folder(example, tmp_path_factory) -> str:
  """The digits, dark on light, in files like MNIST's."""
  folder = tmp_path_factory.mktemp('digits')
  _, *arrays = example('data').digits()
  kinds = 'images', 'labels'
  for (part, kind), array in zip(
    itertools.product(('train', 't10k'), kinds), arrays, strict=True
  ):
    values = array
    if kind == 'images':
      values = np.round(255 * (1 - array[..., 0]))
    (folder / f'{part}-{kind}').write_bytes(idx(values))
  return str(folder)


@pytest.fixture(scope='session')
def photographs_folder(example, tmp_path_factory) -> str:
  """The negatives of photographs in files like CIFAR-10's."""
  folder = tmp_path_factory.mktemp('photographs')
  dataset = example('data').photographs()
  for name, images, labels in (
    ('data_batch_1.bin', dataset.train_images, dataset.train_labels),
    ('test_batch.bin', dataset.test_images, dataset.test_labels),
  ):
    planes = np.round(255 * (1 - images.transpose(0, 3, 1, 2))).reshape(
      len(images), -1
    )
    records = np.uint8(np.hstack([labels[:, None], planes]))
    (folder / name).write_bytes(records.tobytes())
  return str(folder)
