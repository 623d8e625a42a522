"""Streaming normalization: by moving averages that include this batch.

For batches of any size, of one element too: online learning, reinforcement
learning, detection with a few images a device.
"""

import dataclasses

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
from normkit.moments import flatten, squeeze
from normkit.norm import NormParams
from normkit.norms._running import (
  BatchNormState,
  RunningOptions,
  as_count,
  check_average,
  check_holds_mean,
  check_state,
  running,
  shares,
  update,
)
from normkit.pooling import merge, pool


def streaming_norm(
  x: ArrayLike,
  state: BatchNormState,
  scale: ArrayLike | None = None,
  bias: ArrayLike | None = None,
  *,
  train: bool,
  axis: Axes = -1,
  momentum: Scalar | None = 0.99,
  epsilon: Scalar = 1e-5,
  debias: bool = False,
  where: ArrayLike | None = None,
  axis_name: AxisName | None = None,
  axis_index_groups: Groups | None = None,
  dtype: DType | None = None,
  implementation: Implementation | None = None,
) -> tuple[Array, BatchNormState]:
  """Batch norm by the running statistics, in training too.

    y = (x - mean) / sqrt(var + epsilon) * scale + bias,

  mean and var the running ones, which in training have first taken in this
  batch: with a = 1 - momentum and the batch's mean_B and var_B,

    mean' = mean + a * (mean_B - mean),
    var' = (1 - a) * var + a * var_B + a * (1 - a) * (mean_B - mean)^2.

  The last term lets batches of one element, whose own variance is zero, tell
  the variance between them. Gradients pass through this batch's share of the
  statistics; what earlier batches left is constant. Training and evaluation
  differ by one update.

  Args:
    x: array of any shape, float16, bfloat16, float32, float64 or complex.
    state: the running statistics, of the shape of the feature axes.
    scale: of the shape of the feature axes, or of x's rank and broadcasting
      against it. None: one.
    bias: shaped as `scale` is. None: zero.
    train: take the batch into the statistics first.
    axis: the feature axes, which keep statistics of their own.
    momentum: the share of the old running value that is kept, in [0, 1], a
      number or a scalar array, as in Flax. None weighs all batches equally.
    epsilon: added to the variance, not negative; a number or a scalar array.
    debias: forget the initial values: the first batch's statistics are its own.
    where: boolean mask that broadcasts to x; elements where it is False change
      neither the statistics nor any other output.
    axis_name: names of mapped axes over which batches are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    dtype: dtype of the result; None keeps x's.
    implementation: 'xla', or None to choose.

  Returns:
    `(y, state)`: y of the shape of x, and the state in the dtypes it had.

  Raises:
    TypeError, ValueError, NotImplementedError: as `batch_norm` does; a batch of
      one element is none of the reasons.

  References:
    Liao, Kawaguchi and Poggio, "Streaming Normalization: Towards Simpler and
    More Biologically-plausible Normalizations for Online and Recurrent
    Learning" (2016), whose short-term statistics are not used here. The update
    of the variance is that of Chan, Golub and LeVeque (1979), equation 2.1,
    with shares for counts.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> state = nk.BatchNormState(jnp.zeros(1), jnp.ones(1), jnp.zeros(1, int))
    >>> y, state = nk.streaming_norm(jnp.array([[2.]]), state, train=True,
    ...                              momentum=.5, epsilon=0.)
    >>> state.mean.tolist(), state.var.tolist()
    ([1.0], [1.5])
  """
  x = _types.check_input(x)
  features = _types.check_axes(axis, x.ndim)
  reduced = _types.other_axes(features, x.ndim)
  args = arguments.check_arguments(
    x, scale, bias, features, epsilon, where, dtype, implementation
  )
  _types.refuse_kernel(implementation, 'XLA reads x no more often')
  momentum = check_average(momentum, debias)
  check_state(state, x, features)
  old = running(state, x, features)
  if not _types.check_flag(train, 'train'):
    return by_running(x, args, old), state
  check_holds_mean(state, x)
  _types.check_not_empty(x.shape, reduced)
  count = as_count(state.count) + 1
  real = _types.real_dtype(args.statistics_dtype)
  weights = [
    jnp.broadcast_to(jnp.asarray(w, real), count.shape).reshape(old.var.shape)
    for w in shares(count.astype(real), momentum, debias)
  ]

  def run(
    wide: Array, args: Arguments, old: Centred, weights: list[Array]
  ) -> tuple[Array, Centred]:
    batch = centred(wide, reduced, args.where, given=args.given)
    batch = pool(batch, axis_name, axis_index_groups)
    stats = _weighted(Centred(*map(lax.stop_gradient, old)), batch, *weights)
    return affine(wide, stats, args), stats

  y, stats = widened(run, x, args, old, weights)
  return y, update(state, squeeze(flatten(stats), reduced), momentum=0.0)


def _weighted(
  old: Centred, batch: Centred, keep: Array, share: Array
) -> Centred:
  """The two sets as one, by their weights; the batch's count is the whole's."""
  held = _shards.broadcast_like(batch.count, batch.var) > 0
  share = jnp.where(held, share, 0)
  pivot, offset, var = (
    jnp.stack([_shards.reshard_like(a, b), b])
    for a, b in zip(old[:3], batch[:3], strict=True)
  )
  keep = _shards.reshard_like(keep, share)
  merged = merge(Centred(pivot, offset, var, jnp.stack([keep, share])), 0)
  count = held.astype(keep.dtype)
  return Centred(*(m.squeeze(0) for m in merged))._replace(count=count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingNorm(RunningOptions):
  """Streaming normalization as a transform; see `streaming_norm`.

  Parameters and running statistics have the shape of the feature axes.

  Attributes:
    axis: the feature axes, which keep statistics of their own.
    momentum: the share of the old running value that is kept, in [0, 1]; a
      number or a scalar array.
    epsilon: added to the variance; a number or a scalar array.
    debias: forget the initial values from the first update on.
    use_scale: whether there is a scale.
    scale_offset: added to the parameter to make the scale; with 1 it starts at
      zero, as in Gemma.
    use_bias: whether there is a bias.
    param_dtype: dtype of the parameters that `init` makes.
    dtype: dtype of the result; None keeps x's.
    axis_name: names of mapped axes over which batches are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    implementation: 'xla', or None to choose.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x = jnp.ones((1, 3))
    >>> norm = nk.StreamingNorm(momentum=0.9)
    >>> params, state = norm.init(x)
    >>> y, state = norm.apply(params, state, x, train=True)
    >>> state.count.tolist()
    [1, 1, 1]
  """

  debias: bool = False

  def __post_init__(self) -> None:
    super().__post_init__()
    check_average(self.momentum, self.debias)

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
    options = norm.options_of(self, streaming_norm)
    return streaming_norm(
      x, state, scale, bias, train=train, where=where, **options
    )
