"""Dynamic tanh (Zhu and others 2025), a norm without statistics."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from normkit import _types, norm
from normkit._types import Array, ArrayLike, Axes, DType
from normkit.norm import EmptyState
from normkit.norms._pointwise import bounded


@_types.serializable
class DyTParams(NamedTuple):
  """The parameters of dynamic tanh.

  Attributes:
    alpha: what the input is multiplied by, one number.
    scale: what tanh is multiplied by, one number a feature, or None.
    bias: what is added after that, or None.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> params, _ = nk.DyT().init(jnp.ones((2, 3)))
    >>> float(params.alpha), params.scale.shape
    (0.5, (3,))
  """

  alpha: Array
  scale: Array | None = None
  bias: Array | None = None


def dyt(
  x: ArrayLike,
  alpha: ArrayLike,
  scale: ArrayLike | None = None,
  bias: ArrayLike | None = None,
  *,
  axis: Axes = -1,
  where: ArrayLike | None = None,
  dtype: DType | None = None,
) -> Array:
  """Dynamic tanh, in the place of layer or RMS norm of a transformer.

    y = tanh(alpha * x) * scale + bias,

  in float32 or wider. Nothing is reduced.

  Args:
    x: array of any shape, float16, bfloat16, float32 or float64.
    alpha: one number, or of x's rank and broadcasting against it.
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
    Zhu, Chen, He, LeCun and Liu, "Transformers without Normalization" (2025),
    equation 4; alpha starts at 0.5.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> nk.dyt(jnp.array([0., 100.]), 0.5).tolist()
    [0.0, 1.0]
  """
  return bounded(
    jnp.tanh,
    x,
    alpha,
    None,
    scale,
    bias,
    axis,
    where,
    dtype,
    'dynamic tanh',
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DyT(norm.ParamOptions):
  """Dynamic tanh as a transform; see `dyt`.

  Parameters have the shape of the feature axes; there is no state.

  Attributes:
    axis: the feature axes, an integer or several.
    alpha: what `alpha` starts at.
    use_scale: whether there is a scale.
    scale_offset: added to the parameter to make the scale; with 1 it starts at
      zero, as in Gemma.
    use_bias: whether there is a bias.
    param_dtype: dtype of the parameters that `init` makes.
    dtype: dtype of the result; None keeps x's.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x = jnp.ones((2, 3))
    >>> norm = nk.DyT()
    >>> params, state = norm.init(x)
    >>> y, state = norm.apply(params, state, x, train=True)
    >>> y.shape
    (2, 3)
  """

  axis: Axes = -1
  alpha: float = 0.5
  use_bias: bool = True

  def init(
    self, x: Array | jax.ShapeDtypeStruct
  ) -> tuple[DyTParams, EmptyState]:
    """Returns `(params, state)` for inputs like x, an array or its shape."""
    alpha = jnp.asarray(self.alpha, self.param_dtype)
    params = norm.init_params(x, self.axis, self)
    return DyTParams(alpha, *params), EmptyState()

  def apply(
    self,
    params: DyTParams,
    state: EmptyState,
    x: ArrayLike,
    *,
    train: bool,
    where: ArrayLike | None = None,
  ) -> tuple[Array, EmptyState]:
    """Returns `(y, state)`; `train` makes no difference."""
    del train
    alpha, scale, bias = norm.check_params(params, self, DyTParams)
    norm.check_empty_state(state)
    options = norm.options_of(self, dyt)
    return dyt(x, alpha, scale, bias, where=where, **options), state
