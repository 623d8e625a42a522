"""Iterative whitening (Huang and others 2019): decorrelated batch norm."""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from normkit import _shards, _types, arguments, norm
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
from normkit.norm import NormParams
from normkit.norms._covariance import covariance, inverse_root, whitened
from normkit.norms._running import (
  as_count,
  check_average,
  check_several,
  shares,
)
from normkit.pooling import pool, pool_sum


@_types.serializable
class WhiteningState(NamedTuple):
  """Running statistics of whitening.

  Attributes:
    mean: running means, one a channel, zeros at first.
    whitening: running whitening matrices, (groups, size, size), identities at
      first.
    count: int32, how many updates there were.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> _, state = nk.IterativeWhitening(group_size=2).init(jnp.ones((8, 4)))
    >>> state.whitening.shape
    (2, 2, 2)
  """

  mean: Array
  whitening: Array
  count: Array  # type: ignore[assignment]


def iterative_whitening(
  x: ArrayLike,
  state: WhiteningState,
  scale: ArrayLike | None = None,
  bias: ArrayLike | None = None,
  *,
  train: bool,
  n_steps: int = 5,
  momentum: Scalar | None = 0.9,
  epsilon: Scalar = 1e-5,
  where: ArrayLike | None = None,
  axis_name: AxisName | None = None,
  axis_index_groups: Groups | None = None,
  dtype: DType | None = None,
  implementation: Implementation | None = None,
) -> tuple[Array, WhiteningState]:
  """Batch norm that decorrelates: the channels of a group become white.

    y = (W (x - mean)) * scale + bias,  W = P_T / sqrt(tr S),
    P_0 = I,  P_k = (3 P_{k-1} - P_{k-1}^3 S / tr S) / 2,

  S = Cov[x] + epsilon I the covariance of the channels of a group over the
  batch and all places. P_T tends to the inverse square root of S / tr S; few
  steps whiten the strong directions and leave those that hardly vary, so that a
  batch of fewer elements than channels does no harm. In evaluation mean and W
  are the running ones.

  Args:
    x: array (..., channels), float16, bfloat16, float32 or float64.
    state: the running statistics; it tells the size of the groups.
    scale: one a channel, or of x's rank and broadcasting against it. None: one.
    bias: shaped as `scale` is. None: zero.
    train: whiten by the batch's statistics and update the running ones.
    n_steps: Newton's iterations, T; the paper takes 3 to 7.
    momentum: the share of the old running value that is kept, in [0, 1], a
      number or a scalar array, as in Flax. None weighs all updates equally.
    epsilon: added to the variances, positive; a number or a scalar array.
    where: boolean mask that broadcasts to x; an element where it is False
      counts as the mean. Of two channels, the places where both are known tell
      their covariance, over the geometric mean of their counts.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    dtype: dtype of the result; None keeps x's.
    implementation: 'xla', or None to choose.

  Returns:
    `(y, state)`: y of the shape of x, and the state in the dtypes it had.

  Raises:
    TypeError: if x is complex or an integer, `train` not a bool.
    ValueError: if a shape does not fit, n_steps is below 1, epsilon is zero,
      momentum lies outside [0, 1], or a channel has one element or none.

  References:
    Huang, Zhou, Zhu, Liu and Shao, "Iterative Normalization: Beyond
    Standardization towards Efficient Whitening" (2019), algorithms 1 and 2.
    Coupled iteration: Higham, "Functions of Matrices" (2008), equation 6.35.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit as nk
    >>> x = jax.random.normal(jax.random.key(0), (100, 2))
    >>> x = x.at[:, 1].add(x[:, 0])
    >>> norm = nk.IterativeWhitening(group_size=2)
    >>> params, state = norm.init(x)
    >>> y, _ = nk.iterative_whitening(x, state, train=True)
    >>> jnp.cov(y.T, bias=True).round(2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
  """
  x = arguments.check_real(x, 'covariances are real here')
  last = x.ndim - 1
  args = arguments.check_arguments(
    x, scale, bias, (last,), epsilon, where, dtype, implementation
  )
  _types.refuse_kernel(implementation, 'whitening has none')
  momentum = check_average(momentum, debias=False)
  check_state(state, x)
  _check_steps(n_steps, args.epsilon)

  def applied(wide: Array, args: Arguments, means: Any, matrix: Array) -> Array:
    return whitened(_shards.unshard(wide, last), means, matrix, args, wide)

  if not _types.check_flag(train, 'train'):
    mean = lax.expand_dims(state.mean, range(last))
    means = mean, jnp.zeros_like(mean)
    y = widened(applied, x, args, means, state.whitening)
    return y, state
  axes = tuple(range(last))
  check_several(x.shape, axes, axis_name, axis_index_groups, None)
  pooled = axis_name, axis_index_groups
  groups, size, _ = state.whitening.shape

  def run(wide: Array, args: Arguments) -> tuple[Array, Centred, Array]:
    whole = _shards.unshard(wide, last)
    stats = pool(centred(whole, axes, args.where, given=args.given), *pooled)
    covariances = covariance(whole, stats, args.where, groups)
    covariances = pool_sum(covariances, *pooled)
    matrix = inverse_root(covariances, args.epsilon, n_steps)
    means = stats.pivot, stats.offset
    return whitened(whole, means, matrix, args, wide), stats, matrix

  y, stats, matrix = widened(run, x, args)
  batch = squeeze(flatten(stats), axes)
  held = batch.count > 0
  old_count = as_count(state.count)
  count = old_count + 1
  weights = shares(count.astype(batch.mean.dtype), momentum, debias=False)

  def moved(old: Array, new: Array, held: Array) -> Array:
    keep, share = weights
    held, new = (_shards.broadcast_like(a, old) for a in (held, new))
    return jnp.where(held, keep * old + share * new, old).astype(old.dtype)

  known = jnp.all(held.reshape(groups, size), 1)[:, None, None]
  return y, WhiteningState(
    moved(state.mean, batch.mean, held),
    moved(state.whitening, matrix, known),
    jnp.where(jnp.any(held), count, old_count),
  )


