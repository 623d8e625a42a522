"""Batch normalization (Ioffe and Szegedy 2015), with its state in the open."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from normkit import _types, norm
from normkit._types import (
  Array,
  ArrayLike,
  Axes,
  AxisName,
  DType,
  Groups,
  Implementation,
)
from normkit.affine import Arguments, affine
from normkit.moments import (
  Centred,
  Moments,
  centred,
  flatten,
  merge,
  pool,
  squeeze,
)
from normkit.norm import NormParams


class BatchNormState(NamedTuple):
  """Running statistics, one number a feature.

  Attributes:
    mean: running means, zeros at first.
    var: running variances, ones at first.
    count: int32, how many updates each feature has received; one that was
      masked out of a batch received none from it.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> params, state = nk.BatchNorm().init(jnp.ones((2, 3)))
    >>> state.count.tolist()
    [0, 0, 0]
  """

  mean: Array
  var: Array
  count: Array  # type: ignore[assignment]


def batch_norm(
  x: ArrayLike,
  state: BatchNormState,
  scale: ArrayLike | None = None,
  bias: ArrayLike | None = None,
  *,
  train: bool,
  axis: Axes = -1,
  momentum: float | None = 0.99,
  epsilon: float = 1e-5,
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
    state: the running statistics, of the shape of the feature axes.
    scale: of the shape of the feature axes, or of x's rank and broadcasting
      against it. None: one.
    bias: shaped as `scale` is. None: zero.
    train: normalize with the batch's statistics and update the running ones.
    axis: the feature axes, which keep statistics of their own.
    momentum: the share of the old running value that is kept, in [0, 1], as in
      Flax (PyTorch's 0.1 is 0.9 here). None weighs all updates equally.
    epsilon: added to the variance, not negative.
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
  args = norm.check_arguments(
    x, scale, bias, features, epsilon, where, dtype, implementation
  )
  _types.refuse_kernel(implementation, 'XLA reads x no more often')
  momentum = check_average(momentum, debias)
  check_state(state, x, features)
  if not _types.check_flag(train, 'train'):
    stats = running(state, x, features)
    return affine(x, stats, args), state
  check_holds_mean(state, x)
  ghosts = count_ghosts(x.shape, reduced, virtual_batch_size)
  pooling = axis_name, axis_index_groups
  if check_batch:
    check_several(x.shape, reduced, *pooling, ghosts)
  if ghosts is None:
    stats = pool(centred(x, reduced, args.where), *pooling)
    y = affine(x, stats, args)
  else:
    y, stats = ghost_norm(x, args, reduced, ghosts)
    stats = pool(stats, *pooling)
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
  """Normalizes virtual batches; returns the output and the whole's moments."""
  first = reduced[0]

  def split(a: Array) -> Array:
    parts = min(ghosts, a.shape[first])
    size = a.shape[first] // parts
    return a.reshape(*a.shape[:first], parts, size, *a.shape[first + 1 :])

  arrays = {'scale': args.scale, 'bias': args.bias, 'where': args.where}
  args = args._replace(**jax.tree.map(split, arrays))
  axes = tuple(a + 1 for a in reduced)
  batches = split(x)
  parts = centred(batches, axes, args.where)
  y = affine(batches, parts, args).reshape(x.shape)
  return y, Centred(*(m.squeeze(first) for m in merge(parts, first)))


def count_ghosts(
  shape: tuple[int, ...], reduced: tuple[int, ...], size: int | None
) -> int | None:
  """How many virtual batches there are, or None: not used, or no examples."""
  if size is None:
    return None
  if not _types.is_integer(size):
    raise TypeError(f'virtual_batch_size must be an integer, got {size!r}.')
  batch = shape[reduced[0]] if reduced else 0
  if size < 1 or not reduced or batch % size:
    raise ValueError(
      f'virtual_batch_size={size} does not divide the batch of {batch}, the '
      f'first reduced axis of x of shape {shape}. Give a divisor of {batch}.'
    )
  return batch // size or None


def running(
  state: BatchNormState, x: Array, features: tuple[int, ...]
) -> Centred:
  """The running statistics as the affine map takes them, widened for x."""
  dtype = _types.statistics_dtype(x.dtype)

  def form(values: Array, dtype: DType) -> Array:
    values = jnp.asarray(values)
    wide = values.astype(jnp.promote_types(values.dtype, dtype))
    return lax.expand_dims(wide, _types.other_axes(features, x.ndim))

  mean = form(state.mean, dtype)
  var = form(state.var, _types.real_dtype(dtype))
  return Centred(mean, jnp.zeros_like(mean), var, jnp.ones_like(var))


def update(
  state: BatchNormState,
  batch: Moments,
  momentum: float | None,
  *,
  debias: bool,
  unbiased: bool,
  skip_nonfinite: bool,
) -> BatchNormState:
  """Moves the running statistics of the features that the batch held."""
  batch = Moments(*map(_types.reshard_like, batch, state))
  new_mean, new_var, held = batch.mean, batch.var, batch.count > 0
  if unbiased:
    held = batch.count > 1
    new_var = new_var * (batch.count / jnp.maximum(batch.count - 1, 1))
  if skip_nonfinite:
    held = held & jnp.isfinite(new_mean) & jnp.isfinite(new_var)
  count = state.count + 1
  keep, share = shares(count.astype(new_var.dtype), momentum, debias)

  def average(old: Array, new: Array) -> Array:
    wide = old.astype(jnp.promote_types(old.dtype, new.dtype))
    kept = jnp.where(keep > 0, keep * wide, 0)  # whatever old is, at keep = 0
    return jnp.where(held, kept + share * new, wide).astype(old.dtype)

  return BatchNormState(
    average(state.mean, new_mean),
    average(state.var, new_var),
    jnp.where(held, count, state.count),
  )


