"""The same examples each run, and what tests of the examples share.

`--hypothesis-profile long` draws twenty times as many, others each run.
"""

from collections.abc import Callable
import importlib
import itertools
import pathlib
import re
import sys
from types import ModuleType

import cells
import hypothesis
from images import idx
import jax
from jax import core
import numpy as np
import pytest

hypothesis.settings.register_profile(
  'normkit', derandomize=True, deadline=None, max_examples=10
)
hypothesis.settings.register_profile('long', deadline=None, max_examples=200)
hypothesis.settings.load_profile('normkit')

EXAMPLES = pathlib.Path(__file__).parents[1] / 'examples'


@pytest.fixture(scope='session')
def example():
  """Imports a module of the examples; a script's folder is on its path."""
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(EXAMPLES)
    yield importlib.import_module


@pytest.fixture(scope='session')
def printed() -> dict[str, str]:
  """What each example printed in its small setting, with its own images."""
  return {}


@pytest.fixture
def verdicts(example, monkeypatch) -> None:
  """Small runs print what a full one would, though it says nothing there."""

  def tell(lines, small):
    assert small is True
    print('\n'.join(lines))

  monkeypatch.setattr(example('summary'), 'tell', tell)


@pytest.fixture
def run_small(
  printed, example, tmp_path, capsys, monkeypatch, verdicts
) -> Callable[..., str]:
  """Runs an example in a small setting: what it prints; its figures exist."""
  monkeypatch.setattr(example('figures'), 'DPI', 40)

  def run(module: ModuleType, *figures: str, data: str = '') -> str:
    out = tmp_path / 'out'
    flags = [f'--data={data}'] if data else []
    with jax.numpy_rank_promotion('allow'):  # optax's schedules and masks
      cells.run(module, '--small', f'--out={out}', *flags)
    for name in figures:
      content = (out / f'{name}.png').read_bytes()
      assert content.startswith(b'\x89PNG')
    text = capsys.readouterr().out
    if not data:
      printed[module.__name__] = text
    return text

  return run


@pytest.fixture
def takes_images(run_small, printed) -> Callable[..., None]:
  """Asserts that an example with images from files finds other numbers."""

  def check(module: ModuleType, folder: str) -> None:
    # On one process with the test before it, its run serves both.
    first = printed.get(module.__name__) or run_small(module)
    again = run_small(module, data=folder)
    before, after = (re.findall(r'(\S+) ± ', text) for text in (first, again))
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


@pytest.fixture
def importable(tmp_path, monkeypatch) -> Callable[[str, str], pathlib.Path]:
  """Writes a module into a folder of its own, from where it is imported."""

  def write(name: str, text: str) -> pathlib.Path:
    (tmp_path / f'{name}.py').write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path

  return write


def eval_thread(jaxpr, constants, *arguments):
  core.eval_jaxpr(jaxpr, constants, *arguments)


def run_thread(jaxpr, constants, *arguments):
  """What JAX 0.10's interpreter does with a function of each thread's own."""
  traced = jax.jit(eval_thread, static_argnums=0).trace(
    jaxpr, constants, *arguments
  )
  traced.lower().compile()(constants, *arguments)


@pytest.fixture
def threads(monkeypatch):
  """Those of an interpreted kernel share a program, as with newer JAX."""
  threads = importlib.import_module(
    'jax._src.pallas.mosaic.interpret.thread_map'
  )
  if not hasattr(threads, '_run'):
    monkeypatch.setattr(threads, '_run_jaxpr', run_thread)


@pytest.fixture
def interpreted(monkeypatch, threads):
  """The kernels of Mosaic GPU run interpreted on the CPU."""
  dispatch = importlib.import_module('normkit.kernels.dispatch')
  jax.clear_caches()
  monkeypatch.setattr(dispatch, 'interpreted', 'mosaic_gpu')
  yield
  jax.clear_caches()


@pytest.fixture
def processors(monkeypatch):
  """Sets how many each chip has, so that programs are few, of several tasks."""
  configs = importlib.import_module('normkit.kernels.configs')

  def have(count):
    few = {'processors': count, 'in_clusters': count}
    chips = {n: c._replace(**few) for n, c in configs.CHIPS.items()}
    monkeypatch.setattr(configs, 'CHIPS', chips)

  return have


@pytest.fixture
def races(monkeypatch, threads):
  """The interpreter looks for races; whether it has found one."""
  callbacks = importlib.import_module(
    'jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks'
  )
  launch = importlib.import_module('normkit.kernels.launch')
  # A clock for each copy: two with one clock would count as ordered.
  made = launch.interpreter(detect_races=True, num_tma_threads_per_device=499)
  monkeypatch.setattr(launch, 'interpreter', lambda: made)
  jax.clear_caches()
  yield lambda: callbacks.get_races().races_found
  jax.clear_caches()
