"""What is kept for the backward: the input in its own dtype, and no more."""

import cases
import jax
import jax.numpy as jnp
import pytest
from tiers import thinned

import normkit as nk

ROWS, IMAGES = (512, 1024), (16, 32, 32, 64)
NORMS = {
  'layer': (nk.LayerNorm(), ROWS),
  'rms': (nk.RMSNorm(), ROWS),
  'batch': (nk.BatchNorm(), IMAGES),
  'batch_virtual': (nk.BatchNorm(virtual_batch_size=8), IMAGES),
  'group': (nk.GroupNorm(num_groups=8), IMAGES),
  'instance': (nk.InstanceNorm(), IMAGES),
  'renorm': (nk.BatchRenorm(), IMAGES),
  'streaming': (nk.StreamingNorm(), IMAGES),
  'response': (nk.FilterResponseNorm(use_threshold=False), IMAGES),
  'evonorm_s0': (nk.EvoNormS0(), IMAGES),
  'evonorm_b0': (nk.EvoNormB0(), IMAGES),
  'global_response': (nk.GlobalResponseNorm(), IMAGES),
  'scale': (nk.ScaleNorm(), ROWS),
  'gated': (cases.SelfGated(), ROWS),
  'rounded': (nk.RMSNorm(round_before_scale=True), ROWS),
  'dyt': (nk.DyT(), ROWS),
  'derf': (nk.Derf(), ROWS),
  'whitening': (nk.IterativeWhitening(group_size=16), IMAGES),
}


def kept(function, *args) -> int:
  """Bytes that a forward hands to its backward."""
  residuals = jax.eval_shape(lambda *a: jax.vjp(function, *a)[1], *args)
  return sum(r.size * r.dtype.itemsize for r in jax.tree.leaves(residuals))


@pytest.mark.parametrize(
  ('name', 'dtype', 'masked'),
  thinned(NORMS, [jnp.bfloat16, jnp.float32], [False, True], every=2),
)
def test_one_input_is_kept(name, dtype, masked):
  transform, shape = NORMS[name]
  x = jax.ShapeDtypeStruct(shape, dtype)
  params, state = transform.init(x)
  where = jnp.ones((shape[0], *[1] * (len(shape) - 1)), bool)

  def apply(params, x):
    mask = where if masked else None
    return transform.apply(params, state, x, train=True, where=mask)[0]

  size = x.size * x.dtype.itemsize
  # The statistics are the rest: a few numbers for each set.
  assert size <= kept(apply, params, x) <= 1.1 * size


def test_the_test_can_fail():
  """The same formula without a rule keeps several times as much."""

  def plain(x):
    wide = x.astype(jnp.float32)
    d = wide - wide.mean(-1, keepdims=True)
    var = jnp.square(d).mean(-1, keepdims=True)
    return (d * jax.lax.rsqrt(var + 1e-6)).astype(x.dtype)

  x = jax.ShapeDtypeStruct(ROWS, jnp.bfloat16)
  assert kept(plain, x) > 1.9 * x.size * 2
