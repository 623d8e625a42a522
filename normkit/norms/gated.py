"""RMS norm with a gate, of state space models (Dao and Gu 2024)."""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp

from normkit import _shards, _types, arguments, norm, platforms, rows
from normkit._types import (
  Array,
  ArrayLike,
  Axes,
  AxisName,
  DType,
  Groups,
  Implementation,
  Scalar,
)
from normkit.affine import Arguments, activated, widened
from normkit.centred import centred, of_channels
from normkit.kernels.rows import Gate
from normkit.norm import EmptyState, NormParams
from normkit.pooling import pool

_WHY = 'gates are of real numbers'


def gated_rms_norm(
  x: ArrayLike,
  gate: ArrayLike | None,
  scale: ArrayLike | None = None,
  *,
  norm_before_gate: bool = True,
  activation: Callable[[Array], Array] | None = jax.nn.silu,
  group_size: int | None = None,
  axis: Axes = -1,
  scale_offset: float = 0.0,
  round_before_scale: bool = False,
  epsilon: Scalar = 1e-6,
  where: ArrayLike | None = None,
  axis_name: AxisName | None = None,
  axis_index_groups: Groups | None = None,
  dtype: DType | None = None,
  implementation: Implementation | None = None,
) -> Array:
  """RMS normalization and a gate, in either order.

  With z = x * activation(gate) and n(x) = x / sqrt(E[x^2] + epsilon),

    y = n(x) * scale * activation(gate)   if norm_before_gate,
    y = n(z) * scale                      if not,

  the mean square over `axis`, or over groups of neighbouring features, and all
  of it in float32 or wider. The first is the norm of Qwen3-Next, Kimi Linear
  and other gated delta networks; the second that of Mamba 2, Bamba and Zamba 2,
  where the gate also weighs what enters the statistics. The first is the
  default, as in the function that Mamba's authors publish: the two share their
  parameters, and a checkpoint of the other order loads without a word, so a
  Mamba 2 is told `norm_before_gate=False`.

  The kernel takes the last axis or groups of it, without mask and pooling, a
  gate of x's dtype, and an activation as `add_rms_norm` does.

  Args:
    x: array of any shape, float16, bfloat16, float32 or float64.
    gate: array of the shape of x, before its activation. None: no gate, which
      is RMS norm.
    scale: of the shape of the axes `axis`, or of x's rank and broadcasting
      against it. None: one.
    norm_before_gate: normalize x, and multiply by the gate last.
    activation: a function of an array, elementwise, of the gate in float32 or
      wider: SiLU, or `jax.nn.sigmoid` in Kimi Linear. None: the gate itself.
    group_size: how many neighbouring features share statistics; it divides
      their number, and `axis` is one axis. None: all of them.
    axis: the normalized axes, an integer or several.
    scale_offset: added to `scale`, in float32 or wider; 1 for weights around
      zero, as in Gemma.
    round_before_scale: round the normalized values to x's dtype before `scale`
      multiplies them, and their product to the wider dtype of both, as in
      Mamba 2 and Qwen3-Next.
    epsilon: added to the mean square, not negative; a number or a scalar array.
    where: boolean mask that broadcasts to x; elements where it is False change
      neither the statistics nor any other output, and a value of x or the gate
      there that is not finite counts as zero. A row with no element left gives
      zeros.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    dtype: dtype of the result; None keeps x's.
    implementation: 'mosaic_gpu', 'xla', or None to choose.

  Returns:
    An array of the shape of x.

  Raises:
    TypeError: if x or the gate, or what `activation` makes of it, is not real
      and floating-point, `activation` no function, `group_size` no integer, or
      as `normalize` raises.
    ValueError: if the gate or what `activation` makes of it has another shape
      than x, if `group_size` does not divide the features or there are several
      axes of them, or as `normalize` raises.
    NotImplementedError: as `normalize` does.

  References:
    Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient
    Algorithms Through Structured State Space Duality" (2024), section 7.2.
    Yang, Kautz and Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with
    Delta Rule" (2024), section 3.4.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x, gate = jnp.array([[2., 2.]]), jnp.array([[0., 3.]])
    >>> nk.gated_rms_norm(x, gate, activation=None, epsilon=0.).tolist()
    [[0.0, 3.0]]
    >>> nk.gated_rms_norm(
    ...   x, gate, norm_before_gate=False, activation=None, epsilon=0.
    ... ).round(3).tolist()
    [[0.0, 1.4140000343322754]]
  """
  x = arguments.check_real(x, _WHY)
  gate = _check_gate(gate, x)
  axes = _types.check_axes(axis, x.ndim)
  if axis_name is None:
    arguments.check_some_axes(axes, x.shape)
  _types.check_not_empty(x.shape, axes)
  arguments.check_activation(activation)
  gates_last = _types.check_flag(norm_before_gate, 'norm_before_gate')
  groups = _number_of_groups(x.shape, axes, group_size)
  args = arguments.check_arguments(
    x,
    scale,
    None,
    axes,
    epsilon,
    where,
    dtype,
    implementation,
    scale_offset,
    round_before_scale,
  )
  wide = args.statistics_dtype
  if gate is not None:
    wide = _types.promote(wide, gate.dtype)
    arguments.check_elementwise(activation, x.shape, wide)
  if (implementation or platforms.preferred()) not in (None, 'xla'):
    is_pooled = axis_name is not None or axis_index_groups is not None
    gating = Gate(activation, gates_last)
    given = x, gate, args, axes, is_pooled, implementation, gating, groups
    if (found := _by_rows(*given)) is not None:
      return found
  args = args._replace(statistics_dtype=wide)

  def run(x: Array, args: Arguments, gate: Array | None) -> Array:
    x = arguments.known(x, args.where, args.statistics_dtype)
    factor = None
    if gate is not None:
      gate = arguments.known(gate, args.where, args.statistics_dtype)
      factor = Gate(activation, gates_last).factor(gate)
    if factor is not None and not gates_last:
      x = x * factor
    if groups is None:
      stats = centred(x, axes, args.where, center=False)
    else:  # a group of channels alone is a set
      parted = axes[0], groups
      stats = centred(x, (), args.where, center=False, groups=parted)
    stats = pool(stats, axis_name, axis_index_groups, center=False)
    if groups is not None:
      stats = of_channels(stats, axes[0], x)
    last = None
    if factor is not None and gates_last:
      last = functools.partial(jnp.multiply, factor)
    return activated(x, stats, args, False, last)

  y: Array = widened(run, x, args, gate)
  return y


