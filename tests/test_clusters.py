"""A row, or a group, over the members of a cluster, by Mosaic GPU.

The interpreter has no clusters: it gets the members as more threads of one
program. More that compiles for H200 and B200 is held in `test_mosaic_gpu.py`.
"""

import itertools
import re

from cases import draw
import jax
import numpy as np
import pytest
from test_kernels import DTYPES, Rows, assert_right
from test_mosaic_gpu import COMPILERS, LIMITS, SomeRows
from tiers import second_tier

from benchmarks.registers import CHIPS, report
from normkit.kernels import configs, mosaic_gpu
from normkit.kernels.rows import Spec

WANTED = 'dx', 'dscale', 'dbias'


@pytest.fixture
def chips(processors):
  """Two clusters of two, so that each has some tasks."""
  processors(4)
  jax.clear_caches()
  yield
  jax.clear_caches()


def config(members, warpgroups=1, tiles=1, stages=3, holds=True, **tile):
  tile = {'rows': 4, 'width': 256} | tile
  return configs.Config(
    *tile.values(), tiles, warpgroups, True, stages, 1, holds, members
  )


# Rows that end in the first member, and in the last one's last tile.
ROWS = [
  ((3, 1000), config(2)),
  second_tier((2, 7900), config(4, tiles=2, stages=3, holds=False)),
]


def assert_rows(shape, of, center, dtype):
  """Both kernels, and the statistics, which one member writes."""
  x, dy, residual = (draw(shape, dtype, seed=i) for i in range(3))
  scale, bias = (draw(of or shape[-1], seed=i) for i in (3, 4))
  spec, tolerance = Spec(1e-6, center, x.dtype), DTYPES[dtype]
  given = {'x': x, 'scale': scale, 'residual': residual}
  given |= {'bias': bias} if center else {}
  found = mosaic_gpu.forward(given, spec, True, interpret=True)
  total = np.asarray(x + residual)
  reference = SomeRows if of else Rows
  exact = reference(total, scale, bias if center else 0.0, center)
  assert_right(found['y'], exact.y, tolerance)
  wide = np.asarray(total, np.float64)
  var = wide.var(-1) if center else (wide**2).mean(-1)
  assert_right(
    found['var'], var[..., None], 2e-2 if dtype != 'float32' else 1e-5
  )
  wanted = WANTED if center else WANTED[:2]
  given = {'x': x, 'scale': scale, 'bias': bias, 'dy': dy, 'dtotal': residual}
  found = mosaic_gpu.backward(given, spec, wanted, interpret=True)
  exact = reference(x, scale, bias if center else 0.0, center)
  dx, *sums = exact.gradients(dy)
  desired = dx + np.asarray(residual, np.float64), *sums
  for name, value in zip(wanted, desired, strict=False):
    assert_right(found[name], value, tolerance)


@pytest.mark.parametrize(('shape', 'chosen'), ROWS)
def test_rows(chips, monkeypatch, shape, chosen):
  """Forward and backward, by members that have a part of each row."""
  del chips
  monkeypatch.setattr(configs, 'config', lambda *_: chosen)
  assert_rows(shape, None, True, 'float32')