def shares(
  count: Array, momentum: float | None, debias: bool
) -> tuple[Array | float, Array | float]:
  """The shares of the old average and of the newest of `count` updates."""
  if momentum is None:
    return (count - 1) / count, 1 / count
  if not debias or momentum == 0:
    return momentum, 1 - momentum
  rate = math.log(momentum)  # 1 - momentum^count = -expm1(count * rate)
  total = jnp.expm1(count * rate)
  return momentum * jnp.expm1((count - 1) * rate) / total, (
    (momentum - 1) / total
  )


def check_average(momentum: Any, debias: bool) -> float | None:
  """Returns momentum; raises where there is nothing to debias."""
  value = _types.check_momentum(momentum)
  if debias and value in (None, 1):
    raise ValueError(
      f'debias=True needs a momentum below 1, got momentum={value}. The '
      'cumulative average, momentum=None, has no bias to remove.'
    )
  return value


def check_state(state: Any, x: Array, features: tuple[int, ...]) -> None:
  """Raises unless the state holds one number for each feature of x."""
  if not isinstance(state, BatchNormState):
    raise ValueError(
      f'state must be BatchNormState(mean, var, count), got '
      f'{jax.tree.structure(state)}. Take it from init.'
    )
  shape = tuple(x.shape[a] for a in features)
  for name, value in zip(BatchNormState._fields, state, strict=True):
    if jnp.shape(value) != shape:
      raise ValueError(
        f'state.{name} has shape {jnp.shape(value)}, but the feature axes '
        f'{features} of x, of shape {x.shape}, have shape {shape}. Take the '
        'state from init with an input of this shape.'
      )


def check_holds_mean(state: BatchNormState, x: Array) -> None:
  """Raises if the state is real and the mean of x complex."""
  if jnp.iscomplexobj(x) and not jnp.iscomplexobj(state[0]):
    raise TypeError(
      f'state.mean of dtype {state[0].dtype} cannot hold the mean of x of '
      f'dtype {x.dtype}. Take the state from init with a complex input.'
    )


def check_several(
  shape: tuple[int, ...],
  reduced: tuple[int, ...],
  axis_name: AxisName | None,
  axis_index_groups: Groups | None,
  ghosts: int | None,
) -> None:
  """Raises if a feature has but one element in a batch, pooled or virtual."""
  count = _types.check_not_empty(shape, reduced)
  if ghosts is not None:
    count //= ghosts
  elif axis_index_groups is not None:
    count *= min(len(group) for group in axis_index_groups)
  elif axis_name is not None:
    count *= lax.axis_size(axis_name)
  if count == 1:
    raise ValueError(
      f'train=True with one element a feature in x of shape {shape}, reduced '
      f'over {reduced}: each would become zero. Give a larger batch, or '
      'train=False to use the running statistics.'
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchNorm(norm.CenteredOptions):
  """Batch normalization as a transform; see `batch_norm`.

  Parameters and running statistics have the shape of the feature axes.

  Attributes:
    axis: the feature axes, which keep statistics of their own.
    momentum: the share of the old running value that is kept, in [0, 1], as in
      Flax (PyTorch's 0.1 is 0.9 here). None weighs all updates equally.
    epsilon: added to the variance.
    debias: forget the initial values from the first update on.
    unbiased: keep the unbiased variance in the state, as PyTorch does.
    skip_nonfinite: keep the running statistics of a feature whose batch
      statistics are not finite.
    virtual_batch_size: normalize each so many neighbouring examples by their
      own statistics.
    check_batch: raise in training where a feature has one element or none.
    use_scale: whether there is a scale.
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

  axis: Axes = -1
  momentum: float | None = 0.99
  epsilon: float = 1e-5
  debias: bool = False
  unbiased: bool = False
  skip_nonfinite: bool = False
  virtual_batch_size: int | None = None
  check_batch: bool = True

  def __post_init__(self) -> None:
    super().__post_init__()
    check_average(self.momentum, self.debias)

  def init(
    self, x: Array | jax.ShapeDtypeStruct
  ) -> tuple[NormParams, BatchNormState]:
    """Returns `(params, state)` for inputs like x, an array or its shape."""
    params = norm.init_params(x, self.axis, self)
    axes = _types.check_axes(self.axis, len(x.shape))
    shape = tuple(x.shape[a] for a in axes)
    dtype = _types.statistics_dtype(x.dtype)
    return params, BatchNormState(
      jnp.zeros(shape, dtype),
      jnp.ones(shape, _types.real_dtype(dtype)),
      jnp.zeros(shape, jnp.int32),
    )

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
    options = dict(
      self.shared(),
      axis=self.axis,
      momentum=self.momentum,
      debias=self.debias,
      unbiased=self.unbiased,
      skip_nonfinite=self.skip_nonfinite,
      virtual_batch_size=self.virtual_batch_size,
      check_batch=self.check_batch,
    )
    return batch_norm(
      x, state, scale, bias, train=train, where=where, **options
    )
