"""Mosaic GPU's kernels read x and its gradient once, and write results once.

Counted while they are interpreted: what is read again would be copied again.
That nothing is loaded beside the copies is read from the code that NVIDIA's
assembler gets, in `test_mosaic_gpu.py`.
"""

import collections
import importlib

from cases import draw
import numpy as np
import pytest
from test_mosaic_gpu import IN_WARP, SHARED
from tiers import second_tier

from normkit.kernels import configs, mosaic_gpu
from normkit.kernels.rows import Spec


@pytest.fixture
def copied(monkeypatch, threads):
  """How often each array is copied from, and to; shared memory has others."""
  callbacks = importlib.import_module(
    'jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks'
  )
  found = {'src': collections.Counter(), 'dst': collections.Counter()}

  def count(name, end):
    run = getattr(callbacks, name)

    def counted(**given):
      key = np.asarray(given[f'{end}_allocation_key_as_array']).tobytes()
      found[end][key] += 1
      return run(**given)

    monkeypatch.setattr(callbacks, name, counted)

  oldest = '_execute_device_local_memory_transfer'
  count(oldest if hasattr(callbacks, oldest) else 'copy_gmem_to_smem', 'src')
  count('copy_smem_to_gmem', 'dst')

  def counts():
    each = [sorted(f.values()) for f in found.values()]
    for counter in found.values():
      counter.clear()
    return each

  return counts


OF_CLUSTER = configs.Config(4, 256, 1, 1, True, 3, 1, True, 2)
# Tiles of (4, 128); pieces of 256, of which a row has 8, filled up.
ROWS = [
  ((36, 100), IN_WARP, 9, 2),
  second_tier((5, 1300), SHARED, 40, 2),
  second_tier((3, 1300), OF_CLUSTER, 24, 2),
]


@pytest.fixture
def chips(processors):
  """Two programs, each with several rows."""
  processors(2)


@pytest.mark.parametrize(('shape', 'config', 'tiles', 'programs'), ROWS)
def test_rows(copied, chips, monkeypatch, shape, config, tiles, programs):
  """Scale and bias are held: each program brings them once."""
  monkeypatch.setattr(configs, 'config', lambda *_: config)
  x, scale = draw(shape), draw(shape[-1], seed=1)
  spec = Spec(1e-6, True, x.dtype)
  given = {'x': x, 'scale': scale, 'bias': scale, 'residual': x}
  mosaic_gpu.forward(given, spec, True, interpret=True)
  assert copied() == [[programs] * 2 + [tiles] * 2, [tiles] * 2]
  given = {'x': x, 'scale': scale, 'dy': x, 'dtotal': x}
  wanted = 'dx', 'dscale', 'dbias'
  mosaic_gpu.backward(given, spec, wanted, interpret=True)
  assert copied() == [[programs] + [tiles] * 3, [tiles]]


@pytest.mark.second_tier
def test_groups(copied, chips, monkeypatch):
  """Of two bundles of channels in three examples, four tiles of places."""
  config = configs.Config(64, 8, 2, 2, True, 3, 1, False)
  monkeypatch.setattr(configs, 'groups', lambda *_: config)
  x, scale = draw((3, 200, 16)), draw(16, seed=1)
  spec = Spec(1e-6, True, x.dtype, groups=4)
  given = {'x': x, 'scale': scale, 'bias': scale}
  mosaic_gpu.forward(given, spec, True, interpret=True)
  assert copied() == [[24], [24]]
  given = {'x': x, 'scale': scale, 'dy': x}
  wanted = 'dx', 'dscale', 'dbias'
  mosaic_gpu.backward(given, spec, wanted, interpret=True)
  assert copied() == [[24, 24], [24]]


def test_what_was_measured_is_taken(monkeypatch):
  """On its chip and for its case, instead of the rule's choice."""
  rows = configs.Case(768, (np.dtype('float32'),), (np.dtype('float32'),))
  groups = configs.groups_of((2, 49, 64), 32, ['float32'], ['float32'])
  for case, choose in (rows, configs.config), (groups, configs.groups):
    of = getattr(choose, '__wrapped__', choose)  # what was chosen is kept
    before = of(case, 9)
    monkeypatch.setitem(configs.MEASURED, (9, case), OF_CLUSTER)
    assert of(case, 9) == OF_CLUSTER != before
    assert of(case, 10) != OF_CLUSTER
