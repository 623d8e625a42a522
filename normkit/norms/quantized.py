"""Norms whose result is of eight bits, and what its numbers stand for.

Micikevicius and others, "FP8 Formats for Deep Learning" (2022).
"""

from jax import lax
import jax.numpy as jnp

from normkit import _types, general
from normkit._types import Array, ArrayLike, Axes, DType, Scalar

_NAMES = 'float8_e4m3fn', 'float8_e5m2'


def quantized_rms_norm(
  x: ArrayLike,
  scale: ArrayLike | None = None,
  *,
  quantization_scale: ArrayLike | None = None,
  axis: Axes = -1,
  scale_offset: float = 0.0,
  round_before_scale: bool = False,
  epsilon: Scalar = 1e-6,
  dtype: DType = jnp.float8_e4m3fn,
) -> tuple[Array, Array]:
  """RMS normalization to eight bits, for a matrix product that takes them.

  With y = rms_norm(x, scale) in float32 or wider, nothing rounded between,

    s = max |y| / 448            a row, over `axis`, or as given,
    q = y / s                    rounded, and no further than -448 and 448,

  so that y is about q * s: the scale of vLLM's kernels and of `scaled_matmul`,
  the `scale_inv` of Transformer Engine, whose `scale` is its reciprocal. On
  GPUs and TPUs XLA writes q and s, and no y. Rounding has no derivative, and
  none is put in its place: that of both results is zero.

  Args:
    x: array of any shape, float16, bfloat16, float32 or float64.
    scale: of the shape of the axes `axis`, or of x's rank and broadcasting
      against it. None: one.
    quantization_scale: s, a number or an array that broadcasts to x, above
      zero, from earlier data. What lies beyond 448 s becomes 448 s. None: one
      for each row, which then lacks nothing. A row of zeros has a one.
    axis: the normalized axes, an integer or several.
    scale_offset: added to `scale`, in float32 or wider; 1 for weights around
      zero, as in Gemma.
    round_before_scale: round the normalized values to x's dtype before `scale`
      multiplies them, and their product to the wider dtype of both, as in
      Llama.
    epsilon: added to the mean square, not negative; a number or a scalar array.
    dtype: float8_e4m3fn, of 448 at most, or float8_e5m2, of 57344.

  Returns:
    `(q, s)`: q of the shape of x and `dtype`, s of float32 or wider, with one
    element along `axis`, or as given.

  Raises:
    TypeError: if `dtype` is another, or x is complex.
    ValueError: as `normalize` raises it, and if `quantization_scale` does not
      broadcast to x.

  References:
    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019),
    equation 4. Micikevicius and others, "FP8 Formats for Deep Learning" (2022),
    table 1 and section 3.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x = jnp.array([[1., -1.], [0., 0.]])
    >>> q, s = nk.quantized_rms_norm(x, epsilon=0.)
    >>> q.tolist(), (448 * s).ravel().tolist()
    ([[448.0, -448.0], [0.0, 0.0]], [1.0, 448.0])
  """
  return _quantized(
    x,
    scale,
    None,
    quantization_scale,
    dtype,
    axis=axis,
    center=False,
    scale_offset=scale_offset,
    round_before_scale=round_before_scale,
    epsilon=epsilon,
  )


def quantized_layer_norm(
  x: ArrayLike,
  scale: ArrayLike | None = None,
  bias: ArrayLike | None = None,
  *,
  quantization_scale: ArrayLike | None = None,
  axis: Axes = -1,
  scale_offset: float = 0.0,
  epsilon: Scalar = 1e-6,
  dtype: DType = jnp.float8_e4m3fn,
) -> tuple[Array, Array]:
  """Layer normalization to eight bits; see `quantized_rms_norm`.

  With y = layer_norm(x, scale, bias), q and s as there.

  Args:
    x: array of any shape, float16, bfloat16, float32 or float64.
    scale: of the shape of the axes `axis`, or of x's rank and broadcasting
      against it. None: one.
    bias: shaped as `scale` is. None: zero.
    quantization_scale: as `quantized_rms_norm` has it.
    axis: the normalized axes, an integer or several.
    scale_offset: added to `scale`, in float32 or wider; 1 for weights around
      zero, as in Nemotron.
    epsilon: added to the variance, not negative; a number or a scalar array.
    dtype: as `quantized_rms_norm` has it.

  Returns:
    `(q, s)` as `quantized_rms_norm` gives them.

  Raises:
    TypeError, ValueError: as `quantized_rms_norm` does.

  References:
    Ba, Kiros and Hinton, "Layer Normalization" (2016), equations 3 and 4.
    Micikevicius and others, "FP8 Formats for Deep Learning" (2022), table 1 and
    section 3.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> q, s = nk.quantized_layer_norm(jnp.array([[1., 3.]]), epsilon=0.)
    >>> (q.astype(jnp.float32) * s).tolist()
    [[-1.0, 1.0]]
  """
  return _quantized(
    x,
    scale,
    bias,
    quantization_scale,
    dtype,
    axis=axis,
    center=True,
    scale_offset=scale_offset,
    epsilon=epsilon,
  )


def _quantized(
  x: ArrayLike,
  scale: ArrayLike | None,
  bias: ArrayLike | None,
  given: ArrayLike | None,
  dtype: DType,
  *,
  axis: Axes,
  center: bool,
  scale_offset: float,
  round_before_scale: bool = False,
  epsilon: Scalar,
) -> tuple[Array, Array]:
  x = _types.check_input(x)
  if jnp.iscomplexobj(x):
    raise TypeError(
      f'x must be real, got {x.dtype}: there are no complex numbers of eight '
      'bits. Take its real and imaginary part as features of their own.'
    )
  name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
  if name not in _NAMES:
    raise TypeError(
      f'dtype must be float8_e4m3fn or float8_e5m2, got {name}. Norms without '
      'quantized_ give wider ones.'
    )
  dtype = jnp.dtype(name)
  axes = _types.check_axes(axis, x.ndim)
  wide = _types.statistics_dtype(x.dtype)
  y = general.normalize(
    x,
    scale,
    bias,
    axis=axes,
    center=center,
    scale_offset=scale_offset,
    round_before_scale=round_before_scale,
    epsilon=epsilon,
    dtype=wide,
    implementation='xla',
  )
  limit = float(jnp.finfo(dtype).max)
  if given is None:
    steps = _steps(y, axes, limit)
  else:
    steps = jnp.asarray(given, wide)
    _types.check_broadcast(steps.shape, x.shape, 'quantization_scale')
  # Beyond its largest number float8_e4m3fn has NaN.
  ranked = steps.reshape((1,) * (x.ndim - steps.ndim) + steps.shape)
  q = jnp.clip(y / ranked, -limit, limit).astype(dtype)
  return lax.stop_gradient(q), lax.stop_gradient(steps)


def _steps(y: Array, axes: tuple[int, ...], limit: float) -> Array:
  """What one of the result stands for, so that the largest of a row fits."""
  largest = jnp.max(jnp.abs(y), axes, keepdims=True)
  least = float(jnp.finfo(y.dtype).tiny)  # that of a row near zero divides too
  return jnp.where(largest == 0, 1, jnp.maximum(largest / limit, least))
