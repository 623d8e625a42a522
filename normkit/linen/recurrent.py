"""Recurrent cells with norms, and what runs them over a sequence."""

from dataclasses import KW_ONLY
from typing import Any

from flax import linen as nn
from flax.core.scope import union_filters
from flax.linen.recurrent import DenseParams
from flax.typing import Initializer
import jax
import jax.numpy as jnp

from normkit import norm, recurrent
from normkit._docs import documented
from normkit._types import (
  Array,
  AxisName,
  DType,
  Groups,
  Implementation,
  Scalar,
)
from normkit.linen._shared import map_fields
from normkit.norms import _running


@documented(nn.LSTMCell)
class LayerNormLSTMCell(nn.LSTMCell):
  """A layer-normalized LSTM cell, in place of `flax.linen.LSTMCell`.

  The parameters of Flax's cell under Flax's names, and those of the norms under
  `norm_i` (of the input's sums), `norm_h` (of the hidden state's) and `norm_c`
  (of the memory). See `normkit.recurrent.layer_norm_lstm`.

  Attributes:
    carry_init: initializer of the carry.
    epsilon: added to the variances.
    scale_init: initializer of the scales of the norms; their biases are zero.
    implementation: as `normkit.layer_norm` takes it.

  References:
    Ba, Kiros and Hinton, "Layer Normalization" (2016).

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> from flax import linen as nn
    >>> rnn = nn.RNN(normkit.linen.LayerNormLSTMCell(4))
    >>> x = jnp.ones((2, 5, 3))
    >>> variables = rnn.init(jax.random.key(0), x)
    >>> rnn.apply(variables, x, seq_lengths=jnp.array([5, 2])).shape
    (2, 5, 4)
  """

  _: KW_ONLY
  epsilon: Scalar = 1e-6
  scale_init: Initializer = nn.initializers.ones
  implementation: Implementation | None = None

  @nn.compact
  def __call__(
    self, carry: tuple[Array, Array], inputs: Array
  ) -> tuple[tuple[Array, Array], Array]:
    """One time step: `((c, h), inputs)` to `((c, h), h)`."""
    params, _ = _cell_variables(self, inputs, 'ifgo')
    return recurrent.layer_norm_lstm(
      params,
      carry,
      inputs,
      implementation=self.implementation,
      **_cell_options(self),
    )


@documented(nn.GRUCell)
class LayerNormGRUCell(nn.GRUCell):
  """A layer-normalized GRU cell, in place of `flax.linen.GRUCell`.

  The parameters of Flax's cell under Flax's names, and those of the norms under
  `norm_i` (of the input's sums) and `norm_h` (of the hidden state's), whose
  bias stands for `hn/bias`. See `normkit.recurrent.layer_norm_gru`.

  Attributes:
    carry_init: initializer of the carry.
    epsilon: added to the variances.
    scale_init: initializer of the scales of the norms; their biases are zero.
    implementation: as `normkit.layer_norm` takes it.

  References:
    Ba, Kiros and Hinton, "Layer Normalization" (2016).

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> from flax import linen as nn
    >>> rnn = nn.RNN(normkit.linen.LayerNormGRUCell(4))
    >>> x = jnp.ones((2, 5, 3))
    >>> variables = rnn.init(jax.random.key(0), x)
    >>> rnn.apply(variables, x, seq_lengths=jnp.array([5, 2])).shape
    (2, 5, 4)
  """

  _: KW_ONLY
  epsilon: Scalar = 1e-6
  scale_init: Initializer = nn.initializers.ones
  implementation: Implementation | None = None

  @nn.compact
  def __call__(self, carry: Array, inputs: Array) -> tuple[Array, Array]:
    """One time step: `(h, inputs)` to `(h, h)`."""
    params, _ = _cell_variables(self, inputs, 'rzn')
    return recurrent.layer_norm_gru(
      params,
      carry,
      inputs,
      implementation=self.implementation,
      **_cell_options(self),
    )


