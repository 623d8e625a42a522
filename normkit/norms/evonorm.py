"""EvoNorms (Liu and others 2020): norm and activation found by search."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from normkit import _types, norm
from normkit._types import (
  Array,
  ArrayLike,
  AxisName,
  DType,
  Groups,
  Implementation,
)
from normkit.affine import Arguments
from normkit.kernels.rows import reciprocal_root
from normkit.moments import (
  Centred,
  centred,
  flatten,
  merge_channels,
  pool,
  spread,
  squeeze,
)
from normkit.norm import EmptyState, NormParams
from normkit.running import (
  BatchNormState,
  check_average,
  check_several,
  check_state,
  init_state,
  running,
  update,
)


class EvoNormParams(NamedTuple):
  """The parameters of an EvoNorm, one number a channel.

  Attributes:
    v: the slope inside of the nonlinearity.
    scale: what its result is multiplied by, or None.
    bias: what is added after that, or None.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> params, _ = nk.EvoNormS0(num_groups=2).init(jnp.ones((2, 5, 5, 4)))
    >>> params.v.tolist()
    [1.0, 1.0, 1.0, 1.0]
  """

  v: Array
  scale: Array | None = None
  bias: Array | None = None


def evonorm_s0(
  x: ArrayLike,
  v: ArrayLike,
  scale: ArrayLike | None = None,
  bias: ArrayLike | None = None,
  *,
  num_groups: int = 32,
  epsilon: float = 1e-5,
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
    epsilon: added to the variance, not negative.
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
  x, slope, args = _prepare(
    x, v, scale, bias, epsilon, where, dtype, implementation
  )
  last = x.ndim - 1
  norm.check_groups(x.shape, (last,), num_groups)
  _types.check_not_empty(x.shape, tuple(range(1, x.ndim)))
  stats = centred(x, tuple(range(1, last)), args.where)
  stats = merge_channels(stats, last, num_groups)
  stats = pool(stats, axis_name, axis_index_groups)
  stats = Centred(*(spread(s, last, x.shape[last]) for s in stats))
  root = reciprocal_root(stats.var, args.epsilon)
  root = jnp.where(stats.count > 0, root, 0)
  return _finish(_swish, x, slope, (root,), args)


def evonorm_b0(
  x: ArrayLike,
  state: BatchNormState,
  v: ArrayLike,
  scale: ArrayLike | None = None,
  bias: ArrayLike | None = None,
  *,
  train: bool,
  momentum: float | None = 0.99,
  epsilon: float = 1e-5,
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
    momentum: the share of the old running value that is kept, in [0, 1], as in
      Flax. None weighs all updates equally.
    epsilon: added to both variances, not negative.
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
  x, slope, args = _prepare(
    x, v, scale, bias, epsilon, where, dtype, implementation
  )
  last = x.ndim - 1
  momentum = check_average(momentum, debias=False)
  check_state(state, x, (last,))
  is_training = _types.check_flag(train, 'train')
  reduced = tuple(range(last))
  if is_training and check_batch:
    check_several(x.shape, reduced, axis_name, axis_index_groups, None)
  if is_training:
    batch = pool(centred(x, reduced, args.where), axis_name, axis_index_groups)
    state = update(
      state,
      squeeze(flatten(batch), reduced),
      momentum,
    )
  else:
    batch = running(state, x, (last,))
  each = centred(x, tuple(range(1, last)), args.where)
  roots = (_root(v + args.epsilon) for v in (batch.var, each.var))
  statistics = *roots, batch.count > 0
  return _finish(_over_larger, x, slope, statistics, args), state


def _swish(x: Array, slope: Array, root: Array) -> Array:
  return x * jax.nn.sigmoid(slope * x) * root


def _over_larger(
  x: Array, slope: Array, batch: Array, own: Array, held: Array
) -> Array:
  deviation = jnp.maximum(batch, slope * x + own)
  held = held & (deviation > 0)
  return jnp.where(held, x / jnp.where(held, deviation, 1), 0)


def _finish(
  form: Callable[..., Array],
  x: Array,
  slope: Array,
  statistics: tuple[Array, ...],
  args: Arguments,
) -> Array:
  """Checkpointed: x is kept for the backward, in its own dtype, alone."""

  def run(x: Array, slope: Any, statistics: Any, args: Any) -> Array:
    scale, bias, where = args
    x = norm.known(x, where, wide)
    return norm.scaled(form(x, slope, *statistics), scale, bias, dtype)

  wide, dtype = args.statistics_dtype, args.dtype
  given = args.scale, args.bias, args.where
  y: Array = jax.checkpoint(run, prevent_cse=False)(x, slope, statistics, given)
  return y


def _root(var: Array) -> Array:
  """A square root whose derivative at zero is zero."""
  positive = var > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, var, 1)), 0)


def _prepare(
  x: ArrayLike,
  v: ArrayLike,
  scale: ArrayLike | None,
  bias: ArrayLike | None,
  epsilon: float,
  where: ArrayLike | None,
  dtype: DType | None,
  implementation: Implementation | None,
) -> tuple[Array, Array, Arguments]:
  x = norm.check_real(x, 'the nonlinearity is not')
  if x.ndim < 2:
    raise ValueError(
      f'x must be (batch, ..., channels), got the shape {x.shape}. Add the '
      'axis of the batch, for example x[None].'
    )
  channels = (x.ndim - 1,)
  args = norm.check_arguments(
    x, scale, bias, channels, epsilon, where, dtype, implementation
  )
  _types.refuse_kernel(implementation, 'EvoNorm has none')
  slope = norm.check_feature(v, x.shape, channels, 'v')
  if slope is None:
    raise TypeError('v must be an array, one number a channel, got None.')
  return x, slope, args


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EvoNorm(norm.CenteredOptions):
  """What both share: parameters, one number a channel."""

  epsilon: float = 1e-5

  def _init_params(self, x: Array | jax.ShapeDtypeStruct) -> EvoNormParams:
    v = jnp.ones(x.shape[-1:], self.param_dtype)
    return EvoNormParams(v, *norm.init_params(x, -1, self))

  def _check_params(self, params: Any) -> EvoNormParams:
    if not isinstance(params, EvoNormParams):
      raise ValueError(
        'params must be EvoNormParams as init of this transform makes them, '
        f'got {jax.tree.structure(params)}.'
      )
    scaled = norm.check_params(NormParams(*params[1:]), self)
    return EvoNormParams(params.v, *scaled)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvoNormS0(_EvoNorm):
  """EvoNorm-S0 as a transform; see `evonorm_s0`.

  Parameters have the shape of the last axis, the channels; there is no state.

  Attributes:
    num_groups: how many groups of contiguous channels.
    epsilon: added to the variance.
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
    norm.check_groups(x.shape, (len(x.shape) - 1,), self.num_groups)
    return self._init_params(x), EmptyState()

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
    options = dict(self.shared(), num_groups=self.num_groups, where=where)
    return evonorm_s0(x, *self._check_params(params), **options), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvoNormB0(_EvoNorm):
  """EvoNorm-B0 as a transform; see `evonorm_b0`.

  Parameters and running statistics have the shape of the last axis.

  Attributes:
    momentum: the share of the old running value that is kept, in [0, 1].
    check_batch: raise in training where a channel has one element or none.
    epsilon: added to the variances.
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

  momentum: float | None = 0.99
  check_batch: bool = True

  def init(
    self, x: Array | jax.ShapeDtypeStruct
  ) -> tuple[EvoNormParams, BatchNormState]:
    """Returns `(params, state)` for inputs like x, an array or its shape."""
    return self._init_params(x), init_state(x, -1)

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
    v, scale, bias = self._check_params(params)
    options = dict(
      self.shared(),
      momentum=self.momentum,
      check_batch=self.check_batch,
      where=where,
    )
    return evonorm_b0(x, state, v, scale, bias, train=train, **options)