def assert_groups(shape, dtype='float32'):
  x, dy = draw(shape, dtype), draw(shape, dtype, seed=1)
  scale, bias = (draw(shape[-1], seed=i) for i in (2, 3))
  spec, tolerance = Spec(1e-6, True, x.dtype, groups=2), DTYPES[dtype]
  given = {'x': x, 'scale': scale, 'bias': bias}
  found = mosaic_gpu.forward(given, spec, True, interpret=True)
  exact = Rows(x, scale, bias, True, 2)
  assert_right(found['y'], exact.y, tolerance)
  mean = np.asarray(found['pivot'], np.float64) + found['offset']
  split = np.asarray(x, np.float64).reshape(shape[0], -1, 2, shape[-1] // 2)
  assert_right(mean[:, 0], split.mean((1, 3)), 1e-6)
  given = {'x': x, 'scale': scale, 'dy': dy}
  found = mosaic_gpu.backward(given, spec, WANTED, interpret=True)
  for name, value in zip(WANTED, exact.gradients(dy), strict=True):
    assert_right(found[name], value, tolerance)


GROUPS = [
  ((5, 100, 8), config(2, rows=64, width=8, holds=False), 'float32'),
  second_tier(
    (2, 500, 8),
    config(4, tiles=2, stages=3, rows=64, width=8, holds=False),
    'bfloat16',
  ),
]


@pytest.mark.parametrize(('shape', 'chosen', 'dtype'), GROUPS)
def test_groups(chips, monkeypatch, shape, chosen, dtype):
  """Members that have a part of the places of each group."""
  del chips
  monkeypatch.setattr(configs, 'groups', lambda *_: chosen)
  assert_groups(shape, dtype)


@pytest.mark.second_tier
@pytest.mark.parametrize(
  ('shape', 'of', 'center', 'dtype'),
  [
    ((5, 1300), None, False, 'bfloat16'),
    ((3, 3, 1280), (3, 1, 1280), True, 'float32'),
  ],
)
def test_no_races(chips, races, monkeypatch, shape, of, center, dtype):
  """Two members of two warpgroups, and rings that are used again.

  Rows end in the last member's first tile; what sets have is right too.
  """
  del chips
  monkeypatch.setattr(
    configs, 'config', lambda *_: config(2, 2, stages=2, rows=2)
  )
  assert_rows(shape, of, center, dtype)
  assert not races()


@pytest.mark.second_tier
def test_no_races_of_groups(chips, processors, races, monkeypatch):
  """The same, with two tasks for the channels of an example."""
  del chips
  processors(2)
  chosen = config(2, 2, stages=2, rows=64, width=8, holds=False)
  monkeypatch.setattr(configs, 'groups', lambda *_: chosen)
  assert_groups((2, 200, 16))
  assert not races()


COMPILED = [
  ('backward', 32_768, 'bfloat16', True),
  *(
    second_tier(*row)
    for row in [
      ('backward', 20_480, 'bfloat16', True),
      ('backward', 30_000, 'float16', True),
      ('backward', 65_536, 'bfloat16', False),
      ('backward', 30_000, 'float32', True),
      ('backward', 10_000, 'bfloat16', True),
      ('backward', 13_000, 'bfloat16', True),
      ('backward', 10_000, 'float32', False),
    ]
  ),
]


@pytest.mark.optimized
@pytest.mark.parametrize('target', COMPILERS)
@pytest.mark.parametrize(('kind', 'size', 'dtype', 'center'), COMPILED)
def test_compiled(target, kind, size, dtype, center):
  """No spills, and sums that others read after a barrier of the cluster."""
  found = report(target, kind, size, dtype, center=center)
  assert found.config.members > 1
  assert found.spilled == 0
  assert found.moved <= LIMITS[kind]
  assert found.under_way >= configs.CHIPS[CHIPS[target]].under_way
  assert_ordered(found.code)


def assert_ordered(code):
  """Between writing to a member and reading here all of the cluster meets.

  Arrival releases and the wait acquires, for all of the cluster, as both are
  unless they are told to be relaxed.
  """
  lines = [
    line.strip().split(' ')[0].split('\t')[0] for line in code.split('\n')
  ]
  lines = [
    n for n in lines if re.match(r'barrier\.cluster|st\.shared::cluster', n)
  ]
  start, body = lines[:2], lines[2:]
  assert start == [
    'barrier.cluster.arrive.relaxed.aligned;',
    'barrier.cluster.wait.aligned;',
  ]
  kinds = [name for name, _ in itertools.groupby(body)]
  meeting = ['barrier.cluster.arrive.aligned;', 'barrier.cluster.wait.aligned;']
  assert kinds == ['st.shared::cluster.b32', *meeting] * (len(kinds) // 3)
  assert kinds