@documented(nn.LSTMCell)
class BatchNormLSTMCell(nn.LSTMCell):
  """A batch-normalized LSTM cell, in place of `flax.linen.LSTMCell`.

  The parameters are those of Flax's cell and the scales of the norms, `norm_i`
  and `norm_h` without a bias and `norm_c` with one; `batch_stats` holds mean,
  var and count of each time step under the same names. See
  `normkit.recurrent.batch_norm_lstm`.

  Run it with `normkit.linen.RNN`, which tells the cell where sequences end.
  Flax's RNN does not: there, say `variable_carry='batch_stats'` in training and
  `variable_broadcast=('params', 'batch_stats')` in evaluation, and where
  `seq_lengths` are given, give them to the carry too, or the padding enters the
  statistics: `initial_carry=carry.with_lengths(seq_lengths)`, with the carry
  from `initialize_carry`.

  Attributes:
    carry_init: initializer of the carry; small noise keeps the hidden state
      from being constant in the first time step.
    max_length: how many time steps have statistics of their own; later ones
      share the last.
    use_running_average: normalize with the stored statistics; given here or at
      the call, not both. An RNN gives the cell no such argument.
    momentum: the share of the old running value that is kept; None weighs all
      updates equally.
    epsilon: added to the variances.
    scale_init: initializer of the scales of the norms, 0.1 unless given.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.

  References:
    Cooijmans, Ballas, Laurent, Gülçehre and Courville, "Recurrent Batch
    Normalization" (2017).

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> cell = normkit.linen.BatchNormLSTMCell(
    ...   4, max_length=5, use_running_average=False
    ... )
    >>> rnn, x = normkit.linen.RNN(cell), jnp.ones((2, 5, 3))
    >>> variables = rnn.init(jax.random.key(0), x)
    >>> lengths = jnp.array([5, 2])
    >>> y, updates = rnn.apply(
    ...   variables, x, seq_lengths=lengths, mutable=['batch_stats']
    ... )
    >>> updates['batch_stats']['cell']['norm_c']['mean'].shape
    (5, 4)
  """

  _: KW_ONLY
  max_length: int
  use_running_average: bool | None = None
  momentum: Scalar | None = 0.99
  epsilon: Scalar = 1e-5
  scale_init: Initializer = nn.initializers.constant(0.1)
  axis_name: AxisName | None = None
  axis_index_groups: Groups | None = None

  @nn.compact
  def __call__(
    self,
    carry: recurrent.BatchNormLSTMCarry,
    inputs: Array,
    use_running_average: bool | None = None,
  ) -> tuple[recurrent.BatchNormLSTMCarry, Array]:
    """One time step: `(carry, inputs)` to `(carry, h)`."""
    evaluates = nn.merge_param(
      'use_running_average', self.use_running_average, use_running_average
    )
    train = not evaluates and not self.is_initializing()
    initial = recurrent.init_batch_norm_lstm(self.features, self.max_length)
    params, variables = _cell_variables(self, inputs, 'ifgo', initial)
    carry, y, state = recurrent.batch_norm_lstm(
      params,
      jax.tree.map(lambda v: v.value, variables),
      carry,
      inputs,
      train=train,
      momentum=self.momentum,
      axis_name=self.axis_name,
      axis_index_groups=self.axis_index_groups,
      **_cell_options(self),
    )
    if train:
      leaves = jax.tree.leaves(variables), jax.tree.leaves(state)
      for variable, value in zip(*leaves, strict=True):
        variable.value = value
    return carry, y

  @nn.nowrap
  def initialize_carry(  # type: ignore[override]
    self, rng: Array, input_shape: tuple[int, ...]
  ) -> recurrent.BatchNormLSTMCarry:
    """A carry at time step zero, of sequences without end.

    An RNN calls this before its loop; initialising, this makes the variables,
    which a loop that carries them cannot do.
    """
    c, h = super().initialize_carry(rng, input_shape)
    step = jnp.zeros(input_shape[:-1], jnp.int32)
    carry = recurrent.BatchNormLSTMCarry(c, h, step)
    if self.scope is not None and self.is_initializing():
      self(carry, jnp.zeros(input_shape, self.param_dtype))
    return carry