def check_state(state: Any, x: Array) -> None:
  """Raises unless the state holds means and matrices for the channels of x."""
  norm.check_kind(state, WhiteningState, 'state')
  shapes = jax.tree.map(np.shape, state)
  channels = x.shape[-1] if x.ndim else 0
  if (
    len(shapes.whitening) != 3
    or shapes.mean != (channels,)
    or shapes.whitening[0] * shapes.whitening[1] != channels
    or shapes.whitening[1] != shapes.whitening[2]
  ):
    raise ValueError(
      'state must be WhiteningState(mean, whitening, count) for the '
      f'{channels} channels of x, got {shapes}. Take it from init with an '
      'input of this shape.'
    )


def _check_steps(n_steps: Any, epsilon: Scalar) -> None:
  if not _types.is_integer(n_steps) or n_steps < 1:
    raise ValueError(f'n_steps must be 1 or more, got {n_steps!r}.')
  if not _types.is_array(epsilon) and epsilon == 0:
    raise ValueError(
      'epsilon=0: a batch of rank too low has no inverse. Give 1e-5 or so.'
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class IterativeWhitening(norm.CenteredOptions):
  """Iterative whitening as a transform; see `iterative_whitening`.

  Parameters and running means have the shape of the last axis, the channels.

  Attributes:
    group_size: how many neighbouring channels are whitened together; it divides
      their number. The cost of a step grows with its square. None: all.
    n_steps: Newton's iterations.
    momentum: the share of the old running value that is kept, in [0, 1]; a
      number or a scalar array.
    epsilon: added to the variances; a number or a scalar array.
    use_scale: whether there is a scale.
    scale_offset: added to the parameter to make the scale.
    use_bias: whether there is a bias.
    param_dtype: dtype of the parameters that `init` makes.
    dtype: dtype of the result; None keeps x's.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    implementation: 'xla', or None to choose.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x = jnp.ones((8, 4, 4, 6))
    >>> norm = nk.IterativeWhitening(group_size=3)
    >>> params, state = norm.init(x)
    >>> y, state = norm.apply(params, state, x, train=True)
    >>> y.shape, int(state.count)
    ((8, 4, 4, 6), 1)
  """

  group_size: int | None = 64
  n_steps: int = 5
  momentum: Scalar | None = 0.9
  epsilon: Scalar = 1e-5

  def __post_init__(self) -> None:
    super().__post_init__()
    _check_steps(self.n_steps, self.epsilon)

  def init(
    self, x: Array | jax.ShapeDtypeStruct
  ) -> tuple[NormParams, WhiteningState]:
    """Returns `(params, state)` for inputs like x, an array or its shape."""
    params = norm.init_params(x, -1, self)
    channels = x.shape[-1]
    size = channels if self.group_size is None else self.group_size
    if not _types.is_integer(size) or size < 1 or channels % size:
      raise ValueError(
        f'group_size={size} does not divide the {channels} channels of x. Give '
        f'a divisor of {channels}, or None to whiten all of them together.'
      )
    dtype = _types.statistics_dtype(x.dtype)
    shape = channels // size, size, size
    return params, WhiteningState(
      jnp.zeros(channels, dtype),
      jnp.broadcast_to(jnp.eye(size, dtype=dtype), shape),
      jnp.zeros((), jnp.int32),
    )

  def apply(
    self,
    params: NormParams,
    state: WhiteningState,
    x: ArrayLike,
    *,
    train: bool,
    where: ArrayLike | None = None,
  ) -> tuple[Array, WhiteningState]:
    """Returns `(y, state)`, the state updated if `train`."""
    scale, bias = norm.check_params(params, self)
    options = norm.options_of(self, iterative_whitening)
    return iterative_whitening(
      x, state, scale, bias, train=train, where=where, **options
    )
