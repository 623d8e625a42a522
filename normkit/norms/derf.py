"""Derf, dynamic erf (Chen and others 2025), a norm without statistics."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from normkit import _types, norm
from normkit._types import Array, ArrayLike, Axes, DType
from normkit.norm import EmptyState
from normkit.norms._pointwise import bounded


@_types.serializable
class DerfParams(NamedTuple):
  """The parameters of Derf.

  Attributes:
    alpha: what the input is multiplied by, one number.
    shift: what is added before erf is taken, one number.
    scale: what erf is multiplied by, one number a feature, or None.
    bias: what is added after that, or None.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> params, _ = nk.Derf().init(jnp.ones((2, 3)))
    >>> float(params.alpha), float(params.shift), params.scale.shape
    (0.5, 0.0, (3,))
  """

  alpha: Array
  shift: Array
  scale: Array | None = None
  bias: Array | None = None


def derf(
  x: ArrayLike,
  alpha: ArrayLike,
  shift: ArrayLike | None = None,
  scale: ArrayLike | None = None,
  bias: ArrayLike | None = None,
  *,
  axis: Axes = -1,
  where: ArrayLike | None = None,
  dtype: DType | None = None,
) -> Array:
  """Derf, in the place of layer or RMS norm of a transformer.

    y = erf(alpha * x + shift) * scale + bias,

  in float32 or wider, erf the error function, 2 Phi(sqrt(2) x) - 1. Nothing is
  reduced. Where `dyt` has a tanh, and no shift.

  Args:
    x: array of any shape, float16, bfloat16, float32 or float64.
    alpha: one number, or of x's rank and broadcasting against it.
    shift: shaped as `alpha` is. None: zero.
    scale: of the shape of the feature axes, or of x's rank and broadcasting
      against it. None: one.
    bias: shaped as `scale` is. None: zero.
    axis: the feature axes, an integer or several.
    where: boolean mask that broadcasts to x; a value that is not finite where
      it is False counts as zero, so that no gradient meets it.
    dtype: dtype of the result; None keeps x's.

  Returns:
    An array of the shape of x.

  Raises:
    TypeError: if x is not real and floating-point.
    ValueError: if a shape does not fit.

  References:
    Chen, Lu, Zhu, Sun and Liu, "Stronger Normalization-Free Transformers"
    (2025), equation 10; alpha starts at 0.5, the shift at zero.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> nk.derf(jnp.array([0., 100.]), 0.5, 0.0).tolist()
    [0.0, 1.0]
  """
  return bounded(_erf, x, alpha, shift, scale, bias, axis, where, dtype, 'Derf')


def _erf(x: Array) -> Array:
  y: Array = _types.ruled(_erf_with_rule, x)
  return y


@jax.custom_jvp
def _erf_with_rule(x: Array) -> Array:
  """erf, whose derivative in JAX 0.12 does not run under `shard_map`."""
  return lax.erf(x)


@_erf_with_rule.defjvp
def _erf_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
  (x,), (dx,) = primals, tangents
  slope = 2 / math.sqrt(math.pi) * jnp.exp(-jnp.square(x))
  return _erf(x), slope * dx


@dataclasses.dataclass(frozen=True, kw_only=True)
class Derf(norm.ParamOptions):
  """Derf as a transform; see `derf`.

  Parameters have the shape of the feature axes; there is no state.

  Attributes:
    axis: the feature axes, an integer or several.
    alpha: what `alpha` starts at.
    shift: what `shift` starts at.
    use_scale: whether there is a scale.
    scale_offset: added to the parameter to make the scale; with 1 it starts at
      zero, as in Gemma.
    use_bias: whether there is a bias.
    param_dtype: dtype of the parameters that `init` makes.
    dtype: dtype of the result; None keeps x's.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x = jnp.ones((2, 3))
    >>> norm = nk.Derf()
    >>> params, state = norm.init(x)
    >>> y, state = norm.apply(params, state, x, train=True)
    >>> y.shape
    (2, 3)
  """

  axis: Axes = -1
  alpha: float = 0.5
  shift: float = 0.0
  use_bias: bool = True

  def init(
    self, x: Array | jax.ShapeDtypeStruct
  ) -> tuple[DerfParams, EmptyState]:
    """Returns `(params, state)` for inputs like x, an array or its shape."""
    params = norm.init_params(x, self.axis, self)
    alpha = jnp.asarray(self.alpha, self.param_dtype)
    shift = jnp.asarray(self.shift, self.param_dtype)
    return DerfParams(alpha, shift, *params), EmptyState()

  def apply(
    self,
    params: DerfParams,
    state: EmptyState,
    x: ArrayLike,
    *,
    train: bool,
    where: ArrayLike | None = None,
  ) -> tuple[Array, EmptyState]:
    """Returns `(y, state)`; `train` makes no difference."""
    del train
    checked = norm.check_params(params, self, DerfParams)
    norm.check_empty_state(state)
    options = norm.options_of(self, derf)
    return derf(x, *checked, where=where, **options), state
