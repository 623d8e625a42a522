"""EvoNorm-B0 (Liu and others 2020): over the larger of two deviations."""

import dataclasses

import jax
import jax.numpy as jnp

from normkit import _shards, _types, norm
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
from normkit.centred import Centred, centred
from normkit.moments import flatten, squeeze
from normkit.norms._evonorm import (
  EvoNormOptions,
  EvoNormParams,
  finish,
  prepare,
)
from normkit.norms._pointwise import root
from normkit.norms._running import (
  BatchNormState,
  check_average,
  check_several,
  check_state,
  init_state,
  running,
  update,
)
from normkit.pooling import pool


def evonorm_b0(
  x: ArrayLike,
  state: BatchNormState,
  v: ArrayLike,
  scale: ArrayLike | None = None,
  bias: ArrayLike | None = None,
  *,
  train: bool,
  momentum: Scalar | None = 0.99,
  epsilon: Scalar = 1e-5,
  check_batch: bool = True,
  where: ArrayLike | None = None,
  axis_name: AxisName | None = None,
  axis_index_groups: Groups | None = None,
  dtype: DType | None = None,
  implementation: Implementation | None = None,
) -> tuple[Array, BatchNormState]:
  """Over the larger of two deviations, the batch's and the example's.

    y = x / max(sqrt(Var_B[x] + epsilon), v * x + sqrt(Var_I[x] + epsilon))
        * scale + bias,

  Var_B of each channel over batch and places, in evaluation the running one,
  and Var_I of each channel of each example. It is norm and activation in one:
  use none after it.

  Args:
    x: array (batch, ..., channels), float16, bfloat16, float32 or float64.
    state: the running statistics, one number a channel.
    v: one a channel, or of x's rank and broadcasting against it.
    scale: shaped as `v` is. None: one.
    bias: shaped as `v` is. None: zero.
    train: take the batch's variance and update the running one.
    momentum: the share of the old running value that is kept, in [0, 1], a
      number or a scalar array, as in Flax. None weighs all updates equally.
    epsilon: added to both variances, not negative; a number or a scalar array.
    check_batch: raise in training where a channel has one element or none.
    where: boolean mask that broadcasts to x; elements where it is False change
      neither the statistics nor any other output.
    axis_name: names of mapped axes over which Var_B is pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    dtype: dtype of the result; None keeps x's.
    implementation: 'xla', or None to choose.

  Returns:
    `(y, state)`: y of the shape of x, and the state in the dtypes it had.

  Raises:
    TypeError, ValueError: as `batch_norm` does, and for complex x.

  References:
    Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers"
    (2020), table 2.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> state = nk.BatchNormState(jnp.zeros(1), jnp.ones(1), jnp.zeros(1, int))
    >>> x = jnp.array([[[2.], [0.]]])
    >>> v = jnp.zeros(1)
    >>> nk.evonorm_b0(x, state, v, train=False, epsilon=0.)[0].tolist()
    [[[2.0], [0.0]]]
  """
  x, slope, args = prepare(
    x, v, scale, bias, epsilon, where, dtype, implementation
  )
  last = x.ndim - 1
  momentum = check_average(momentum, debias=False)
  check_state(state, x, (last,), is_counted=momentum is None)
  is_training = _types.check_flag(train, 'train')
  reduced = tuple(range(last))
  if is_training and check_batch:
    check_several(x.shape, reduced, axis_name, axis_index_groups, None)

  def run(
    wide: Array, args: Arguments, slope: Array, old: Centred
  ) -> tuple[Array, Centred]:
    batch = old
    if is_training:
      batch = centred(wide, reduced, args.where, given=args.given)
      batch = pool(batch, axis_name, axis_index_groups)
    each = centred(wide, tuple(range(1, last)), args.where, given=args.given)
    roots = (root(v + args.epsilon) for v in (batch.var, each.var))
    statistics = *roots, batch.count > 0
    return finish(_over_larger, wide, slope, statistics, args), batch

  y, batch = widened(run, x, args, slope, running(state, x, (last,)))
  if is_training:
    state = update(state, squeeze(flatten(batch), reduced), momentum)
  return y, state


def _over_larger(
  x: Array, slope: Array, batch: Array, own: Array, held: Array
) -> Array:
  deviation = slope * x + own
  # As large as x no sooner than its gradients are to be summed over devices.
  batch = _shards.broadcast_like(_shards.vary(batch, deviation), deviation)
  deviation = jnp.maximum(batch, deviation)
  held = held & (deviation > 0)
  return jnp.where(held, x / jnp.where(held, deviation, 1), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvoNormB0(EvoNormOptions):
  """EvoNorm-B0 as a transform; see `evonorm_b0`.

  Parameters and running statistics have the shape of the last axis.

  Attributes:
    momentum: the share of the old running value that is kept, in [0, 1]; a
      number or a scalar array.
    check_batch: raise in training where a channel has one element or none.
    epsilon: added to the variances; a number or a scalar array.
    use_scale, scale_offset, use_bias, param_dtype, dtype, axis_name,
      axis_index_groups: as `BatchNorm` has them.
    implementation: 'xla', or None to choose.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x = jnp.ones((2, 4, 4, 3))
    >>> norm = nk.EvoNormB0(momentum=0.9)
    >>> params, state = norm.init(x)
    >>> y, state = norm.apply(params, state, x, train=True)
    >>> state.count.tolist()
    [1, 1, 1]
  """

  momentum: Scalar | None = 0.99
  check_batch: bool = True

  def init(
    self, x: Array | jax.ShapeDtypeStruct
  ) -> tuple[EvoNormParams, BatchNormState]:
    """Returns `(params, state)` for inputs like x, an array or its shape."""
    return self.init_params(x), init_state(x, -1)

  def apply(
    self,
    params: EvoNormParams,
    state: BatchNormState,
    x: ArrayLike,
    *,
    train: bool,
    where: ArrayLike | None = None,
  ) -> tuple[Array, BatchNormState]:
    """Returns `(y, state)`, the state updated if `train`."""
    v, scale, bias = norm.check_params(params, self, EvoNormParams)
    options = norm.options_of(self, evonorm_b0)
    return evonorm_b0(
      x, state, v, scale, bias, train=train, where=where, **options
    )