def _by_rows(
  x: Array,
  gate: Array | None,
  args: Arguments,
  axes: tuple[int, ...],
  is_pooled: bool,
  implementation: Implementation | None,
  gating: Gate,
  groups: int | None,
) -> Array | None:
  """By a kernel, of which groups of features are heads; or None for XLA's."""
  shape, last, scale = x.shape, x.ndim - 1, args.scale
  if groups is not None and axes == (last,):
    is_other = scale is not None and scale.shape[:-1] != (1,) * last
    if is_other or args.where is not None or last in _shards.sharded_axes(x):
      why = 'groups of features that have a mask, a scale of more, or are apart'
      _types.refuse_kernel(implementation, why)
      return None
    parted = groups, shape[-1] // groups
    x = x.reshape(*shape[:-1], *parted)
    gate = None if gate is None else gate.reshape(x.shape)
    if scale is not None:
      args = args._replace(scale=scale.reshape((1,) * last + parted))
    axes = (last + 1,)
  given = None if gate is None else (gate, gating)
  options = x, args, axes, is_pooled, False, implementation
  found = rows.normalize_rows(*options, gate=given)
  return None if found is None else found[0].reshape(shape)


def _check_gate(gate: ArrayLike | None, x: Array) -> Array | None:
  """Returns the gate, of the shape of x, or None."""
  if gate is None:
    return None
  gate = arguments.check_real(gate, _WHY, 'gate')
  if gate.shape != x.shape:
    raise ValueError(
      f'gate of shape {gate.shape} is not of the shape {x.shape} of x: each '
      'element has a gate of its own. Broadcast it first, for example with '
      'jnp.broadcast_to.'
    )
  return gate


def _number_of_groups(
  shape: tuple[int, ...], axes: tuple[int, ...], size: int | None
) -> int | None:
  """How many groups of `size` features there are, or None for one of all."""
  if size is None:
    return None
  if not _types.is_integer(size):
    raise TypeError(f'group_size must be an integer or None, got {size!r}.')
  if len(axes) != 1:
    raise ValueError(
      f'group_size={size} is of neighbours along one axis, and the normalized '
      f'axes are {axes}. Give one axis, or group_size=None.'
    )
  features = shape[axes[0]]
  if size < 1 or features % size:
    raise ValueError(
      f'group_size={size} does not divide the {features} features of x of '
      f'shape {shape}. Give a divisor of {features}.'
    )
  return features // size


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedRMSNorm(norm.Options):
  """RMS norm with a gate as a transform; see `gated_rms_norm`.

  The scale has the shape of the normalized axes; there is no bias and no state.
  The gate is an argument of `apply`.

  Attributes:
    norm_before_gate: normalize x, and multiply by the gate last; False for
      Mamba 2.
    activation: a function of an array, elementwise, of the gate in float32 or
      wider. None: the gate itself.
    group_size: how many neighbouring features share statistics; None for all.
    axis: the normalized axes, an integer or several.
    epsilon: added to the mean square; a number or a scalar array.
    use_scale: whether there is a scale.
    scale_offset: added to the parameter to make the scale; with 1 it starts at
      zero, as in Gemma.
    round_before_scale: round the normalized values to x's dtype before the
      scale multiplies them, as in Mamba 2 and Qwen3-Next.
    param_dtype: dtype of the parameters that `init` makes.
    dtype: dtype of the result; None keeps x's.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    implementation: 'mosaic_gpu', 'xla', or None to choose.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x, gate = jnp.ones((2, 6)), jnp.zeros((2, 6))
    >>> mamba = nk.GatedRMSNorm(norm_before_gate=False, group_size=3)
    >>> params, state = mamba.init(x)
    >>> y, state = mamba.apply(params, state, x, gate, train=True)
    >>> y.shape, params.scale.shape
    ((2, 6), (6,))
  """

  norm_before_gate: bool = True
  activation: Callable[[Array], Array] | None = jax.nn.silu
  group_size: int | None = None
  axis: Axes = -1
  round_before_scale: bool = False

  def init(
    self, x: Array | jax.ShapeDtypeStruct
  ) -> tuple[NormParams, EmptyState]:
    """Returns `(params, state)` for inputs like x, an array or its shape."""
    norm.check_like(x)
    axes = _types.check_axes(self.axis, len(x.shape))
    _number_of_groups(x.shape, axes, self.group_size)
    return norm.init_params(x, self.axis, self), EmptyState()

  def apply(
    self,
    params: NormParams,
    state: EmptyState,
    x: ArrayLike,
    gate: ArrayLike | None = None,
    *,
    train: bool,
    where: ArrayLike | None = None,
  ) -> tuple[Array, EmptyState]:
    """Returns `(y, state)`; `train` makes no difference.

    Without a gate it is RMS norm, and so takes every call that other norms do.
    """
    del train
    scale, _ = norm.check_made(params, self)
    norm.check_empty_state(state)
    options = norm.options_of(self, gated_rms_norm)
    return gated_rms_norm(x, gate, scale, where=where, **options), state
