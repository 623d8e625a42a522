"""Recurrent cells with norms, and what runs them over a sequence."""

from typing import Any

from flax import nnx
from flax.typing import Initializer
import jax.numpy as jnp

from normkit import _types, norm, recurrent
from normkit._types import (
  Array,
  AxisName,
  DType,
  Groups,
  Implementation,
  Scalar,
)
from normkit.nnx._shared import Running, read, with_signature_of, write
from normkit.norms import _running

_TENTH = nnx.initializers.constant(0.1)


@with_signature_of(nnx.OptimizedLSTMCell)
class LayerNormLSTMCell(nnx.OptimizedLSTMCell):
  """A layer-normalized LSTM cell, in place of `flax.nnx.OptimizedLSTMCell`.

  The variables of Flax's cell, whose kernels hold the gates i, f, g, o side by
  side, and those of three norms. See `normkit.recurrent.layer_norm_lstm`.

  Args:
    in_features: number of input features.
    hidden_features: number of hidden units.
    epsilon: added to the variances.
    scale_init: initializer of the scales of the norms; their biases are zero.
    implementation: as `normkit.layer_norm` takes it.
    rngs: gives a key for each parameter.
    **options: the other arguments of Flax's cell: `gate_fn`, `activation_fn`,
      `kernel_init`, `recurrent_kernel_init`, `bias_init`, `dtype`,
      `param_dtype` and so on; `promote_dtype` is not called.

  Attributes:
    norm_i: holds scale and bias of the norm of the input's sums.
    norm_h: holds those of the norm of the hidden state's sums.
    norm_c: holds those of the norm of the memory.

  References:
    Ba, Kiros and Hinton, "Layer Normalization" (2016).

  Examples:
    >>> import jax.numpy as jnp, normkit.nnx
    >>> from flax import nnx
    >>> cell = normkit.nnx.LayerNormLSTMCell(3, 4, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((2, 5, 3))
    >>> nnx.RNN(cell)(x, seq_lengths=jnp.array([5, 2])).shape
    (2, 5, 4)
  """

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    epsilon: Scalar = 1e-6,
    scale_init: Initializer = nnx.initializers.ones,
    implementation: Implementation | None = None,
    rngs: nnx.Rngs,
    **options: Any,
  ) -> None:
    super().__init__(in_features, hidden_features, rngs=rngs, **options)
    self.epsilon = epsilon
    self.implementation = implementation
    for name, width in _lstm_norms(hidden_features).items():
      setattr(self, name, _CellNorm(width, scale_init, self.param_dtype, rngs))

  def __call__(
    self, carry: tuple[Array, Array], inputs: Array
  ) -> tuple[tuple[Array, Array], Array]:
    """One time step: `((c, h), inputs)` to `((c, h), h)`."""
    return recurrent.layer_norm_lstm(
      _cell_params(self),
      carry,
      inputs,
      implementation=self.implementation,
      **_cell_options(self),
    )


@with_signature_of(nnx.GRUCell)
class LayerNormGRUCell(nnx.GRUCell):
  """A layer-normalized GRU cell, in place of `flax.nnx.GRUCell`.

  The variables of Flax's cell, whose kernels hold the gates r, z, n side by
  side, and those of two norms. See `normkit.recurrent.layer_norm_gru`.

  Args:
    in_features: number of input features.
    hidden_features: number of hidden units.
    epsilon: added to the variances.
    scale_init: initializer of the scales of the norms; their biases are zero.
    implementation: as `normkit.layer_norm` takes it.
    rngs: gives a key for each parameter.
    **options: the other arguments of Flax's cell: `gate_fn`, `activation_fn`,
      `kernel_init`, `recurrent_kernel_init`, `bias_init`, `dtype`,
      `param_dtype` and so on; `promote_dtype` is not called.

  Attributes:
    norm_i: holds scale and bias of the norms of the input's sums.
    norm_h: holds those of the norms of the hidden state's sums.

  References:
    Ba, Kiros and Hinton, "Layer Normalization" (2016).

  Examples:
    >>> import jax.numpy as jnp, normkit.nnx
    >>> from flax import nnx
    >>> cell = normkit.nnx.LayerNormGRUCell(3, 4, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((2, 5, 3))
    >>> nnx.RNN(cell)(x, seq_lengths=jnp.array([5, 2])).shape
    (2, 5, 4)
  """

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    epsilon: Scalar = 1e-6,
    scale_init: Initializer = nnx.initializers.ones,
    implementation: Implementation | None = None,
    rngs: nnx.Rngs,
    **options: Any,
  ) -> None:
    super().__init__(in_features, hidden_features, rngs=rngs, **options)
    self.epsilon = epsilon
    self.implementation = implementation
    for name in ('norm_i', 'norm_h'):
      wide = 3 * hidden_features
      setattr(self, name, _CellNorm(wide, scale_init, self.param_dtype, rngs))

  def __call__(self, carry: Array, inputs: Array) -> tuple[Array, Array]:
    """One time step: `(h, inputs)` to `(h, h)`."""
    return recurrent.layer_norm_gru(
      _cell_params(self),
      carry,
      inputs,
      implementation=self.implementation,
      **_cell_options(self),
    )


