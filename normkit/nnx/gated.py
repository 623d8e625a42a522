"""RMS norm with a gate: no class of Flax's, so that it holds its own fields."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from flax.nnx.nn import dtypes, initializers
from flax.typing import Initializer
import jax
import jax.numpy as jnp
import numpy as np

from normkit import _types, _words, arguments, norm
from normkit._docs import documented
from normkit._types import (
  Array,
  Axes,
  AxisName,
  DType,
  Groups,
  Implementation,
)
from normkit.nnx._shared import as_features, with_offset
from normkit.norms import gated


@documented(nnx.RMSNorm, gated.GatedRMSNorm)
class GatedRMSNorm(_words.OwnWords, nnx.Module):
  """RMS normalization with a gate; see `normkit.gated_rms_norm`.

  Args:
    num_features: the number of features; of several axes, the product.
    scale_init: draws the parameter; its default makes a scale of one, and so
      draws 1 - scale_offset.

  Attributes:
    scale: an `nnx.Param`, or None.

  Examples:
    >>> import jax.numpy as jnp, normkit.nnx
    >>> from flax import nnx
    >>> norm = normkit.nnx.GatedRMSNorm(6, rngs=nnx.Rngs(0))
    >>> x, gate = jnp.ones((4, 6)), jnp.zeros((4, 6))
    >>> norm(x, gate).shape
    (4, 6)
  """

  def __init__(
    self,
    num_features: int,
    *,
    norm_before_gate: bool = True,
    activation: Callable[[Array], Array] | None = jax.nn.silu,
    group_size: int | None = None,
    axis: Axes = -1,
    epsilon: float = 1e-6,
    use_scale: bool = True,
    scale_init: Initializer = initializers.ones,
    scale_offset: float = 0.0,
    round_before_scale: bool = False,
    dtype: DType | None = None,
    param_dtype: DType = jnp.float32,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups | None = None,
    implementation: Implementation | None = None,
    scale_metadata: dict[str, Any] | None = None,
    rngs: nnx.Rngs,
  ) -> None:
    width = 'The width is num_features, the first argument.'
    arguments.check_not_width(epsilon, width)
    self.num_features = num_features
    self.norm_before_gate = norm_before_gate
    self.activation = activation
    self.group_size = group_size
    self.axis = _types.hashable(axis)
    self.epsilon = epsilon
    self.scale_offset = scale_offset
    self.round_before_scale = round_before_scale
    self.dtype = dtype
    self.axis_name = axis_name
    self.axis_index_groups = _types.hashable(axis_index_groups)
    self.implementation = implementation
    self.scale: nnx.Param[Array] | None = nnx.data(None)
    if use_scale:
      options = with_offset({'scale_init': scale_init}, scale_offset)
      key, shape = rngs.params(), (num_features,)
      value = options['scale_init'](key, shape, param_dtype)
      self.scale = nnx.Param(value, **scale_metadata or {})

  def __call__(
    self, x: Array, gate: Array | None, *, mask: Array | None = None
  ) -> Array:
    """Normalizes x; `mask` is True where an element counts.

    The gate has the shape of x; None leaves it out.
    """
    axes = _types.check_axes(self.axis, np.ndim(x))
    scale = None if self.scale is None else self.scale[...]
    dtype = dtypes.canonicalize_dtype(x, scale, dtype=self.dtype)
    options = norm.options_of(self, gated.gated_rms_norm)
    options |= {'axis': axes, 'dtype': dtype}
    where = _types.check_mask(mask, np.shape(x), cast=False)
    x = _types.as_inexact(x, dtype)
    scale = None if scale is None else as_features(scale, x, axes)
    return gated.gated_rms_norm(x, gate, scale, where=where, **options)
