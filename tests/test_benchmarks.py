"""The benchmarks run, and what they time is the same work in every library."""

import importlib.util
import types

import jax
import numpy as np
import pytest
from tiers import thinned

from benchmarks import compiling, family, speed

SHAPE = 4, 6, 6, 64
LIBRARIES = [
  pytest.param(
    name,
    marks=pytest.mark.skipif(
      not importlib.util.find_spec(name.split()[0]),
      reason=f'{name} is not installed: pip install -e ".[benchmarks]"; flax '
      'and normkit are held to the same reference',
    ),
  )
  for name in speed.LIBRARIES
]
AXES = {
  'LayerNorm': (-1,),
  'RMSNorm': (-1,),
  'BatchNorm': (0, 1, 2),
  'InstanceNorm': (1, 2),
}


def wanted(norm, arrays):
  x = arrays.x.astype(np.float64)
  axes = AXES.get(norm)
  if axes is None:  # groups of neighbouring channels
    x = x.reshape(*x.shape[:-1], speed.GROUPS, -1)
    axes = 1, 2, 4
  mean = 0 if norm == 'RMSNorm' else x.mean(axes, keepdims=True)
  var = np.square(x - mean).mean(axes, keepdims=True)
  y = ((x - mean) / np.sqrt(var + speed.EPSILON)).reshape(arrays.x.shape)
  return y * arrays.scale + (0 if norm == 'RMSNorm' else arrays.bias)


@pytest.mark.parametrize('norm', thinned(speed.CPU_SHAPES, every=3))
@pytest.mark.parametrize('library', LIBRARIES)
def test_the_same_work(library, norm):
  function = speed.LIBRARIES[library](norm)
  if function is None:
    assert library in ('equinox', 'tokamax')
    return
  shape = (24, 64) if norm in ('LayerNorm', 'RMSNorm') else SHAPE
  arrays = speed.draw(shape, 'float32')
  make = speed.torch_calls if library == 'torch' else speed.jax_calls
  calls = make(function, arrays)
  y = np.asarray(calls['forward']())
  np.testing.assert_allclose(y, wanted(norm, arrays), atol=1e-4)
  again, gradients = calls['step']()
  again = np.asarray(again.detach() if library == 'torch' else again)
  np.testing.assert_allclose(again, y, atol=1e-5)
  dx = np.asarray(gradients[0], np.float64)
  dy, step = arrays.dy.astype(np.float64), 1e-5
  above, below = (
    wanted(norm, arrays._replace(x=arrays.x + s * dy)) for s in (step, -step)
  )
  change = np.sum(dy * (above - below)) / (2 * step)
  np.testing.assert_allclose(np.sum(dx * dy), change, rtol=1e-4)


@pytest.mark.parametrize('name', family.CASES)
def test_formulas_written_out_are_the_norms(name):
  case = family.CASES[name]
  shapes = [[min(s, 8) for s in a.shape] for a in family.arrays_of(case)]
  random = np.random.default_rng(0)
  args = [random.normal(size=s).astype(np.float32) for s in shapes]
  with jax.numpy_rank_promotion('allow'):
    y, want = (jax.jit(f)(*args) for f in (case.ours, case.written))
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_timing_and_its_table(tmp_path):
  rows = speed.measure('LayerNorm', (8, 16), 'float32', ['normkit', 'flax'], 0)
  assert {row['program'] for row in rows} == {'forward', 'step'}
  assert all(row['low'] <= row['ratio'] <= row['high'] for row in rows)
  header, lines = speed.table(rows, ['normkit', 'flax'], bandwidth=1e9)
  assert len(header) == len(lines[0]) == 4
  speed.plot(rows, tmp_path / 'plot.png', 'cpu')
  assert (tmp_path / 'plot.png').stat().st_size > 1000


@pytest.mark.skipif(
  jax.default_backend() != 'cpu', reason='there is a GPU or TPU to time here'
)
def test_gpu_without_one_says_so(capsys):
  assert speed.run(types.SimpleNamespace(device='gpu')) == 1
  assert 'no GPU' in capsys.readouterr().out


@pytest.mark.parametrize(
  'program',
  [
    compiling.one_norm('normkit', 'LayerNorm'),
    compiling.many_norms('normkit'),
  ],
  ids=['one', 'many'],
)
def test_compile_table(program):
  found = compiling.measure(*program)
  assert found['traces'] == 1
  assert found['instructions'] > 10
