"""Batch normalization (Ioffe and Szegedy 2015), with its state in the open."""

import dataclasses
import math

import jax

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
from normkit.centred import Centred, centred, of_channels
from normkit.moments import flatten, squeeze
from normkit.norm import NormParams
from normkit.norms._running import (
  BatchNormState,
  RunningOptions,
  check_average,
  check_holds_mean,
  check_several,
  check_state,
  running,
  update,
)
from normkit.pooling import merge, merge_channels, pool


def batch_norm(
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
  unbiased: bool = False,
  skip_nonfinite: bool = False,
  virtual_batch_size: int | None = None,
  check_batch: bool = True,
  where: ArrayLike | None = None,
  axis_name: AxisName | None = None,
  axis_index_groups: Groups | None = None,
  dtype: DType | None = None,
  implementation: Implementation | None = None,
) -> tuple[Array, BatchNormState]:
  """Batch normalization: each feature over the batch and all other axes.

    y = (x - mean) / sqrt(var + epsilon) * scale + bias.

  In training, mean and variance are the batch's, over all axes but `axis` and
  over the devices of `axis_name`, in float32 or wider, and the running ones
  move towards them:

    running = momentum * running + (1 - momentum) * batch.

  Otherwise they are the running ones, and the state comes back as it was.

  Args:
    x: array of any shape, float16, bfloat16, float32, float64 or complex.
    state: the running statistics, of the shape of the feature axes; its count
      may be None unless `debias` or `momentum=None` needs it.
    scale: of the shape of the feature axes, or of x's rank and broadcasting
      against it. None: one.
    bias: shaped as `scale` is. None: zero.
    train: normalize with the batch's statistics and update the running ones.
    axis: the feature axes, which keep statistics of their own.
    momentum: the share of the old running value that is kept, in [0, 1], a
      number or a scalar array, as in Flax (PyTorch's 0.1 is 0.9 here). None
      weighs all updates equally.
    epsilon: added to the variance, not negative; a number or a scalar array.
    debias: weigh the updates as momentum does, but forget the initial values:
      after the first update the running statistics are the batch's.
    unbiased: keep var * n / (n - 1) in the running variance, as PyTorch does;
      n counts the elements of a feature. One element tells nothing then, and
      updates nothing.
    skip_nonfinite: a feature whose batch statistics are not finite keeps its
      running ones, and its count stays: one bad step does no lasting harm.
    virtual_batch_size: normalize each so many examples, neighbours along the
      first reduced axis, by their own statistics, which no other device sees
      (ghost batch norm). The running statistics take the moments of the whole
      batch, pooled over `axis_name`. None normalizes the batch as one.
    check_batch: raise in training where a feature has one element or none.
      False lets them pass: one becomes zero, then the bias, and none updates
      nothing.
    where: boolean mask that broadcasts to x; elements where it is False change
      neither the statistics nor any other output. A feature with no element
      left gives zeros, then the bias, and keeps its running statistics.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    dtype: dtype of the result; None keeps x's.
    implementation: 'xla', or None to choose.

  Returns:
    `(y, state)`: y of the shape of x, and the state in the dtypes it had.

  Raises:
    TypeError: if x is not floating-point or complex, `train` not a bool,
      `where` not boolean, or in training the state real for complex x.
    ValueError: if an axis is out of range or given twice, a shape does not fit,
      momentum lies outside [0, 1], epsilon is negative, debias is asked for
      without a momentum below 1, `virtual_batch_size` does not divide the
      batch, or if in training a feature has but one element, masks aside, or
      none.
    NotImplementedError: if `implementation` names a kernel that is not there.

  References:
    Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training
    by Reducing Internal Covariate Shift" (2015), algorithms 1 and 2.
    Virtual batches: Hoffer, Hubara and Soudry, "Train longer, generalize
    better" (2017), algorithm 1.
    The weights of `debias` are those of Kingma and Ba, "Adam" (2014), section
    3.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x = jnp.array([[1.], [3.]])
    >>> state = nk.BatchNormState(jnp.zeros(1), jnp.ones(1), jnp.zeros(1, int))
    >>> y, state = nk.batch_norm(x, state, train=True, epsilon=0., momentum=.5)
    >>> y.tolist(), state.mean.tolist()
    ([[-1.0], [1.0]], [1.0])
  """
  x = _types.check_input(x)
  features = _types.check_axes(axis, x.ndim)
  reduced = _types.other_axes(features, x.ndim)
  args = arguments.check_arguments(
    x, scale, bias, features, epsilon, where, dtype, implementation
  )
  _types.refuse_kernel(implementation, 'XLA reads x no more often')
  momentum = check_average(momentum, debias)
  _types.check_virtual_batch_size(virtual_batch_size)
  check_state(state, x, features, is_counted=debias or momentum is None)
  if not _types.check_flag(train, 'train'):
    stats = running(state, x, features)
    return by_running(x, args, stats), state
  check_holds_mean(state, x)
  ghosts = count_ghosts(x.shape, reduced, virtual_batch_size)
  pooling = axis_name, axis_index_groups
  if check_batch:
    check_several(x.shape, reduced, *pooling, ghosts)

  def run(wide: Array, args: Arguments) -> tuple[Array, Centred]:
    if ghosts is not None:
      y, stats = ghost_norm(wide, args, reduced, ghosts)
      return y, pool(stats, *pooling)
    stats = centred(wide, reduced, args.where, given=args.given)
    stats = pool(stats, *pooling)
    return affine(wide, stats, args), stats

  y, stats = widened(run, x, args)
  return y, update(
    state,
    squeeze(flatten(stats), reduced),
    momentum,
    debias=debias,
    unbiased=unbiased,
    skip_nonfinite=skip_nonfinite,
  )