class RNN(nn.RNN):
  """Runs a cell over a sequence, in place of `flax.linen.RNN`.

  It differs in two defaults: a cell that keeps `batch_stats` carries them from
  step to step, and the batch-normalized LSTM is told `seq_lengths`, so that
  padding does not enter its statistics.

  Attributes:
    cell: the cell; the other fields too are those of `flax.linen.RNN`.
    variable_carry: the collections that are carried.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> rnn = normkit.linen.RNN(normkit.linen.LayerNormGRUCell(4))
    >>> x = jnp.ones((2, 5, 3))
    >>> rnn.apply(rnn.init(jax.random.key(0), x), x).shape
    (2, 5, 4)
  """

  variable_carry: Any = 'batch_stats'

  def __call__(
    self,
    inputs: Array,
    *,
    initial_carry: Any = None,
    init_key: Array | None = None,
    seq_lengths: Array | None = None,
    time_major: bool | None = None,
    **kwargs: Any,
  ) -> Any:
    """Runs the cell; the arguments are those of `flax.linen.RNN`."""
    major = self.time_major if time_major is None else time_major
    if initial_carry is None or self.is_initializing():
      key = jax.random.key(0) if init_key is None else init_key
      shape = _step_shape(inputs, self.cell, major)
      carry = self.cell.initialize_carry(key, shape)
      initial_carry = carry if initial_carry is None else initial_carry
    if isinstance(initial_carry, recurrent.BatchNormLSTMCarry):
      initial_carry = initial_carry.with_lengths(seq_lengths)
    if self.variable_carry == 'batch_stats' and not (
      self.is_mutable_collection('batch_stats')
    ):  # what cannot change cannot be carried; this is the module of one call
      broadcast = union_filters(self.variable_broadcast, 'batch_stats')
      object.__setattr__(self, 'variable_broadcast', broadcast)
      object.__setattr__(self, 'variable_carry', False)
    return super().__call__(
      inputs,
      initial_carry=initial_carry,
      seq_lengths=seq_lengths,
      time_major=major,
      **kwargs,
    )


def _step_shape(
  inputs: Array, cell: nn.RNNCellBase, time_major: bool
) -> tuple[int, ...]:
  """The shape of the input of one time step."""
  time = 0 if time_major else inputs.ndim - cell.num_feature_axes - 1
  return (*inputs.shape[:time], *inputs.shape[time + 1 :])


class _CellNorm(nn.Module):
  """The parameters of one norm of a cell, and its statistics if it has any."""

  width: int
  scale_init: Initializer
  use_bias: bool
  param_dtype: DType

  @nn.compact
  def __call__(
    self, initial: _running.BatchNormState | None
  ) -> tuple[norm.NormParams, Any]:
    shape, dtype = (self.width,), self.param_dtype
    scale, bias = self.param('scale', self.scale_init, shape, dtype), None
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, shape, dtype)
    stats = map_fields(
      lambda name, value: self.variable('batch_stats', name, lambda: value),
      initial,
      'stats',
    )
    return norm.NormParams(scale, bias), stats


def _cell_variables(
  cell: Any,
  inputs: Array,
  gates: str,
  initial: recurrent.BatchNormLSTMState | None = None,
) -> tuple[recurrent.CellParams, Any]:
  """The parameters of a cell, its gates side by side, and its statistics."""
  is_gru, width = 'n' in gates, len(gates) * cell.features
  hidden = jax.ShapeDtypeStruct((cell.features,), cell.param_dtype)

  def dense(kind: str, x: Any, init: Initializer, use_bias: bool) -> Any:
    layers = [
      DenseParams(
        features=cell.features,
        use_bias=use_bias,
        param_dtype=cell.param_dtype,
        kernel_init=init,
        bias_init=cell.bias_init,
        name=kind + gate,
      )(x)
      for gate in gates
    ]
    kernels, biases = zip(*layers, strict=True)
    bias = jnp.concatenate(biases) if use_bias else None
    return jnp.concatenate(kernels, axis=-1), bias

  kernel_i, bias_i = dense('i', inputs, cell.kernel_init, is_gru)
  kernel_h, bias_h = dense('h', hidden, cell.recurrent_kernel_init, not is_gru)
  widths = {'norm_i': width, 'norm_h': width, 'norm_c': cell.features}
  if is_gru:
    del widths['norm_c']
  norms, stats = {}, {}
  for name, wide in widths.items():
    norms[name], stats[name] = _CellNorm(
      wide,
      cell.scale_init,
      initial is None or name == 'norm_c',
      cell.param_dtype,
      name=name,
    )(None if initial is None else getattr(initial, name))
  params = recurrent.CellParams(
    kernel_i, kernel_h, bias_i if is_gru else bias_h, **norms
  )
  return params, None if initial is None else type(initial)(**stats)


def _cell_options(cell: Any) -> dict[str, Any]:
  """The options that all cells share."""
  names = 'epsilon', 'gate_fn', 'activation_fn', 'dtype'
  return {name: getattr(cell, name) for name in names}
