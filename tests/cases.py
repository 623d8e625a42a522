"""One row for each norm and each way of using it; a new norm is a new row."""

from typing import Any, NamedTuple

import family
import jax
import jax.numpy as jnp
import numpy as np
import reference

import normkit as nk


class Case(NamedTuple):
  """A transform, the shape of its input, and what it should compute."""

  name: str
  transform: nk.Norm
  shape: tuple[int, ...]
  reference: Any


class Offset:
  """A reference whose scale is the parameter plus an offset."""

  def __init__(self, of, offset):
    self.of, self.offset = of, offset

  def __getattr__(self, name):
    return getattr(self.of, name)

  def __call__(self, params, *args):
    return self.of(self.moved(params), *args)

  def gradients(self, params, *args):
    return self.of.gradients(self.moved(params), *args)

  def moved(self, params):
    return params._replace(scale=np.asarray(params.scale) + self.offset)


class SelfGated(nk.GatedRMSNorm):
  """x is the gate too; test_gated.py has others."""

  def apply(self, params, state, x, *, train, where=None):
    return super().apply(params, state, x, x, train=train, where=where)


CASES = (
  Case('batch_norm', nk.BatchNorm(), (8, 3), reference.batch_norm()),
  Case(
    'batch_norm_channels_first',
    nk.BatchNorm(axis=1, momentum=0.9),
    (4, 3, 5),
    reference.batch_norm(axis=1, momentum=0.9),
  ),
  Case(
    'batch_norm_two_axes',
    nk.BatchNorm(axis=(-1, 1), epsilon=1e-3, use_bias=False),
    (4, 2, 3, 3),
    reference.batch_norm(axis=(-1, 1), epsilon=1e-3),
  ),
  Case(
    'batch_norm_cumulative',
    nk.BatchNorm(momentum=None),
    (8, 3),
    reference.batch_norm(momentum=None),
  ),
  Case(
    'batch_norm_debiased',
    nk.BatchNorm(momentum=0.9, debias=True, use_scale=False),
    (8, 3),
    reference.batch_norm(momentum=0.9, debias=True),
  ),
  Case(
    'batch_norm_unbiased',
    nk.BatchNorm(momentum=0.5, unbiased=True, use_scale=False, use_bias=False),
    (2, 4, 3),
    reference.batch_norm(momentum=0.5, unbiased=True),
  ),
  Case(
    'batch_norm_virtual',
    nk.BatchNorm(virtual_batch_size=4, skip_nonfinite=True),
    (8, 2, 3),
    reference.batch_norm(virtual_batch_size=4),
  ),
  Case('layer_norm', nk.LayerNorm(), (4, 6), reference.layer_norm()),
  Case(
    'layer_norm_two_axes',
    nk.LayerNorm(axis=(-1, 1), epsilon=1e-3, use_bias=False),
    (2, 3, 2, 4),
    reference.layer_norm(axis=(-1, 1), epsilon=1e-3),
  ),
  Case(
    'layer_norm_channels_first',
    nk.LayerNorm(axis=1),
    (2, 5, 3, 2),
    reference.layer_norm(axis=1),
  ),
  Case(
    'layer_norm_each_head',
    nk.LayerNorm(feature_axis=(-2, -1)),
    (3, 2, 4),
    reference.layer_norm(feature_axis=(-2, -1)),
  ),
  Case('rms_norm', nk.RMSNorm(), (4, 6), reference.rms_norm()),
  Case(
    'rms_norm_first_axis',
    nk.RMSNorm(axis=0, epsilon=1e-3, use_scale=False),
    (6, 2, 3),
    reference.rms_norm(axis=0, epsilon=1e-3),
  ),
  Case(
    'rms_norm_all_heads',
    nk.RMSNorm(axis=(-2, -1)),
    (3, 2, 4),
    reference.rms_norm(axis=(-2, -1)),
  ),
  Case(
    'rms_norm_each_head',
    nk.RMSNorm(feature_axis=(-2, -1)),
    (3, 2, 4),
    reference.rms_norm(feature_axis=(-2, -1)),
  ),
  Case(
    'group_norm',
    nk.GroupNorm(num_groups=3),
    (2, 5, 6),
    reference.group_norm(num_groups=3),
  ),
  Case(
    'group_norm_channels_first',
    nk.GroupNorm(num_groups=2, axis=1, epsilon=1e-3, use_scale=False),
    (2, 4, 3, 2),
    reference.group_norm(num_groups=2, axis=1, epsilon=1e-3),
  ),
  Case(
    'group_norm_two_batch_axes',
    nk.GroupNorm(num_groups=1, batch_axis=(0, 2)),
    (2, 3, 2, 4),
    reference.group_norm(num_groups=1, batch_axis=(0, 2)),
  ),
  Case(
    'instance_norm',
    nk.InstanceNorm(),
    (2, 3, 4, 3),
    reference.instance_norm(),
  ),
  Case(
    'instance_norm_channels_first',
    nk.InstanceNorm(axis=(1, 2), epsilon=1e-3, use_scale=False),
    (2, 2, 2, 6),
    reference.instance_norm(axis=(1, 2), epsilon=1e-3),
  ),
  Case(
    'instance_norm_no_batch',
    nk.InstanceNorm(batch_axis=(), use_bias=False),
    (6, 3),
    reference.instance_norm(batch_axis=()),
  ),
  Case(
    'rms_norm_offset',
    nk.RMSNorm(scale_offset=1.0),
    (4, 6),
    Offset(reference.rms_norm(), 1.0),
  ),
  Case(
    'batch_renorm_as_batch_norm',
    nk.BatchRenorm(r_max=1.0, d_max=0.0),
    (8, 3),
    family.batch_renorm(1.0, 0.0),
  ),
  Case(
    'batch_renorm',
    nk.BatchRenorm(r_max=1.5, d_max=0.3, momentum=0.9),
    (4, 5, 3),
    family.batch_renorm(1.5, 0.3, momentum=0.9),
  ),
  Case(
    'streaming_norm',
    nk.StreamingNorm(momentum=0.8),
    (4, 2, 3),
    family.streaming(momentum=0.8),
  ),
  Case(
    'filter_response_norm',
    nk.FilterResponseNorm(),
    (2, 5, 3),
    family.filter_response(),
  ),
  Case(
    'evonorm_s0',
    nk.EvoNormS0(num_groups=2),
    (2, 5, 4),
    family.evonorm_s0(num_groups=2),
  ),
  Case(
    'evonorm_b0',
    nk.EvoNormB0(momentum=0.9),
    (4, 5, 3),
    family.evonorm_b0(momentum=0.9),
  ),
  Case(
    'global_response_norm',
    nk.GlobalResponseNorm(),
    (2, 3, 2, 4),
    family.global_response(),
  ),
  Case(
    'global_response_norm_channels_first',
    nk.GlobalResponseNorm(
      axis=1, epsilon=1e-3, scale_offset=1.0, use_bias=False
    ),
    (2, 3, 5),
    Offset(family.global_response(1e-3, channels=(1,)), 1.0),
  ),
  Case('scale_norm', nk.ScaleNorm(), (4, 6), family.scale_norm()),
  Case(
    'gated_rms_norm',
    SelfGated(group_size=3),
    (4, 6),
    family.gated_rms_norm(group_size=3),
  ),
  Case(
    'gated_rms_norm_gate_first',
    SelfGated(norm_before_gate=False),
    (4, 6),
    family.gated_rms_norm(last=False),
  ),
  Case(
    'gated_rms_norm_without_gate',
    nk.GatedRMSNorm(),
    (4, 6),
    family.gated_rms_norm(has_gate=False),
  ),
  Case('dyt', nk.DyT(), (4, 6), family.dyt()),
  Case('derf', nk.Derf(), (4, 6), family.derf()),
  Case(
    'iterative_whitening',
    nk.IterativeWhitening(group_size=2, epsilon=1e-3),
    (16, 4),
    family.whitening(group_size=2, epsilon=1e-3),
  ),
)

# The first row of each norm, for the checks that take seconds.
NORMS = tuple({type(case.transform): case for case in CASES[::-1]}.values())


def draw(shape, dtype=jnp.float32, seed=0):
  """Numbers of mean one and standard deviation two."""
  rng = np.random.default_rng(seed)
  x = 1 + 2 * rng.standard_normal(shape)
  if jnp.issubdtype(dtype, jnp.complexfloating):
    x = x + 1j * rng.standard_normal(shape)
  return jax.device_put(np.asarray(x, dtype))  # compiles nothing


def draw_mask(shape, seed=0):
  """A mask that leaves out a fifth, a whole first row and first feature."""
  where = np.random.default_rng(seed).random(shape) < 0.8
  where[0] = False
  where[..., 0] = False
  return jax.device_put(where)


def precision(dtype):
  """A context in which JAX has the dtype."""
  return jax.enable_x64(jnp.finfo(dtype).bits == 64)
