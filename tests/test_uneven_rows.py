"""Rows whose bytes are no multiple of 16, by Mosaic GPU.

They lie in arrays of one axis. More that compiles for H200 and B200, of 100
elements, is held in `test_mosaic_gpu.py`.
"""

import itertools

from cases import draw
from hypothesis import given, strategies as st
import jax
import jax.numpy as jnp
import pytest
from test_clusters import assert_rows
from test_kernels import DTYPES, assert_right
from test_mosaic_gpu import (
  COMPILERS,
  ENDS,
  LIMITS,
  NAME,
  SomeRows,
  assert_wide,
  rests,
  run_gated,
  run_plain,
)
from tiers import second_tier

from benchmarks.registers import CHIPS, report
import normkit as nk
from normkit.kernels import configs, flat, plans

# Of each kind, with more tiles than its rings.
IN_WARP = configs.Config(4, 128, 1, 2, False, 2, 1, True)
IN_TILES = configs.Config(4, 256, 3, 1, False, 4, 1, False)
SHARED = configs.Config(2, 256, 2, 2, True, 3, 1, True)
MEMBERS = configs.Config(4, 256, 1, 1, True, 3, 1, True, 2)


@pytest.fixture
def chosen(interpreted, processors, monkeypatch):
  """Sets what a program holds; there are two of them, or one cluster."""
  del interpreted
  processors(2)
  return lambda one: monkeypatch.setattr(configs, 'config', lambda *_: one)


@pytest.mark.parametrize(
  ('config', 'shape', 'of', 'dtype'),
  [
    (IN_WARP, (37, 101), None, 'float32'),
    second_tier(IN_WARP, (9, 3, 65), (1, 3, 65), 'float16'),
    second_tier(IN_TILES, (9, 517), None, 'float16'),
    second_tier(SHARED, (5, 1301), None, 'bfloat16'),
    second_tier(MEMBERS, (2, 2, 2043), (2, 1, 2043), 'float32'),
  ],
  ids=str,
)
def test_rows(chosen, config, shape, of, dtype):
  """Both kernels; rows that end in the last tile, and long before it."""
  chosen(config)
  assert_rows(shape, of, True, dtype)


@pytest.mark.second_tier
@pytest.mark.parametrize(
  ('config', 'shape', 'of', 'run'),
  [
    (IN_WARP, (3, 10, 101), (3, 1, 101), run_plain),
    # Each tile has a copy: the interpreter counts these, a device groups.
    (SHARED, (2, 3, 1801), (1, 3, 1801), run_gated),
  ],
)
def test_no_races(races, chosen, config, shape, of, run):
  chosen(config)
  jax.block_until_ready(run(draw(shape), draw(of, seed=1)))
  assert not races()


def test_vmap(interpreted):
  """Of examples of 270 bytes; the second axis is mapped too."""
  del interpreted
  x, dy = draw((3, 2, 3, 45), 'float16'), draw((3, 2, 3, 45), 'float16', 1)
  scale = draw(45, seed=2)

  def gradients(x, dy):
    def norm(x, scale):
      return nk.layer_norm(x, scale, implementation=NAME)

    y, pull = jax.vjp(norm, x, scale)
    return y, pull(dy)[0]

  found = jax.jit(jax.vmap(jax.vmap(gradients)))(x, dy)
  exact = SomeRows(x, scale, 0.0, True)
  assert_right(found[0], exact.y, DTYPES['float16'])
  assert_right(found[1], exact.gradients(dy)[0], DTYPES['float16'])


@given(
  st.integers(1, 5),
  st.integers(0, 70),
  st.integers(1, 9),
  st.sampled_from([1, 2, 4]),
  st.integers(0, 3),
)
def test_elements(count, first, size, vector, row):
  """Each vector of the rows' ends is written once, and where it belongs."""
  columns = range(first, first + size * vector, vector)
  found = [
    flat.element(number, columns, row, 1000, 107)
    for number in range(count * size)
  ]
  assert found == [
    (row + index, column, 1000 + 107 * index + column - first)
    for index, column in itertools.product(range(count), columns)
  ]


def test_longest_array():
  """Beyond 32 bits rows are filled up."""
  dtypes = (jnp.dtype('bfloat16'),)
  case = configs.Case(101, dtypes, dtypes)
  config = configs.config(case)

  def shape(rows):
    sets = plans.Sets(1, rows)
    return plans.plan(case, config, 9, sets, interpret=False).shape

  rows = 2**31 // 101
  assert shape(rows) == (rows * 101,)
  assert shape(rows + 1) == (rows + 1, 104)


@pytest.mark.optimized
@pytest.mark.parametrize('target', COMPILERS)
@pytest.mark.parametrize(
  ('kind', 'size', 'dtype'),
  [
    second_tier(*row)
    for row in itertools.product(
      ENDS, [101, 333, 1301, 5001, 20_001], ['bfloat16', 'float32']
    )
  ],
)
def test_compiled(target, kind, size, dtype):
  """Bytes as of other rows; nothing spills."""
  found = report(target, kind, size, dtype)
  assert found.spilled == 0
  assert found.moved <= LIMITS[kind]
  assert_wide(found, kind, rests(size, dtype))
  assert found.under_way >= configs.CHIPS[CHIPS[target]].under_way
