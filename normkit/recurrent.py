"""Recurrent cells whose summed inputs are normalized, as pure functions.

Ba, Kiros and Hinton, "Layer Normalization" (2016), and Cooijmans, Ballas,
Laurent, Gülçehre and Courville, "Recurrent Batch Normalization" (2017).

A cell takes a carry and the input of one time step. The gates lie side by side
in the columns of its kernels, in the order of Flax: input, forget, candidate,
output in the LSTM; reset, update, candidate in the GRU. The Flax cells are in
`normkit.linen` and `normkit.nnx`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import lax
import jax.numpy as jnp

from normkit import _types
from normkit._types import (
  Array,
  ArrayLike,
  AxisName,
  DType,
  Groups,
  Implementation,
)
from normkit.norm import NormParams
from normkit.norms import batch, layer
from normkit.running import BatchNormState

Function: TypeAlias = Callable[[Array], Array]


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


class BatchNormLSTMState(NamedTuple):
  """Running statistics of each time step, T of them.

  Attributes:
    norm_i: of the input's sums, a `BatchNormState` of shape (T, 4 * H).
    norm_h: of the hidden state's sums, of shape (T, 4 * H).
    norm_c: of the memory, of shape (T, H).

  Examples:
    >>> from normkit.recurrent import init_batch_norm_lstm
    >>> init_batch_norm_lstm(2, max_length=5).norm_i.mean.shape
    (5, 8)
  """

  norm_i: BatchNormState
  norm_h: BatchNormState
  norm_c: BatchNormState


class BatchNormLSTMCarry(NamedTuple):
  """What the batch-normalized LSTM hands to its next time step.

  Attributes:
    c: the memory, of shape (*batch, H).
    h: the hidden state, of shape (*batch, H).
    step: int32 of shape (*batch), the time step to come, zeros at first. The
      examples of a batch go in step; where they differ, the largest counts.
    length: int32 of shape (*batch), the time step at which each sequence has
      ended: from there on the example enters no statistics. None: never.

  Examples:
    >>> import jax.numpy as jnp
    >>> from normkit.recurrent import BatchNormLSTMCarry
    >>> zeros = jnp.zeros((2, 3))
    >>> carry = BatchNormLSTMCarry(zeros, zeros, jnp.zeros(2, int))
    >>> carry.with_lengths(jnp.array([4, 6])).length.tolist()
    [4, 6]
  """

  c: Array
  h: Array
  step: Array
  length: Array | None = None

  def with_lengths(self, seq_lengths: ArrayLike | None) -> Any:
    """The carry for sequences of so many more steps, (*batch); None: endless.

    Raises:
      TypeError: if they are not integers.
      ValueError: if they are not one for each example.
    """
    if seq_lengths is None:
      return self._replace(length=None)
    lengths = jnp.asarray(seq_lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
      raise TypeError(
        f'seq_lengths must be integers, got {lengths.dtype}. Give the number '
        'of time steps of each example, for example mask.sum(-1).'
      )
    _check_shapes({'seq_lengths': (lengths, self.step.shape)})
    return self._replace(length=self.step + lengths.astype(self.step.dtype))


def layer_norm_lstm(
  params: CellParams,
  carry: tuple[Array, Array],
  x: ArrayLike,
  *,
  epsilon: float = 1e-6,
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
  x, (c, h) = _check_cell(params, x, given, 4)

  def norm(name: str, values: Array) -> Array:
    return layer.layer_norm(
      values,
      *getattr(params, name),
      epsilon=epsilon,
      implementation=implementation,
    )

  carry = _lstm(params, c, h, x, norm, gate_fn, activation_fn, dtype)
  return carry, carry[1]


def layer_norm_gru(
  params: CellParams,
  carry: Array,
  x: ArrayLike,
  *,
  epsilon: float = 1e-6,
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
  x, (h,) = _check_cell(params, x, {'carry': carry}, 3)
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

  sums = _normed_sums(params, h, x, norm, dtype)
  (r_i, z_i, n_i), (r_h, z_h, n_h) = (jnp.split(s, 3, axis=-1) for s in sums)
  r, z = gate_fn(r_i + r_h), gate_fn(z_i + z_h)
  n = activation_fn(n_i + r * n_h)
  new = ((1 - z) * n + z * h).astype(h.dtype)
  return new, new


def batch_norm_lstm(
  params: CellParams,
  state: BatchNormLSTMState,
  carry: BatchNormLSTMCarry,
  x: ArrayLike,
  *,
  train: bool,
  momentum: float | None = 0.99,
  epsilon: float = 1e-5,
  gate_fn: Function = jax.nn.sigmoid,
  activation_fn: Function = jnp.tanh,
  axis_name: AxisName | None = None,
  axis_index_groups: Groups | None = None,
  dtype: DType | None = None,
) -> tuple[BatchNormLSTMCarry, Array, BatchNormLSTMState]:
  """A time step of the batch-normalized LSTM.

    i, f, g, o = BN_i(x W_i) + BN_h(h W_h) + b
    c' = gate(f) * c + gate(i) * tanh(g)
    h' = gate(o) * tanh(BN_c(c')).

  Every time step has running statistics of its own, up to T of them; later
  steps train the last. Evaluation uses, past the last step that training has
  reached, that step's. The paper starts all scales at 0.1 and gives BN_i and
  BN_h no bias.

  In the first step h is constant, unless the carry starts with noise: BN_h
  gives zeros, and the gradient of h is divided by the root of epsilon. Late
  steps, at which few sequences of a batch go on, take their statistics from
  few examples; one alone is normalized to zero.

  Args:
    params: kernels of F inputs, H hidden units and 4 gates: i, f, g, o.
    state: running statistics; see `init_batch_norm_lstm`.
    carry: c and h, the time step, and the lengths of the sequences. An example
      whose sequence has ended changes neither the statistics nor any other.
    x: of shape (*batch, F), float16, bfloat16, float32 or float64.
    train: normalize with the batch's statistics and update the running ones.
    momentum: the share of the old running value that is kept, in [0, 1], as in
      Flax (PyTorch's 0.1 is 0.9 here). None weighs all updates equally.
    epsilon: added to the variances, not negative.
    gate_fn: the function of the gates.
    activation_fn: the function of the candidate and of the memory.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    dtype: of the sums of the gates; None promotes x's, h's and the kernels'.

  Returns:
    `(carry, h', state)`, each array in the dtype that it had.

  Raises:
    TypeError: if x or the carry is not floating-point, or `train` not a bool.
    ValueError: if a shape does not fit, the carry or the state is of another
      type, or in training there is but one example, masks aside.

  References:
    Cooijmans, Ballas, Laurent, Gülçehre and Courville, "Recurrent Batch
    Normalization" (2017), equations 6 to 8 and section 3.

  Examples:
    >>> import jax.numpy as jnp
    >>> from normkit.recurrent import (
    ...   BatchNormLSTMCarry, CellParams, batch_norm_lstm, init_batch_norm_lstm
    ... )
    >>> params = CellParams(jnp.ones((3, 8)), jnp.ones((2, 8)))
    >>> state, zeros = init_batch_norm_lstm(2, max_length=5), jnp.zeros((4, 2))
    >>> carry = BatchNormLSTMCarry(zeros, zeros, jnp.zeros(4, int))
    >>> carry, y, state = batch_norm_lstm(
    ...   params, state, carry, jnp.ones((4, 3)), train=True
    ... )
    >>> y.shape, carry.step.tolist(), state.norm_c.count[:, 0].tolist()
    ((4, 2), [1, 1, 1, 1], [1, 0, 0, 0, 0])
  """
  _check_type(carry, BatchNormLSTMCarry, 'carry', 'initialize_carry')
  _check_type(state, BatchNormLSTMState, 'state', 'init_batch_norm_lstm')
  given = {'carry.c': carry.c, 'carry.h': carry.h}
  x, (c, h) = _check_cell(params, x, given, 4)
  step, length = carry.step, carry.length
  _check_shapes({'carry.step': (step, x.shape[:-1])})
  if not jnp.issubdtype(step.dtype, jnp.integer):
    raise TypeError(
      f'carry.step must be of integers, the steps so far, got {step.dtype}. '
      "Take the carry from the cell's initialize_carry."
    )
  where = None if length is None else (step < length)[..., None]
  time = jnp.max(step, initial=0)
  if axis_name is not None:  # devices pool the statistics of one time step
    time = lax.pmax(time, axis_name)
  states: dict[str, BatchNormState] = {}

  def norm(name: str, values: Array) -> Array:
    stats: BatchNormState = getattr(state, name)
    row = _row(stats, time, train)
    y, new = batch.batch_norm(
      values,
      jax.tree.map(lambda s: s[row], stats),
      *getattr(params, name),
      train=train,
      momentum=momentum,
      epsilon=epsilon,
      where=where,
      axis_name=axis_name,
      axis_index_groups=axis_index_groups,
    )
    states[name] = jax.tree.map(lambda s, n: s.at[row].set(n), stats, new)
    return y

  c, h = _lstm(params, c, h, x, norm, gate_fn, activation_fn, dtype)
  state = BatchNormLSTMState(**states) if train else state
  return BatchNormLSTMCarry(c, h, step + 1, length), h, state


def init_batch_norm_lstm(features: int, max_length: int) -> BatchNormLSTMState:
  """Running statistics of H hidden units and T time steps.

  Args:
    features: H.
    max_length: T, as a rule the length of the longest training sequence.

  Returns:
    Means of zero and variances of one in float32, and counts of zero.

  Raises:
    ValueError: if either is not a positive integer.

  Examples:
    >>> from normkit.recurrent import init_batch_norm_lstm
    >>> init_batch_norm_lstm(2, max_length=5).norm_c.var.shape
    (5, 2)
  """
  for name, value in {'features': features, 'max_length': max_length}.items():
    if not _types.is_integer(value) or value < 1:
      raise ValueError(
        f'{name} must be a positive integer, got {value!r}. There is one row '
        'of statistics for each time step, of numbers for each hidden unit.'
      )

  def stats(width: int) -> BatchNormState:
    x = jax.ShapeDtypeStruct((max_length, width), jnp.float32)
    return batch.BatchNorm(axis=(0, 1)).init(x)[1]

  wide = 4 * features
  return BatchNormLSTMState(stats(wide), stats(wide), stats(features))


def _lstm(
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
  sum_i, sum_h = _normed_sums(params, h, x, norm, dtype)
  i, f, g, o = jnp.split(sum_i + sum_h, 4, axis=-1)
  new = gate_fn(f) * c + gate_fn(i) * activation_fn(g)
  out = gate_fn(o) * activation_fn(norm('norm_c', new))
  return new.astype(c.dtype), out.astype(h.dtype)


def _normed_sums(
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


def _row(stats: BatchNormState, time: Array, train: bool) -> Array:
  """Which time step's statistics a time step uses."""
  last: Any = stats.count.shape[0] - 1
  if not train:
    last = jnp.maximum(jnp.sum(stats.count[:, 0] > 0) - 1, 0)
  return jnp.minimum(time, last)


def _check_cell(
  params: CellParams, x: ArrayLike, carry: Mapping[str, Any], gates: int
) -> tuple[Array, list[Array]]:
  """Returns x and the arrays of the carry; raises unless all shapes fit."""
  _check_type(params, CellParams, 'params', 'the cell, or make it')
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
  _check_shapes(wanted)
  return x, [*arrays.values()]


def _check_shapes(wanted: Mapping[str, tuple[Array, tuple[int, ...]]]) -> None:
  for name, (value, shape) in wanted.items():
    if jnp.shape(value) != shape:
      raise ValueError(
        f'{name} has shape {jnp.shape(value)}, where {shape} is needed: x is '
        '(*batch, F), the carry (*batch, H), its steps and lengths (*batch), '
        'the kernels (F, G * H) and (H, G * H) for G gates: 4 in an LSTM, 3 in '
        'a GRU. Make the cell and its carry for inputs of this shape.'
      )


def _check_type(value: Any, kind: type, name: str, source: str) -> None:
  if not isinstance(value, kind):
    raise ValueError(
      f'{name} must be {kind.__name__}, got {jax.tree.structure(value)}. Take '
      f'it from {source}.'
    )
