"""Batch renormalization (Ioffe 2017): batch norm for small, skewed batches."""

from collections.abc import Callable
import dataclasses
from typing import Any, TypeAlias

import jax
from jax import lax
import jax.numpy as jnp

from normkit import _shards, _types, arguments, norm
from normkit._types import (
  Array,
  ArrayLike,
  Axes,
  AxisName,
  DType,
  Groups,
  Implementation,
  Scalar,
)
from normkit.affine import Arguments, affine, by_running, widened
from normkit.centred import Centred, centred
from normkit.kernels.rows import reciprocal_root
from normkit.moments import flatten, squeeze
from normkit.norm import NormParams
from normkit.norms._running import (
  BatchNormState,
  RunningOptions,
  as_count,
  check_average,
  check_several,
  check_state,
  running,
  update,
)
from normkit.pooling import pool

Limit: TypeAlias = float | Callable[[Array], Any] | None


def batch_renorm(
  x: ArrayLike,
  state: BatchNormState,
  scale: ArrayLike | None = None,
  bias: ArrayLike | None = None,
  *,
  train: bool,
  axis: Axes = -1,
  momentum: Scalar | None = 0.99,
  epsilon: Scalar = 1e-5,
  r_max: Limit = None,
  d_max: Limit = None,
  check_batch: bool = True,
  where: ArrayLike | None = None,
  axis_name: AxisName | None = None,
  axis_index_groups: Groups | None = None,
  dtype: DType | None = None,
  implementation: Implementation | None = None,
) -> tuple[Array, BatchNormState]:
  """Batch renormalization: in training nearly what evaluation will do.

    y = ((x - mean_B) / std_B * r + d) * scale + bias,
    r = clip(std_B / std, 1 / r_max, r_max),
    d = clip((mean_B - mean) / std, -d_max, d_max),

  mean_B and std_B = sqrt(var_B + epsilon) of the batch, mean and std the
  running ones before this batch. No gradient passes through r and d. Unclipped,
  y is what the running statistics would give; with r_max=1 and d_max=0 it is
  batch norm. Evaluation and the state are those of `batch_norm`, which averages
  variances, where the paper averages deviations.

  Args:
    x: array of any shape, float16, bfloat16, float32 or float64.
    state: the running statistics, of the shape of the feature axes.
    scale: of the shape of the feature axes, or of x's rank and broadcasting
      against it. None: one.
    bias: shaped as `scale` is. None: zero.
    train: normalize with the batch's statistics and update the running ones.
    axis: the feature axes, which keep statistics of their own.
    momentum: the share of the old running value that is kept, in [0, 1], a
      number or a scalar array, as in Flax. None weighs all updates equally.
    epsilon: added to the variance, not negative; a number or a scalar array.
    r_max: at least 1; a number, or a schedule, a function of the updates so far
      (as optax's are). None takes the paper's: 1 for 5,000 updates, then
      rising to 3 at 40,000. What a schedule gives below 1 counts as 1.
    d_max: at least 0, likewise. None: 0 for 5,000 updates, then rising to 5 at
      25,000.
    check_batch: raise in training where a feature has one element or none.
    where: boolean mask that broadcasts to x; elements where it is False change
      neither the statistics nor any other output.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    dtype: dtype of the result; None keeps x's.
    implementation: 'xla', or None to choose.

  Returns:
    `(y, state)`: y of the shape of x, and the state in the dtypes it had.

  Raises:
    TypeError, ValueError, NotImplementedError: as `batch_norm` does, for
      complex x, and if r_max is below 1 or d_max negative.

  References:
    Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in
    Batch-Normalized Models" (2017), algorithm 1 and section 4.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x = jnp.array([[1.], [3.]])
    >>> state = nk.BatchNormState(jnp.zeros(1), jnp.ones(1), jnp.zeros(1, int))
    >>> y, _ = nk.batch_renorm(x, state, train=True, r_max=9., d_max=9.)
    >>> y.round(2).tolist()  # as the running mean 0 and variance 1 would
    [[1.0], [3.0]]
  """
  x = arguments.check_real(x, 'there is no order to clip d by')
  features = _types.check_axes(axis, x.ndim)
  reduced = _types.other_axes(features, x.ndim)
  args = arguments.check_arguments(
    x, scale, bias, features, epsilon, where, dtype, implementation
  )
  _types.refuse_kernel(implementation, 'XLA reads x no more often')
  momentum = check_average(momentum, debias=False)
  check_state(state, x, features)
  old = running(state, x, features)
  if not _types.check_flag(train, 'train'):
    return by_running(x, args, old), state
  if check_batch:
    check_several(x.shape, reduced, axis_name, axis_index_groups, None)
  count = as_count(state.count)
  limits = [
    lax.expand_dims(limit.astype(args.statistics_dtype), reduced)
    for limit in (
      _limit(r_max, count, 'r_max', 1, _paper_r_max),
      _limit(d_max, count, 'd_max', 0, _paper_d_max),
    )
  ]

  def run(
    wide: Array, args: Arguments, old: Centred, limits: list[Array]
  ) -> tuple[Array, Centred]:
    stats = centred(wide, reduced, args.where, given=args.given)
    stats = pool(stats, axis_name, axis_index_groups)
    r, d = corrections(stats, old, args.epsilon, *limits)
    factor = r if args.scale is None else r * args.scale
    shift = d if args.scale is None else d * args.scale
    shift = shift if args.bias is None else shift + args.bias
    corrected = args._replace(scale=factor, bias=shift)
    return affine(wide, stats, corrected), stats

  y, stats = widened(run, x, args, old, limits)
  return y, update(state, squeeze(flatten(stats), reduced), momentum)


