"""Eight host devices, no silent rank promotion, two tiers of tests.

Those marked `second_tier` wait for `pytest --all`. Programs are compiled
quickly and kept in pytest's cache, for the other worker and the next run; a
file whose tests run long compiled programs, or read them, has
`pytestmark = pytest.mark.optimized`. `JAX_PLATFORMS` chooses another platform
than the CPU.
"""

import ctypes
import gc
import os
import pathlib
import shutil
import sys

import jax
import pytest

jax.config.update('jax_platforms', os.environ.get('JAX_PLATFORMS') or 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_addoption(parser):
  parser.addoption(
    '--all', action='store_true', help='run the second tier of tests too'
  )


def pytest_configure(config):
  config.pluginmanager.register(Tiers(config))
  config.pluginmanager.register(Compiling(config))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
  """Modules stay: garbage is looked for among what comes after them alone."""
  gc.disable()
  result = yield
  gc.collect()
  gc.freeze()
  gc.enable()
  return result


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
      shutil.rmtree(folder, ignore_errors=True)
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
      trim()
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


def trim():
  """Gives free memory back to the system, where glibc does."""
  if sys.platform == 'linux':
    getattr(ctypes.CDLL(None), 'malloc_trim', abs)(0)


def size(folder: pathlib.Path) -> int:
  return sum(path.stat().st_size for path in folder.iterdir())
