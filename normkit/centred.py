"""Sums about a pivot: the mean in two parts, the variance, and derivatives.

All statistics are taken about a pivot, a value near the mean that is the same
for every element of a set, so that a large common mean cancels before anything
is squared:

  d = x - pivot,  offset = E[d],  var = E[|d|^2] - |offset|^2.

The mean is pivot + offset, kept in two parts.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from normkit import _types
from normkit._types import Array, DType


class Centred(NamedTuple):
  """Moments about a pivot: the mean is pivot + offset, in two parts.

  All four broadcast against the input they were taken from. The pivot takes no
  part in differentiation, since the moments do not depend on it.
  """

  pivot: Array
  offset: Array
  var: Array
  count: Array  # type: ignore[assignment]


# What a policy of `jax.checkpoint` knows the statistics by.
STATISTICS = 'normkit.statistics'


def named(values: Any) -> Any:
  """Statistics by the name that such a policy knows."""
  return jax.tree.map(
    functools.partial(checkpoint_name, name=STATISTICS), values
  )


# The pivot of the one-pass form is the mean of a sample: one element in so
# many, and at least so many. Whatever the data, it lies within the square root
# of SAMPLE_STRIDE standard deviations of the mean, which costs the variance at
# most a few times SAMPLE_STRIDE roundings; for most data, none.
SAMPLE_STRIDE, SAMPLE_SIZE = 32, 16


# XLA's GPU compiler keeps a row on chip up to about here (it does with 8,192
# elements, and not with 32,768): then two passes are one, 2 n against 3 n.
SHORT_ROW = 16_384


@functools.partial(
  jax.jit, static_argnames=('axes', 'center', 'dtype', 'output_alone')
)
def centred(
  x: Array,
  axes: tuple[int, ...],
  where: Array | None = None,
  center: bool = True,
  dtype: DType | None = None,
  output_alone: bool = True,
) -> Centred:
  """Moments over `axes`, kept with size one, in float32 or wider.

  With `center=False` the mean is taken as zero, as in RMS norm. `output_alone`
  says that they are used for the norm's output and not returned themselves.
  """
  dtype = _types.statistics_dtype(x.dtype if dtype is None else dtype)
  count = counts(x, axes, where, _types.real_dtype(dtype))
  if not center:
    var = named(_mean_square(x, where, count, axes, dtype))
    zero = jnp.zeros_like(var, dtype)
    return Centred(zero, zero, var, count)
  pivot, offset, var = _local(x, where, count, axes, dtype, output_alone)
  return Centred(lax.stop_gradient(pivot), offset, var, count)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(3, 4))
def _mean_square(
  x: Array,
  where: Array | None,
  count: Array,
  axes: tuple[int, ...],
  dtype: DType,
) -> Array:
  """E[|x|^2], of which x is kept for the backward, and not its wide copy."""
  return _mean(square(_valid(x.astype(dtype), where)), axes, count)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _local(
  x: Array,
  where: Array | None,
  count: Array,
  axes: tuple[int, ...],
  dtype: DType,
  output_alone: bool = True,
) -> tuple[Array, Array, Array]:
  """Pivot, offset and variance.

  Reads of x until the output is written, as compiled for H200 and TPU: 2 with
  the sampled pivot, 3 with the mean as pivot, for which masks ask: they may
  hide the sample. Where a row stays on an H200's chip it is 1 with the mean as
  pivot, but only with `output_alone`: as soon as a derivative uses the
  statistics too, the compiler keeps wide copies of x instead (14 n for layer
  norm, its output and gradients, against 6 n). A CPU keeps a row in its cache.

  bfloat16 takes a pivot of zero there, which is known before x is: the sums
  are then taken where x is made. A step of ResNet-50 on H200 moves .8 GiB of
  47.8 less. Squares of bfloat16 are exact in float32, and what cancellation
  costs is an eighth at most of what rounding x to bfloat16 has cost already.
  """
  if where is not None:
    return _two_pass(x, count, axes, dtype, where)
  forms: dict[str, Callable[..., Any]] = {'default': _one_pass}
  if x.dtype == jnp.bfloat16:
    forms |= {'cuda': _about_zero, 'tpu': _about_zero}
  if axes == (x.ndim - 1,) and x.shape[-1] <= SHORT_ROW:
    forms |= {'cpu': _two_pass} | ({'cuda': _two_pass} if output_alone else {})
  if len(forms) == 1:
    return _one_pass(x, count, axes, dtype)
  options = {'axes': axes, 'dtype': dtype}
  stats: tuple[Array, Array, Array] = lax.platform_dependent(
    x, count, **{n: functools.partial(f, **options) for n, f in forms.items()}
  )
  return stats


@_local.defjvp
def _local_jvp(
  axes: tuple[int, ...],
  dtype: DType,
  output_alone: bool,
  primals: Any,
  tangents: Any,
) -> tuple[Any, Any]:
  """The statistics, and how they change with x; the pivot is held."""
  del output_alone
  x, where, count = primals
  pivot, offset, var = named(_local(x, where, count, axes, dtype, False))
  stats = Centred(pivot, offset, var, count)
  doffset, dvar = changes(x, stats, tangents[0], axes, where)
  return (pivot, offset, var), (jnp.zeros_like(pivot), doffset, dvar)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(3,))
def changes(
  x: Array,
  stats: Centred,
  dx: Array,
  axes: tuple[int, ...],
  where: Array | None = None,
) -> tuple[Array, Array]:
  """dE[x] = E[dx] and dVar[x] = 2 E[(x - E[x]) dx].

  Checkpointed, so that x is kept for the backward, and not x - E[x] beside it.
  """
  dtype = stats.pivot.dtype
  dx = _valid(dx.astype(dtype), where)
  d = _valid((x.astype(dtype) - stats.pivot) - stats.offset, where)
  dvar = 2 * _mean((d.conj() * dx).real, axes, stats.count)
  return _mean(dx, axes, stats.count), dvar


def _one_pass(
  x: Array, count: Array, axes: tuple[int, ...], dtype: DType
) -> tuple[Array, Array, Array]:
  """About the mean of a sample: both sums come from one read of x."""
  sample = _sample(x, axes).astype(dtype)
  pivot = fixed(jnp.mean(sample, axes, keepdims=True))
  return _about(pivot, x, count, axes)


def _two_pass(
  x: Array,
  count: Array,
  axes: tuple[int, ...],
  dtype: DType,
  where: Array | None = None,
) -> tuple[Array, Array, Array]:
  """About the mean, whose rounding error the offset holds."""
  pivot = fixed(_mean(_valid(x.astype(dtype), where), axes, count))
  return _about(pivot, x, count, axes, where)


def _about_zero(
  x: Array, count: Array, axes: tuple[int, ...], dtype: DType
) -> tuple[Array, Array, Array]:
  """The textbook's E[x^2] - E[x]^2."""
  shape = [1 if a in axes else size for a, size in enumerate(x.shape)]
  return _about(_types.vary(jnp.zeros(shape, dtype), x), x, count, axes)