def corrections(
  batch: Centred, old: Centred, epsilon: Scalar, r_max: Array, d_max: Array
) -> tuple[Array, Array]:
  """r and d, constants to differentiation; 1 and 0 where no element counts."""
  batch, old = jax.tree.map(lax.stop_gradient, (batch, old))
  root = reciprocal_root(old.var, epsilon)
  distance = (batch.pivot - old.pivot) + batch.offset
  r = jnp.clip(jnp.sqrt(batch.var + epsilon) * root, 1 / r_max, r_max)
  d = jnp.clip(distance * root, -d_max, d_max)
  held = _shards.broadcast_like(batch.count, r) > 0
  return jnp.where(held, r, 1), jnp.where(held, d, 0)


def _paper_r_max(count: Array) -> Array:
  return jnp.clip(1 + 2 * (count - 5_000) / 35_000, 1, 3)


def _paper_d_max(count: Array) -> Array:
  return jnp.clip(5 * (count - 5_000) / 20_000, 0, 5)


def _limit(
  limit: Limit,
  count: Array,
  name: str,
  least: float,
  default: Callable[[Array], Array],
) -> Array:
  """The limit of each feature after so many updates."""
  limit = default if limit is None else limit
  if callable(limit):
    values = jnp.asarray(jax.vmap(limit)(count.reshape(-1)))
    if values.shape != (count.size,):
      raise ValueError(
        f'{name} must give one number for a count, got the shape '
        f'{values.shape[1:]}. Give a schedule such as optax.linear_schedule.'
      )
    return jnp.maximum(values, least).reshape(count.shape)
  return jnp.full(count.shape, _check_limit(limit, name, least))


def _check_limit(limit: Any, name: str, least: float) -> float:
  value = _types.check_real(limit, name)
  if not value >= least:
    raise ValueError(
      f'{name} must be {least} or more, got {limit!r}. With r_max=1 and '
      'd_max=0 it is batch norm; give a number, a schedule or None.'
    )
  return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchRenorm(RunningOptions):
  """Batch renormalization as a transform; see `batch_renorm`.

  Parameters and running statistics have the shape of the feature axes.

  Attributes:
    axis: the feature axes, which keep statistics of their own.
    momentum: the share of the old running value that is kept, in [0, 1]; a
      number or a scalar array.
    epsilon: added to the variance; a number or a scalar array.
    r_max: a number of at least 1, a schedule, or None for the paper's.
    d_max: a number of at least 0, a schedule, or None for the paper's.
    check_batch: raise in training where a feature has one element or none.
    use_scale: whether there is a scale.
    scale_offset: added to the parameter to make the scale; with 1 it starts at
      zero, as in Gemma.
    use_bias: whether there is a bias.
    param_dtype: dtype of the parameters that `init` makes.
    dtype: dtype of the result; None keeps x's.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    implementation: 'xla', or None to choose.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk, optax
    >>> x = jnp.ones((8, 3))
    >>> norm = nk.BatchRenorm(
    ...   r_max=optax.linear_schedule(1., 3., 1_000, 200),
    ...   d_max=optax.linear_schedule(0., 5., 1_000, 200),
    ... )
    >>> params, state = norm.init(x)
    >>> y, state = norm.apply(params, state, x, train=True)
    >>> state.count.tolist()
    [1, 1, 1]
  """

  r_max: Limit = None
  d_max: Limit = None
  check_batch: bool = True

  def __post_init__(self) -> None:
    super().__post_init__()
    for name, least in ('r_max', 1), ('d_max', 0):
      limit = getattr(self, name)
      if limit is not None and not callable(limit):
        _check_limit(limit, name, least)

  def apply(
    self,
    params: NormParams,
    state: BatchNormState,
    x: ArrayLike,
    *,
    train: bool,
    where: ArrayLike | None = None,
  ) -> tuple[Array, BatchNormState]:
    """Returns `(y, state)`, the state updated if `train`."""
    scale, bias = norm.check_params(params, self)
    options = norm.options_of(self, batch_renorm)
    return batch_renorm(
      x, state, scale, bias, train=train, where=where, **options
    )
