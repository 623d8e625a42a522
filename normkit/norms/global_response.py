"""Global response normalization (Woo and others 2023), of ConvNeXt V2."""

import dataclasses

import jax
import jax.numpy as jnp

from normkit import _types, arguments, norm
from normkit._shards import broadcast_like
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
from normkit.affine import Arguments, widened
from normkit.centred import Centred, centred
from normkit.norm import EmptyState, NormParams
from normkit.norms._pointwise import root
from normkit.pooling import pool


def global_response_norm(
  x: ArrayLike,
  scale: ArrayLike | None = None,
  bias: ArrayLike | None = None,
  *,
  axis: Axes = -1,
  batch_axis: Axes = 0,
  epsilon: Scalar = 1e-6,
  where: ArrayLike | None = None,
  axis_name: AxisName | None = None,
  axis_index_groups: Groups | None = None,
  dtype: DType | None = None,
  implementation: Implementation | None = None,
) -> Array:
  """Global response norm: channels compete by their length over all places.

    G_c = sqrt(sum |x_c|^2),  N_c = G_c / (E_c[G] + epsilon),
    y = x + x * N * scale + bias,

  the sum over all axes but `axis` and `batch_axis`, the mean over the channels,
  both in float32 or wider. In ConvNeXt V2 it stands behind the activation of a
  block, between its two products.

  Args:
    x: array (batch, ..., channels) or in another order of axes, float16,
      bfloat16, float32, float64 or complex.
    scale: one a channel, or of x's rank and broadcasting against it; zero at
      first. None: one.
    bias: shaped as `scale` is; zero at first. None: zero.
    axis: the channels, an axis or several.
    batch_axis: the examples, an axis or several; () for a single example.
    epsilon: added to the mean length, not negative; a number or a scalar array.
    where: boolean mask that broadcasts to x; elements where it is False change
      no other output. A channel with no element left is not among those of the
      mean, and x + bias comes out of it.
    axis_name: names of mapped axes over which sums are pooled, of the places,
      not of the channels.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    dtype: dtype of the result; None keeps x's.
    implementation: 'xla', or None to choose.

  Returns:
    An array of the shape of x.

  Raises:
    TypeError, ValueError: as `normalize` does, and if `axis` and `batch_axis`
      share an axis or leave none to sum over.

  References:
    Woo, Debnath, Hu, Chen, Liu, Kweon and Xie, "ConvNeXt V2: Co-designing and
    Scaling ConvNets with Masked Autoencoders" (2023), section 3.3 and
    algorithm 1, whose mean takes the place of the sum in equation 2.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x = jnp.array([[[3., 1.], [4., 0.]]])  # 1 example, 2 places, 2 channels
    >>> nk.global_response_norm(x, jnp.zeros(2)).tolist()  # as at first
    [[[3.0, 1.0], [4.0, 0.0]]]
    >>> nk.global_response_norm(x, epsilon=0.)[..., 0].round(2).tolist()
    [[8.0, 10.670000076293945]]
  """
  x = _types.check_input(x)
  channels = _types.check_axes(axis, x.ndim)
  places = arguments.spatial_axes(x.ndim, channels, batch_axis)
  if not (channels and (places or axis_name)):
    raise ValueError(
      f'x of shape {x.shape} has axes for examples or channels alone with '
      f'axis={axis!r} and batch_axis={batch_axis!r}: the length of a channel '
      'is taken over others. For a single example, give batch_axis=().'
    )
  args = arguments.check_arguments(
    x, scale, bias, channels, epsilon, where, dtype, implementation
  )
  _types.refuse_kernel(implementation, 'global response norm has none')
  _types.check_not_empty(x.shape, (*places, *channels))

  def run(x: Array, args: Arguments) -> Array:
    stats = centred(x, places, args.where, center=False)
    stats = pool(stats, axis_name, axis_index_groups, center=False)
    x = arguments.known(x, args.where, x.dtype)
    response = _responses(stats, channels, args.epsilon)
    if args.scale is not None:
      response = response * args.scale
    return arguments.scaled(x + x * response, None, args.bias, args.dtype)

  y: Array = widened(run, x, args)
  return y


def _responses(
  stats: Centred, channels: tuple[int, ...], epsilon: Scalar
) -> Array:
  """The length of each channel over the mean of those that have elements."""
  lengths = root(stats.var * stats.count)
  held = broadcast_like(stats.count, lengths) > 0
  count = jnp.sum(held, channels, keepdims=True, dtype=lengths.dtype)
  mean = jnp.sum(lengths, channels, keepdims=True) / jnp.maximum(count, 1)
  total = mean + epsilon
  return jnp.where(total > 0, lengths / jnp.where(total > 0, total, 1), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlobalResponseNorm(norm.CenteredOptions):
  """Global response norm as a transform; see `global_response_norm`.

  Parameters have the shape of the channel axes and start at zero, so that at
  first y is x; there is no state.

  Attributes:
    axis: the channels, an axis or several.
    batch_axis: the examples, an axis or several; () for a single example.
    epsilon: added to the mean length; a number or a scalar array.
    use_scale: whether there is a scale.
    scale_offset: added to the parameter to make the scale.
    use_bias: whether there is a bias.
    param_dtype: dtype of the parameters that `init` makes.
    dtype: dtype of the result; None keeps x's.
    axis_name: names of mapped axes over which sums are pooled, of the places,
      not of the channels.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    implementation: 'xla', or None to choose.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x = jnp.ones((2, 4, 4, 3))
    >>> norm = nk.GlobalResponseNorm()
    >>> params, state = norm.init(x)
    >>> y, state = norm.apply(params, state, x, train=True)
    >>> y.shape, params.scale.tolist()
    ((2, 4, 4, 3), [0.0, 0.0, 0.0])
  """

  axis: Axes = -1
  batch_axis: Axes = 0

  def init(
    self, x: Array | jax.ShapeDtypeStruct
  ) -> tuple[NormParams, EmptyState]:
    """Returns `(params, state)` for inputs like x, an array or its shape."""
    params = norm.init_params(x, self.axis, self)
    if params.scale is not None:
      zero = jnp.full_like(params.scale, 0 - self.scale_offset)
      params = params._replace(scale=zero)
    return params, EmptyState()

  def apply(
    self,
    params: NormParams,
    state: EmptyState,
    x: ArrayLike,
    *,
    train: bool,
    where: ArrayLike | None = None,
  ) -> tuple[Array, EmptyState]:
    """Returns `(y, state)`; `train` makes no difference."""
    del train
    scale, bias = norm.check_params(params, self)
    norm.check_empty_state(state)
    options = norm.options_of(self, global_response_norm)
    return global_response_norm(x, scale, bias, where=where, **options), state
