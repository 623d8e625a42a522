"""The batch-normalized LSTM (Cooijmans and others 2017)."""

from typing import Any, NamedTuple

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
  Scalar,
)
from normkit.norms import batch
from normkit.norms._running import BatchNormState, as_count
from normkit.recurrent.cells import (
  CellParams,
  Function,
  check_cell,
  check_shapes,
  check_type,
  lstm,
)


@_types.serializable
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


@_types.serializable
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
    check_shapes({'seq_lengths': (lengths, self.step.shape)})
    return self._replace(length=self.step + lengths.astype(self.step.dtype))


def batch_norm_lstm(
  params: CellParams,
  state: BatchNormLSTMState,
  carry: BatchNormLSTMCarry,
  x: ArrayLike,
  *,
  train: bool,
  momentum: Scalar | None = 0.99,
  epsilon: Scalar = 1e-5,
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
  check_type(carry, BatchNormLSTMCarry, 'carry', 'initialize_carry')
  check_type(state, BatchNormLSTMState, 'state', 'init_batch_norm_lstm')
  given = {'carry.c': carry.c, 'carry.h': carry.h}
  x, (c, h) = check_cell(params, x, given, 4)
  step, length = carry.step, carry.length
  check_shapes({'carry.step': (step, x.shape[:-1])})
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

  c, h = lstm(params, c, h, x, norm, gate_fn, activation_fn, dtype)
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


def _row(stats: BatchNormState, time: Array, train: bool) -> Array:
  """Which time step's statistics a time step uses."""
  count = as_count(stats.count)
  last: Any = count.shape[0] - 1
  if not train:
    last = jnp.maximum(jnp.sum(count[:, 0] > 0) - 1, 0)
  return jnp.minimum(time, last)