@with_signature_of(nnx.OptimizedLSTMCell)
class BatchNormLSTMCell(Running, nnx.OptimizedLSTMCell):
  """A batch-normalized LSTM cell, in place of `flax.nnx.OptimizedLSTMCell`.

  The variables of Flax's cell, whose kernels hold the gates i, f, g, o side by
  side, and scales and statistics of three norms, of which that of the memory
  alone has a bias. See `normkit.recurrent.batch_norm_lstm`.

  Run it with `normkit.nnx.RNN`, which tells the cell where sequences end.
  Flax's RNN does not: there, where `seq_lengths` are given, give them to the
  carry too, or the padding enters the statistics:
  `initial_carry=carry.with_lengths(seq_lengths)`, with the carry from
  `initialize_carry`.

  Args:
    in_features: number of input features.
    hidden_features: number of hidden units.
    max_length: how many time steps have statistics of their own; later ones
      share the last.
    use_running_average: normalize with the stored statistics; the call beats
      it. None leaves it to the call.
    momentum: the share of the old running value that is kept (PyTorch's 0.1 is
      0.9 here). None weighs all updates equally.
    epsilon: added to the variances.
    scale_init: initializer of the scales of the norms, 0.1 unless given.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    rngs: gives a key for each parameter.
    **options: the other arguments of Flax's cell: `gate_fn`, `activation_fn`,
      `kernel_init`, `recurrent_kernel_init`, `bias_init`, `dtype`,
      `param_dtype` and so on; `promote_dtype` is not called.

  Attributes:
    norm_i: holds scale, mean, var and count of the norm of the input's sums.
    norm_h: holds those of the norm of the hidden state's sums.
    norm_c: holds those of the norm of the memory, and its bias.

  References:
    Cooijmans, Ballas, Laurent, Gülçehre and Courville, "Recurrent Batch
    Normalization" (2017).

  Examples:
    >>> import jax.numpy as jnp, normkit.nnx
    >>> from flax import nnx
    >>> cell = normkit.nnx.BatchNormLSTMCell(
    ...   3, 4, max_length=5, rngs=nnx.Rngs(0)
    ... )
    >>> rnn, x = normkit.nnx.RNN(cell), jnp.ones((2, 5, 3))
    >>> rnn(x, seq_lengths=jnp.array([4, 2])).shape
    (2, 5, 4)
    >>> cell.norm_c.count[:, 0].tolist()
    [1, 1, 1, 1, 0]
  """

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    max_length: int,
    use_running_average: bool | None = False,
    momentum: Scalar | None = 0.99,
    epsilon: Scalar = 1e-5,
    scale_init: Initializer = _TENTH,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups | None = None,
    rngs: nnx.Rngs,
    **options: Any,
  ) -> None:
    super().__init__(in_features, hidden_features, rngs=rngs, **options)
    self.use_running_average = use_running_average
    self.momentum = momentum
    self.epsilon = epsilon
    self.axis_name = axis_name
    self.axis_index_groups = _types.hashable(axis_index_groups)
    initial = recurrent.init_batch_norm_lstm(hidden_features, max_length)
    for name, width in _lstm_norms(hidden_features).items():
      made = _CellNorm(
        width,
        scale_init,
        self.param_dtype,
        rngs,
        use_bias=name == 'norm_c',
        stats=getattr(initial, name),
      )
      setattr(self, name, made)

  def __call__(  # type: ignore[override]
    self,
    carry: recurrent.BatchNormLSTMCarry,
    inputs: Array,
    use_running_average: bool | None = None,
  ) -> tuple[recurrent.BatchNormLSTMCarry, Array]:
    """One time step: `(carry, inputs)` to `(carry, h)`."""
    train = not self._evaluates(use_running_average)
    names = recurrent.BatchNormLSTMState._fields
    stats = recurrent.BatchNormLSTMState(
      *(getattr(self, name).stats() for name in names)
    )
    carry, y, state = recurrent.batch_norm_lstm(
      _cell_params(self),
      read(stats),
      carry,
      inputs,
      train=train,
      momentum=self.momentum,
      axis_name=self.axis_name,
      axis_index_groups=self.axis_index_groups,
      **_cell_options(self),
    )
    if train:
      write(stats, state)
    return carry, y

  def initialize_carry(  # type: ignore[override]
    self, input_shape: tuple[int, ...], *args: Any, **kwargs: Any
  ) -> recurrent.BatchNormLSTMCarry:
    """A carry at time step zero, of sequences without end."""
    c, h = super().initialize_carry(input_shape, *args, **kwargs)
    step = jnp.zeros(input_shape[:-1], jnp.int32)
    return recurrent.BatchNormLSTMCarry(c, h, step)


