"""RMS norm with a gate: no class of Flax's, so that it holds its own fields."""

from collections.abc import Callable
from dataclasses import KW_ONLY

from flax import linen as nn
from flax.linen import dtypes, initializers
from flax.typing import Initializer
import jax
import jax.numpy as jnp

from normkit import _types, norm
from normkit._docs import documented
from normkit._types import (
  Array,
  Axes,
  AxisName,
  DType,
  Groups,
  Implementation,
)
from normkit.linen._shared import Checked, scale_init
from normkit.norms import gated


@documented(nn.RMSNorm, gated.GatedRMSNorm)
class GatedRMSNorm(Checked):
  """RMS normalization with a gate; see `normkit.gated_rms_norm`.

  Attributes:
    scale_init: draws the parameter; its default makes a scale of one, and so
      draws 1 - scale_offset.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> x, gate = jnp.ones((4, 6)), jnp.zeros((4, 6))
    >>> norm = normkit.linen.GatedRMSNorm(norm_before_gate=False, group_size=3)
    >>> variables = norm.init(jax.random.key(0), x, gate)
    >>> norm.apply(variables, x, gate).shape
    (4, 6)
  """

  _: KW_ONLY
  norm_before_gate: bool = True
  activation: Callable[[Array], Array] | None = jax.nn.silu
  group_size: int | None = None
  axis: Axes = -1
  epsilon: float = 1e-6
  use_scale: bool = True
  scale_init: Initializer = initializers.ones
  scale_offset: float = 0.0
  round_before_scale: bool = False
  dtype: DType | None = None
  param_dtype: DType = jnp.float32
  axis_name: AxisName | None = None
  axis_index_groups: Groups | None = None
  implementation: Implementation | None = None

  @nn.compact
  def __call__(
    self, x: Array, gate: Array | None, *, mask: Array | None = None
  ) -> Array:
    """Normalizes x; `mask` is True where an element counts.

    The gate has the shape of x; None leaves it out.
    """
    axes = _types.check_axes(self.axis, x.ndim)
    shape = tuple(x.shape[a] for a in axes)
    scale = None
    if self.use_scale:
      scale = self.param('scale', scale_init(self), shape, self.param_dtype)
    dtype = dtypes.canonicalize_dtype(x, scale, dtype=self.dtype)
    options = norm.options_of(self, gated.gated_rms_norm)
    options |= {'axis': axes, 'dtype': dtype}
    where = _types.check_mask(mask, x.shape, cast=True)
    x = _types.as_inexact(x, dtype)
    return gated.gated_rms_norm(x, gate, scale, where=where, **options)
