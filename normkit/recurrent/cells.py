"""What normalized recurrent cells share: parameters, checks, the LSTM."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from normkit import _types
from normkit._types import (
  Array,
  ArrayLike,
  DType,
)
from normkit.norm import NormParams

Function: TypeAlias = Callable[[Array], Array]


@_types.serializable
class CellParams(NamedTuple):
  """The parameters of a cell: F inputs, H hidden units, G gates.

  Attributes:
    kernel_i: of shape (F, G * H), applied to the input.
    kernel_h: of shape (H, G * H), applied to the hidden state.
    bias: of shape (G * H,), added to the normalized sums, or None.
    norm_i: scale and bias of the norm of the input's sums, of shape (G * H,).
    norm_h: those of the norm of the hidden state's sums.
    norm_c: those of the norm of the LSTM's memory, of shape (H,).

  Examples:
    >>> import jax.numpy as jnp
    >>> from normkit.recurrent import CellParams
    >>> params = CellParams(jnp.ones((3, 8)), jnp.ones((2, 8)))
    >>> params.norm_i
    NormParams(scale=None, bias=None)
  """

  kernel_i: Array
  kernel_h: Array
  bias: Array | None = None
  norm_i: NormParams = NormParams()
  norm_h: NormParams = NormParams()
  norm_c: NormParams = NormParams()


def lstm(
  params: CellParams,
  c: Array,
  h: Array,
  x: Array,
  norm: Callable[[str, Array], Array],
  gate_fn: Function,
  activation_fn: Function,
  dtype: DType | None,
) -> tuple[Array, Array]:
  """The LSTM with its three norms, which are told their parameters' names."""
  sum_i, sum_h = normed_sums(params, h, x, norm, dtype)
  i, f, g, o = jnp.split(sum_i + sum_h, 4, axis=-1)
  new = gate_fn(f) * c + gate_fn(i) * activation_fn(g)
  out = gate_fn(o) * activation_fn(norm('norm_c', new))
  return new.astype(c.dtype), out.astype(h.dtype)


def normed_sums(
  params: CellParams,
  h: Array,
  x: Array,
  norm: Callable[[str, Array], Array],
  dtype: DType | None,
) -> tuple[Array, Array]:
  """The normalized sums of x, with the bias, and of h, over all gates."""
  kernels = params.kernel_i, params.kernel_h
  dtype = _types.check_dtype(dtype or jnp.result_type(x, h, *kernels))
  x, h, kernel_i, kernel_h = (a.astype(dtype) for a in (x, h, *kernels))
  sum_i, sum_h = norm('norm_i', x @ kernel_i), norm('norm_h', h @ kernel_h)
  if params.bias is not None:
    sum_i += jnp.broadcast_to(params.bias.astype(dtype), sum_i.shape)
  return sum_i, sum_h


def check_cell(
  params: CellParams, x: ArrayLike, carry: Mapping[str, Any], gates: int
) -> tuple[Array, list[Array]]:
  """Returns x and the arrays of the carry; raises unless all shapes fit."""
  check_type(params, CellParams, 'params', 'the cell, or make it')
  x = _types.check_input(x)
  if x.ndim == 0:
    raise ValueError('x has no axes; give it features, (*batch, F).')
  hidden = params.kernel_h.shape[0]
  wide = gates * hidden
  arrays = {n: _types.check_input(a, n) for n, a in carry.items()}
  wanted = {n: (a, (*x.shape[:-1], hidden)) for n, a in arrays.items()}
  wanted['params.kernel_i'] = params.kernel_i, (x.shape[-1], wide)
  wanted['params.kernel_h'] = params.kernel_h, (hidden, wide)
  if params.bias is not None:
    wanted['params.bias'] = params.bias, (wide,)
  check_shapes(wanted)
  return x, [*arrays.values()]


def check_shapes(wanted: Mapping[str, tuple[Array, tuple[int, ...]]]) -> None:
  """Raises unless each array has the shape beside it."""
  for name, (value, shape) in wanted.items():
    if np.shape(value) != shape:
      raise ValueError(
        f'{name} has shape {np.shape(value)}, where {shape} is needed: x is '
        '(*batch, F), the carry (*batch, H), its steps and lengths (*batch), '
        'the kernels (F, G * H) and (H, G * H) for G gates: 4 in an LSTM, 3 in '
        'a GRU. Make the cell and its carry for inputs of this shape.'
      )


def check_type(value: Any, kind: type, name: str, source: str) -> None:
  """Raises unless the value is of that kind; `source` tells where it is had."""
  if not isinstance(value, kind):
    raise ValueError(
      f'{name} must be {kind.__name__}, got {jax.tree.structure(value)}. Take '
      f'it from {source}.'
    )