def ghost_norm(
  x: Array,
  args: Arguments,
  reduced: tuple[int, ...],
  ghosts: int,
) -> tuple[Array, Centred]:
  """Normalizes virtual batches; returns the output and the whole's moments.

  Batches that lie across the shards of an explicit mesh are merged of pieces.
  """
  first = reduced[0]
  pieces, shards = ghosts, _shards.shards(x, first)
  if shards > 1:
    batch = x.shape[first]
    pieces = batch // math.gcd(batch // ghosts, batch // shards)

  def split(a: Array) -> Array:
    parts = 1 if a.shape[first] == 1 else pieces
    size = a.shape[first] // parts
    return a.reshape(*a.shape[:first], parts, size, *a.shape[first + 1 :])

  arrays = {'scale': args.scale, 'bias': args.bias, 'where': args.where}
  args = args._replace(**jax.tree.map(split, arrays))
  axes = tuple(a + 1 for a in reduced)
  batches = split(x)
  own = parts = centred(batches, axes, args.where, given=args.given)
  if pieces != ghosts:
    parts = merge_channels(parts, first, ghosts)
    own = of_channels(parts, first, batches)
  y = affine(batches, own, args).reshape(x.shape)
  return y, Centred(*(m.squeeze(first) for m in merge(parts, first)))


def count_ghosts(
  shape: tuple[int, ...], reduced: tuple[int, ...], size: int | None
) -> int | None:
  """How many virtual batches there are, or None: not used, or no examples."""
  if size is None:
    return None
  batch = shape[reduced[0]] if reduced else 0
  if not _types.is_known(batch) and batch % size != 0:
    raise ValueError(
      f'virtual_batch_size={size} may not divide the batch, of the symbol '
      f"{batch}. Export it for a multiple, for example '{size}*{batch}'."
    )
  if not reduced or batch % size:
    raise ValueError(
      f'virtual_batch_size={size} does not divide the batch of {batch}, the '
      f'first reduced axis of x of shape {shape}. Give a divisor of {batch}.'
    )
  return batch // size or None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchNorm(RunningOptions):
  """Batch normalization as a transform; see `batch_norm`.

  Parameters and running statistics have the shape of the feature axes.

  Attributes:
    axis: the feature axes, which keep statistics of their own.
    momentum: the share of the old running value that is kept, in [0, 1], a
      number or a scalar array, as in Flax (PyTorch's 0.1 is 0.9 here). None
      weighs all updates equally.
    epsilon: added to the variance; a number or a scalar array.
    debias: forget the initial values from the first update on.
    unbiased: keep the unbiased variance in the state, as PyTorch does.
    skip_nonfinite: keep the running statistics of a feature whose batch
      statistics are not finite.
    virtual_batch_size: normalize each so many neighbouring examples by their
      own statistics.
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
    >>> import jax, jax.numpy as jnp, normkit as nk
    >>> x = jnp.ones((8, 4, 4, 3))
    >>> bn = nk.BatchNorm(momentum=0.9)
    >>> params, state = bn.init(jax.ShapeDtypeStruct((8, 4, 4, 3), x.dtype))
    >>> y, state = bn.apply(params, state, x, train=True)
    >>> state.count.tolist()
    [1, 1, 1]
  """

  debias: bool = False
  unbiased: bool = False
  skip_nonfinite: bool = False
  virtual_batch_size: int | None = None
  check_batch: bool = True

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
    options = norm.options_of(self, batch_norm)
    return batch_norm(
      x, state, scale, bias, train=train, where=where, **options
    )