def fixed(pivot: Array) -> Array:
  """The pivot as one number, wherever it is used.

  Compilers compute it again beside each use, where its last product becomes
  part of a fused multiply-add: unrounded there, and rounded elsewhere. A
  comparison in between, which no finite number fails, keeps it out.
  """
  if jnp.iscomplexobj(pivot):
    return lax.complex(fixed(pivot.real), fixed(pivot.imag))
  return jnp.maximum(pivot, jnp.finfo(pivot.dtype).min)


def _about(
  pivot: Array,
  x: Array,
  count: Array,
  axes: tuple[int, ...],
  where: Array | None = None,
) -> tuple[Array, Array, Array]:
  d = _valid(x.astype(pivot.dtype) - pivot, where)
  offset = _mean(d, axes, count)
  var = _mean(square(d), axes, count) - square(offset)
  return pivot, offset, jnp.maximum(var, 0)


def _mean(values: Array, axes: tuple[int, ...], count: Array) -> Array:
  return jnp.sum(values, axes, keepdims=True) / jnp.maximum(count, 1)


def _valid(values: Array, where: Array | None) -> Array:
  return values if where is None else jnp.where(where, values, 0)


def _sample(x: Array, axes: tuple[int, ...]) -> Array:
  """Some elements of each set, evenly spaced.

  Small steps along several axes, rather than a large one, mostly divide the
  shards of a sharded axis, and then nothing moves between devices. The last
  axis is left whole, for its elements share memory transactions (where it is
  the only one, the sample is its first elements), and so is one that an
  explicit mesh shards, which cannot be sliced.
  """
  size, last = math.prod(x.shape[a] for a in axes), x.ndim - 1
  steps = min(SAMPLE_STRIDE, size // SAMPLE_SIZE).bit_length() - 1
  free = [a for a in axes if a not in _types.sharded_axes(x)]
  if free == [last]:
    return x[..., : -(-x.shape[last] // 2 ** max(steps, 0))]
  free = [a for a in free if a != last]
  step = [1] * x.ndim
  for _ in range(steps):
    fits = [a for a in free if 2 * step[a] <= x.shape[a]]
    if fits:
      step[min(fits, key=step.__getitem__)] *= 2
  return x[tuple(slice(None, None, s) for s in step)]


def counts(
  x: Array, axes: tuple[int, ...], where: Array | None, dtype: DType
) -> Array:
  """How many elements count along `axes`, in `dtype`."""
  if where is None:
    return jnp.full((1,) * x.ndim, math.prod(x.shape[a] for a in axes), dtype)
  repeats = math.prod(x.shape[a] for a in axes if where.shape[a] == 1)
  repeats = jnp.full((), repeats, dtype)  # more than an int32 holds
  return jnp.sum(where, axes, keepdims=True, dtype=dtype) * repeats


def square(x: Array) -> Array:
  """|x|^2, real."""
  if jnp.iscomplexobj(x):
    return jnp.square(x.real) + jnp.square(x.imag)
  return jnp.square(x)
