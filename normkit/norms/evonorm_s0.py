"""EvoNorm-S0 (Liu and others 2020): swish over a group's deviation."""

import dataclasses

import jax
import jax.numpy as jnp

from normkit import _types, arguments, norm
from normkit._types import (
  Array,
  ArrayLike,
  AxisName,
  DType,
  Groups,
  Implementation,
  Scalar,
)
from normkit.affine import Arguments, widened
from normkit.centred import centred, of_channels
from normkit.kernels.rows import reciprocal_root
from normkit.norm import EmptyState
from normkit.norms._evonorm import (
  EvoNormOptions,
  EvoNormParams,
  finish,
  prepare,
)
from normkit.pooling import pool


def evonorm_s0(
  x: ArrayLike,
  v: ArrayLike,
  scale: ArrayLike | None = None,
  bias: ArrayLike | None = None,
  *,
  num_groups: int = 32,
  epsilon: Scalar = 1e-5,
  where: ArrayLike | None = None,
  axis_name: AxisName | None = None,
  axis_index_groups: Groups | None = None,
  dtype: DType | None = None,
  implementation: Implementation | None = None,
) -> Array:
  """Swish over the deviation of a group: no batch statistics.

    y = x * sigmoid(v * x) / sqrt(Var[x] + epsilon) * scale + bias,

  the variance of each group of channels of each example. It is norm and
  activation in one: use none after it.

  Args:
    x: array (batch, ..., channels), float16, bfloat16, float32 or float64.
    v: one a channel, or of x's rank and broadcasting against it.
    scale: shaped as `v` is. None: one.
    bias: shaped as `v` is. None: zero.
    num_groups: how many groups of contiguous channels; it divides their number.
    epsilon: added to the variance, not negative; a number or a scalar array.
    where: boolean mask that broadcasts to x; elements where it is False change
      no other output.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    dtype: dtype of the result; None keeps x's.
    implementation: 'xla', or None to choose.

  Returns:
    An array of the shape of x.

  Raises:
    TypeError, ValueError: as `group_norm` does, and for complex x.

  References:
    Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers"
    (2020), table 2.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x = jnp.array([[[2.], [0.]]])
    >>> nk.evonorm_s0(x, jnp.full(1, 99.), num_groups=1, epsilon=0.).tolist()
    [[[2.0], [0.0]]]
  """
  x, slope, args = prepare(
    x, v, scale, bias, epsilon, where, dtype, implementation
  )
  last = x.ndim - 1
  arguments.check_groups(x.shape, (last,), num_groups)
  _types.check_not_empty(x.shape, tuple(range(1, x.ndim)))

  def run(wide: Array, args: Arguments, slope: Array) -> Array:
    groups, axes = (last, num_groups), tuple(range(1, last))
    stats = centred(wide, axes, args.where, given=args.given, groups=groups)
    stats = pool(stats, axis_name, axis_index_groups)
    stats = of_channels(stats, last, wide)
    root = reciprocal_root(stats.var, args.epsilon)
    root = jnp.where(stats.count > 0, root, 0)
    return finish(_swish, wide, slope, (root,), args)

  y: Array = widened(run, x, args, slope)
  return y


def _swish(x: Array, slope: Array, root: Array) -> Array:
  return x * jax.nn.sigmoid(slope * x) * root


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvoNormS0(EvoNormOptions):
  """EvoNorm-S0 as a transform; see `evonorm_s0`.

  Parameters have the shape of the last axis, the channels; there is no state.

  Attributes:
    num_groups: how many groups of contiguous channels.
    epsilon: added to the variance; a number or a scalar array.
    use_scale, scale_offset, use_bias, param_dtype, dtype, axis_name,
      axis_index_groups: as `GroupNorm` has them.
    implementation: 'xla', or None to choose.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x = jnp.ones((2, 4, 4, 6))
    >>> norm = nk.EvoNormS0(num_groups=3)
    >>> params, state = norm.init(x)
    >>> y, state = norm.apply(params, state, x, train=True)
    >>> y.shape
    (2, 4, 4, 6)
  """

  num_groups: int = 32

  def init(
    self, x: Array | jax.ShapeDtypeStruct
  ) -> tuple[EvoNormParams, EmptyState]:
    """Returns `(params, state)` for inputs like x, an array or its shape."""
    norm.check_like(x)
    arguments.check_groups(x.shape, (len(x.shape) - 1,), self.num_groups)
    return self.init_params(x), EmptyState()

  def apply(
    self,
    params: EvoNormParams,
    state: EmptyState,
    x: ArrayLike,
    *,
    train: bool,
    where: ArrayLike | None = None,
  ) -> tuple[Array, EmptyState]:
    """Returns `(y, state)`; `train` makes no difference."""
    del train
    norm.check_empty_state(state)
    options = norm.options_of(self, evonorm_s0)
    v, scale, bias = norm.check_params(params, self, EvoNormParams)
    return evonorm_s0(x, v, scale, bias, where=where, **options), state
