"""Layer-normalized LSTM and GRU (Ba, Kiros and Hinton 2016)."""

import jax
import jax.numpy as jnp

from normkit._types import (
  Array,
  ArrayLike,
  DType,
  Implementation,
  Scalar,
)
from normkit.norms import layer
from normkit.recurrent.cells import (
  CellParams,
  Function,
  check_cell,
  lstm,
  normed_sums,
)


def layer_norm_lstm(
  params: CellParams,
  carry: tuple[Array, Array],
  x: ArrayLike,
  *,
  epsilon: Scalar = 1e-6,
  gate_fn: Function = jax.nn.sigmoid,
  activation_fn: Function = jnp.tanh,
  dtype: DType | None = None,
  implementation: Implementation | None = None,
) -> tuple[tuple[Array, Array], Array]:
  """A time step of the layer-normalized LSTM.

    i, f, g, o = LN_i(x W_i) + LN_h(h W_h) + b
    c' = gate(f) * c + gate(i) * tanh(g)
    h' = gate(o) * tanh(LN_c(c')),

  where LN_i and LN_h normalize the four gates together, 4 H numbers an example.

  Args:
    params: kernels of F inputs, H hidden units and 4 gates: i, f, g, o.
    carry: `(c, h)`, both of shape (*batch, H).
    x: of shape (*batch, F), float16, bfloat16, float32 or float64.
    epsilon: added to the variances, not negative.
    gate_fn: the function of the gates.
    activation_fn: the function of the candidate and of the memory.
    dtype: of the sums of the gates; None promotes x's, h's and the kernels'.
    implementation: as `layer_norm` takes it.

  Returns:
    `((c', h'), h')`, each in the dtype that the carry had.

  Raises:
    TypeError: if x or the carry is not floating-point.
    ValueError: if a shape does not fit, or the carry is not a pair.
    NotImplementedError: as `layer_norm` does.

  References:
    Ba, Kiros and Hinton, "Layer Normalization" (2016), supplementary material,
    equations 20 to 22.

  Examples:
    >>> import jax.numpy as jnp
    >>> from normkit.recurrent import CellParams, layer_norm_lstm
    >>> params = CellParams(jnp.ones((3, 8)), jnp.ones((2, 8)))
    >>> carry = jnp.zeros((4, 2)), jnp.zeros((4, 2))
    >>> carry, y = layer_norm_lstm(params, carry, jnp.ones((4, 3)))
    >>> y.shape
    (4, 2)
  """
  if not isinstance(carry, tuple) or len(carry) != 2:
    raise ValueError(
      f'carry must be a pair (c, h), got {jax.tree.structure(carry)}. Take it '
      'from initialize_carry of the cell.'
    )
  given = dict(zip(('carry.c', 'carry.h'), carry, strict=True))
  x, (c, h) = check_cell(params, x, given, 4)

  def norm(name: str, values: Array) -> Array:
    return layer.layer_norm(
      values,
      *getattr(params, name),
      epsilon=epsilon,
      implementation=implementation,
    )

  carry = lstm(params, c, h, x, norm, gate_fn, activation_fn, dtype)
  return carry, carry[1]


def layer_norm_gru(
  params: CellParams,
  carry: Array,
  x: ArrayLike,
  *,
  epsilon: Scalar = 1e-6,
  gate_fn: Function = jax.nn.sigmoid,
  activation_fn: Function = jnp.tanh,
  dtype: DType | None = None,
  implementation: Implementation | None = None,
) -> tuple[Array, Array]:
  """A time step of the layer-normalized GRU.

    r, z = LN(x W_i) + b + LN(h W_h)
    n = tanh(LN(x W_n) + b_n + gate(r) * LN(h U_n))
    h' = (1 - gate(z)) * n + gate(z) * h,

  where the two gates are normalized together, 2 H numbers an example, and the
  candidate by itself. As in Flax, an open update gate keeps the old state: the
  z of the paper has the other sign, and it has no b.

  Args:
    params: kernels of F inputs, H hidden units and 3 gates: r, z, n.
    carry: h, of shape (*batch, H).
    x: of shape (*batch, F), float16, bfloat16, float32 or float64.
    epsilon: added to the variances, not negative.
    gate_fn: the function of the gates.
    activation_fn: the function of the candidate.
    dtype: of the sums of the gates; None promotes x's, h's and the kernels'.
    implementation: as `layer_norm` takes it.

  Returns:
    `(h', h')`, in the dtype that the carry had.

  Raises:
    TypeError: if x or the carry is not floating-point.
    ValueError: if a shape does not fit.
    NotImplementedError: as `layer_norm` does.

  References:
    Ba, Kiros and Hinton, "Layer Normalization" (2016), supplementary material,
    the equations of the GRU.

  Examples:
    >>> import jax.numpy as jnp
    >>> from normkit.recurrent import CellParams, layer_norm_gru
    >>> params = CellParams(jnp.ones((3, 6)), jnp.ones((2, 6)))
    >>> h, y = layer_norm_gru(params, jnp.zeros((4, 2)), jnp.ones((4, 3)))
    >>> y.shape
    (4, 2)
  """
  x, (h,) = check_cell(params, x, {'carry': carry}, 3)
  gates, candidate = slice(2 * h.shape[-1]), slice(2 * h.shape[-1], None)

  def norm(name: str, values: Array) -> Array:
    parts = [
      layer.layer_norm(
        values[..., part],
        *(p if p is None else p[part] for p in getattr(params, name)),
        epsilon=epsilon,
        implementation=implementation,
      )
      for part in (gates, candidate)
    ]
    return jnp.concatenate(parts, axis=-1)

  sums = normed_sums(params, h, x, norm, dtype)
  (r_i, z_i, n_i), (r_h, z_h, n_h) = (jnp.split(s, 3, axis=-1) for s in sums)
  r, z = gate_fn(r_i + r_h), gate_fn(z_i + z_h)
  n = activation_fn(n_i + r * n_h)
  new = ((1 - z) * n + z * h).astype(h.dtype)
  return new, new
