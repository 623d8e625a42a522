"""What both EvoNorms share (Liu and others 2020): parameters and checks."""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from normkit import _types, arguments, norm
from normkit._types import Array, ArrayLike, DType, Implementation, Scalar
from normkit.affine import Arguments


@_types.serializable
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


def prepare(
  x: ArrayLike,
  v: ArrayLike,
  scale: ArrayLike | None,
  bias: ArrayLike | None,
  epsilon: Scalar,
  where: ArrayLike | None,
  dtype: DType | None,
  implementation: Implementation | None,
) -> tuple[Array, Array, Arguments]:
  """Checks what both take; gives x, the slope and the arguments."""
  x = arguments.check_real(x, 'the nonlinearity is not')
  if x.ndim < 2:
    raise ValueError(
      f'x must be (batch, ..., channels), got the shape {x.shape}. Add the '
      'axis of the batch, for example x[None].'
    )
  channels = (x.ndim - 1,)
  args = arguments.check_arguments(
    x, scale, bias, channels, epsilon, where, dtype, implementation
  )
  _types.refuse_kernel(implementation, 'EvoNorm has none')
  slope = arguments.check_feature(v, x.shape, channels, 'v')
  if slope is None:
    raise TypeError('v must be an array, one number a channel, got None.')
  arguments.check_held(args.dtype, v=slope)
  return x, slope, args


def finish(
  form: Callable[..., Array],
  x: Array,
  slope: Array,
  statistics: tuple[Array, ...],
  args: Arguments,
) -> Array:
  """The form of x in float32 or wider, then scale and bias."""
  dtype = args.statistics_dtype
  x = arguments.known(x, args.where, dtype)
  y = form(x, _types.widen(slope, dtype), *statistics)
  return arguments.scaled(y, args.scale, args.bias, args.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvoNormOptions(norm.CenteredOptions):
  """The options of both, and their parameters, one number a channel."""

  epsilon: Scalar = 1e-5

  def init_params(self, x: Array | jax.ShapeDtypeStruct) -> EvoNormParams:
    """Slopes and scales of one, biases of zero."""
    norm.check_like(x)
    v = jnp.ones(x.shape[-1:], self.param_dtype)
    return EvoNormParams(v, *norm.init_params(x, -1, self))