class RNN(nnx.RNN):
  """Runs a cell over a sequence, in place of `flax.nnx.RNN`.

  It differs in one thing: the batch-normalized LSTM is told `seq_lengths`, so
  that padding does not enter its statistics.

  Args:
    cell: the cell; the other arguments too are those of `flax.nnx.RNN`.

  Examples:
    >>> import jax.numpy as jnp, normkit.nnx
    >>> from flax import nnx
    >>> cell = normkit.nnx.LayerNormGRUCell(3, 4, rngs=nnx.Rngs(0))
    >>> normkit.nnx.RNN(cell)(jnp.ones((2, 5, 3))).shape
    (2, 5, 4)
  """

  def __call__(
    self,
    inputs: Array,
    *,
    initial_carry: Any = None,
    seq_lengths: Array | None = None,
    time_major: bool | None = None,
    rngs: nnx.Rngs | nnx.RngStream | None = None,
    **kwargs: Any,
  ) -> Any:
    """Runs the cell; the arguments are those of `flax.nnx.RNN`."""
    major = self.time_major if time_major is None else time_major
    if initial_carry is None:
      time = 0 if major else inputs.ndim - self.cell.num_feature_axes - 1
      shape = (*inputs.shape[:time], *inputs.shape[time + 1 :])
      stream = self.rngs if rngs is None else rngs
      initial_carry = self.cell.initialize_carry(shape, stream)
    if isinstance(initial_carry, recurrent.BatchNormLSTMCarry):
      initial_carry = initial_carry.with_lengths(seq_lengths)
    return super().__call__(
      inputs,
      initial_carry=initial_carry,
      seq_lengths=seq_lengths,
      time_major=major,
      rngs=rngs,
      **kwargs,
    )


class _CellNorm(nnx.Module):
  """The parameters of one norm of a cell, and its statistics if it has any."""

  def __init__(
    self,
    width: int,
    scale_init: Initializer,
    param_dtype: DType,
    rngs: nnx.Rngs,
    use_bias: bool = True,
    stats: _running.BatchNormState | None = None,
  ) -> None:
    self.scale = nnx.Param(scale_init(rngs.params(), (width,), param_dtype))
    self.bias: Any = nnx.data(None)
    if use_bias:
      self.bias = nnx.Param(jnp.zeros((width,), param_dtype))
    if stats is not None:
      for name, value in stats._asdict().items():
        setattr(self, name, nnx.BatchStat(value))

  def params(self) -> norm.NormParams:
    """The parameters as arrays."""
    return norm.NormParams(*read((self.scale, self.bias)))

  def stats(self) -> _running.BatchNormState:
    """The variables that hold the statistics."""
    names = _running.BatchNormState._fields
    return _running.BatchNormState(*(getattr(self, name) for name in names))


def _lstm_norms(hidden: int) -> dict[str, int]:
  """The names of the norms of an LSTM and their widths."""
  return {'norm_i': 4 * hidden, 'norm_h': 4 * hidden, 'norm_c': hidden}


def _cell_params(cell: Any) -> recurrent.CellParams:
  """The parameters of a cell as its function takes them."""
  is_gru = isinstance(cell, nnx.GRUCell)
  names = ('norm_i', 'norm_h') if is_gru else ('norm_i', 'norm_h', 'norm_c')
  bias = (cell.dense_i if is_gru else cell.dense_h).bias
  return recurrent.CellParams(
    cell.dense_i.kernel[...],
    cell.dense_h.kernel[...],
    read(bias),
    **{name: getattr(cell, name).params() for name in names},
  )


def _cell_options(cell: Any) -> dict[str, Any]:
  """The options that all cells share."""
  names = 'epsilon', 'gate_fn', 'activation_fn', 'dtype'
  return {name: getattr(cell, name) for name in names}
