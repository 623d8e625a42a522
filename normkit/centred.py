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
import sys
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from normkit import _ops, _shards, _types, platforms, samples
from normkit._primitives import Sizes
from normkit._types import Array, DType
from normkit.sets import Sets, kind_of, of_groups, spread
from normkit.sums import SMALL, end_of_lanes, means_by_platform


class Centred(NamedTuple):
  """Moments about a pivot: the mean is pivot + offset, in two parts.

  All four broadcast against the input they were taken from. The pivot takes no
  part in differentiation, since the moments do not depend on it.
  """

  pivot: Array
  offset: Array
  var: Array
  count: Array  # type: ignore[assignment]


def of_channels(stats: Centred, channel: int, x: Array) -> Centred:
  """The statistics of groups, for each of their channels in x."""
  pivot, offset, var = (spread(s, channel, x) for s in stats[:3])
  count = stats.count
  if count.shape[channel] > 1:  # or it is one for all groups, and broadcasts
    count = spread(count, channel, x)
  return Centred(pivot, offset, var, count)


# What a policy of `jax.checkpoint` knows the statistics by.
STATISTICS = 'normkit.statistics'


def named(values: Any) -> Any:
  """Statistics by the name that such a policy knows."""
  return jax.tree.map(
    functools.partial(checkpoint_name, name=STATISTICS), values
  )


# XLA's GPU compiler keeps a row on chip up to about here (it does with 8,192
# elements, and not with 32,768): then two passes are one, 2 n against 3 n.
SHORT_ROW = 16_384


def centred(
  x: Array,
  axes: tuple[int, ...],
  where: Array | None = None,
  center: bool = True,
  dtype: DType | None = None,
  output_alone: bool = True,
  given: DType | None = None,
  groups: tuple[int, int] | None = None,
) -> Centred:
  """Moments over `axes`, kept with size one, in float32 or wider.

  With groups, an axis of channels and their number, also over the channels of
  each group.

  With `center=False` the mean is taken as zero, as in RMS norm. `output_alone`
  says that they are used for the norm's output and not returned themselves;
  `given` is the dtype of which x was widened.
  """
  found: Centred = _types.ruled(
    _centred,
    x,
    of_groups(x, axes, *groups) if groups else Sets(axes),
    where,
    center,
    _types.statistics_dtype(x.dtype if dtype is None else dtype),
    Form(jnp.dtype(given or x.dtype), output_alone),
  )
  return found


class Form(NamedTuple):
  """What the choice of a pivot depends on, besides the shape; see `_local`."""

  given: DType
  output_alone: bool


@functools.partial(jax.jit, static_argnums=(1, 3, 4, 5))
def _centred(
  x: Array,
  sets: Sets,
  where: Array | None,
  center: bool,
  dtype: DType,
  form: Form,
) -> Centred:
  count = counts(x, sets, where, _types.real_dtype(dtype))
  if not center:
    var = _types.ruled(_mean_square, x, where, count, sets, dtype)
    zero = jnp.zeros_like(var, dtype)
    return Centred(zero, zero, var, count)
  stats = _types.ruled(_local, x, where, count, sets, dtype, form)
  pivot, offset, var = stats
  return Centred(lax.stop_gradient(pivot), offset, var, count)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _mean_square(
  x: Array,
  where: Array | None,
  count: Array,
  sets: Sets,
  dtype: DType,
) -> Array:
  return sets.mean(square(_valid(x.astype(dtype), where)), count)


@_mean_square.defjvp
def _mean_square_jvp(
  sets: Sets, dtype: DType, primals: Any, tangents: Any
) -> tuple[Array, Array]:
  x, where, count = primals
  var = named(_mean_square(x, where, count, sets, dtype))
  d, dx = (_valid(a.astype(dtype), where) for a in (x, tangents[0]))
  return var, _ops.mul(sets.mean(product(d, dx), count), 2.0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _local(
  x: Array,
  where: Array | None,
  count: Array,
  sets: Sets,
  dtype: DType,
  form: Form,
) -> tuple[Array, Array, Array]:
  """Pivot, offset and variance.

  Reads of x until the output is written, as compiled for H200 and TPU: 2 with
  the sampled pivot, 3 with the mean as pivot, for which masks ask: they may
  hide the sample. Where a row stays on an H200's chip it is 1 with the mean as
  pivot, but only with `output_alone`: as soon as a derivative uses the
  statistics too, the compiler keeps wide copies of x instead (14 n for layer
  norm, its output and gradients, against 6 n). A CPU keeps a row in its cache,
  and so reads it twice for the output alone, where it does not take both sums
  about a pivot in one loop; see `sums.end_of_lanes`.

  bfloat16 takes a pivot of zero there, which is known before x is: the sums
  are then taken where x is made. A step of ResNet-50 on H200 moves .8 GiB of
  47.8 less. Squares of bfloat16 are exact in float32, and what cancellation
  costs is an eighth at most of what rounding x to bfloat16 has cost already.
  """
  pivot = _pivot(lax.stop_gradient(x), where, count, sets, dtype, form)
  return about(pivot, x, count, sets, where, form.given)


def about(
  pivot: Array,
  x: Array,
  count: Array,
  sets: Sets,
  where: Array | None = None,
  given: DType | None = None,
) -> tuple[Array, Array, Array]:
  """Pivot, offset and variance, about a pivot; `given` as in `centred`."""
  d = _valid(_ops.sub(x.astype(pivot.dtype), sets.spread(pivot, x)), where)
  offset, second = means_by_platform(sets, given, count, d, square(d))
  var = _ops.sub(second, square(offset))
  return pivot, offset, _ops.maximum(var, 0.0)


def _pivot(
  x: Array,
  where: Array | None,
  count: Array,
  sets: Sets,
  dtype: DType,
  form: Form,
) -> Array:
  if where is not None:
    return _own_mean(x, count, sets, dtype, where)
  forms: dict[str, Callable[..., Any]] = {'default': _mean_of_sample}
  if samples.num_parts(x, sets.axes) > 1:  # a TPU would write x out for them
    forms['tpu'] = functools.partial(_mean_of_sample, in_parts=False)
  if form.given == jnp.bfloat16:
    forms |= {'cuda': _zero, 'tpu': _zero}
  is_row = sets.are_rows(x)
  is_output = is_row and form.output_alone and _is_short(x.shape[-1])
  end = end_of_lanes(x.shape[-1]) if is_output else sys.maxsize
  if is_row and form.given == dtype == jnp.float32 and samples.has_few(x):
    forms['cpu few alone'] = _mean_of_few
  if samples.is_of_small_images(x, sets.axes):
    forms['cpu alone'] = functools.partial(_mean_of_sample, least=samples.FEW)
  if is_output:
    forms['cpu alone'] = _mean_of_sample
    forms |= dict.fromkeys(('cpu', 'cuda'), _own_mean)
  options = {'sets': sets, 'dtype': dtype}
  runs = {n: functools.partial(f, **options) for n, f in forms.items()}
  kind = kind_of(x, sets, dtype)
  sizes = {
    'cpu few alone': Sizes(range(SMALL + 1, end)),
    'cpu alone': Sizes(range(end)),
  }
  pivot: Array = platforms.dependent(runs, (x, count), kind, sizes=sizes)
  return pivot


def _is_short(row: Any) -> bool:
  return _types.is_known(row) and row <= SHORT_ROW


@_local.defjvp
def _local_jvp(
  sets: Sets,
  dtype: DType,
  form: Form,
  primals: Any,
  tangents: Any,
) -> tuple[Any, Any]:
  """The statistics, and how they change with x; the pivot is held."""
  x, where, count = primals
  form = form._replace(output_alone=False)
  pivot, offset, var = named(_local(x, where, count, sets, dtype, form))
  stats = Centred(pivot, offset, var, count)
  doffset, dvar = changes(x, stats, tangents[0], sets, where)
  return (pivot, offset, var), (jnp.zeros_like(pivot), doffset, dvar)


def changes(
  x: Array,
  stats: Centred,
  dx: Array,
  sets: Sets,
  where: Array | None = None,
) -> tuple[Array, Array]:
  """dE[x] = E[dx] and dVar[x] = 2 E[(x - E[x]) dx].

  The second about the pivot, so that no sum of it waits for the mean.
  """
  dtype = stats.pivot.dtype
  dx = _valid(dx.astype(dtype), where)
  d = _valid(_ops.sub(x.astype(dtype), sets.spread(stats.pivot, x)), where)
  doffset, dsecond = sets.means(stats.count, dx, product(d, dx))
  dvar = _ops.sub(dsecond, product(stats.offset, doffset))
  return doffset, _ops.mul(dvar, 2.0)


def _mean_of_sample(
  x: Array, count: Array, sets: Sets, dtype: DType, **options: Any
) -> Array:
  """Both sums about it come from one read of x; options as in `sample`."""
  del count
  sample = samples.sample(x, sets.axes, **options).astype(dtype)
  size = counts(sample, sets, None, _types.real_dtype(dtype))
  mean = sets.mean(sample, size)
  return fixed(mean) if sets.are_rows(x) or sets.groups else _finite(mean)


def _mean_of_few(x: Array, count: Array, sets: Sets, dtype: DType) -> Array:
  """Of short rows, for one CPU: part of what uses it, and no sum by itself.

  A step of layer norm of 2,000 x 100 takes .9 of Flax's time, and 1.0 without.
  Of several devices each may hold but one of the elements.
  """
  del count, sets
  first, *others = samples.few(x.astype(dtype))
  return fixed(_ops.mul(sum(others, first), 1 / samples.FEW))


def _own_mean(
  x: Array,
  count: Array,
  sets: Sets,
  dtype: DType,
  where: Array | None = None,
) -> Array:
  """The mean, whose rounding error the offset holds."""
  x = _valid(x.astype(dtype), where)
  return fixed(sets.mean(x, count))


def _zero(x: Array, count: Array, sets: Sets, dtype: DType) -> Array:
  """As in the textbook's E[x^2] - E[x]^2."""
  del count
  shape = [1 if a in sets.axes else size for a, size in enumerate(x.shape)]
  if sets.groups is not None:
    shape[sets.channel] = sets.groups
  return _shards.vary(jnp.zeros(shape, dtype), x)


def fixed(pivot: Array) -> Array:
  """The pivot as one number, wherever it is used.

  Compilers compute it again beside each use, where its last product becomes
  part of a fused multiply-add: unrounded there, and rounded elsewhere. A
  comparison in between, which no finite number fails, keeps it out.
  """
  if jnp.iscomplexobj(pivot):
    return lax.complex(fixed(pivot.real), fixed(pivot.imag))
  return _ops.maximum(pivot, float(jnp.finfo(pivot.dtype).min))


def _finite(pivot: Array) -> Array:
  """The same, and zero where it is no number or infinite.

  A CPU's library, which has no such operation, would take x - pivot in, and
  write it out: forward instance norm of 28 x 28 x 28 x 160 in bfloat16 takes
  1.2 of Flax's time so, and 2.4 without. Of rows that takes less in all, and of
  groups as much, with more to compile.
  """
  if jnp.iscomplexobj(pivot):
    return lax.complex(_finite(pivot.real), _finite(pivot.imag))
  return lax.select(lax.is_finite(pivot), pivot, lax.full_like(pivot, 0))


def _valid(values: Array, where: Array | None) -> Array:
  return values if where is None else jnp.where(where, values, 0)


def counts(x: Array, sets: Sets, where: Array | None, dtype: DType) -> Array:
  """How many elements of each set count, in `dtype`."""
  axes = sets.axes
  if sets.groups is not None:
    axes = *axes, sets.channel
  if where is None:
    size = _product([x.shape[a] for a in axes], dtype) / (sets.groups or 1)
    return jnp.full((1,) * x.ndim, size, dtype)
  repeats = _product([x.shape[a] for a in axes if where.shape[a] == 1], dtype)
  if sets.groups is not None and where.shape[sets.channel] == 1:
    sets, repeats = Sets(sets.axes), repeats / sets.groups
  repeats = jnp.full((), repeats, dtype)  # more than an int32 holds
  return sets.sum(where.astype(dtype)) * repeats


def _product(sizes: list[Any], dtype: DType) -> Any:
  """A number, or in `dtype` what it will be: as integers it might overflow."""
  symbols = [jnp.asarray(n, dtype) for n in sizes if not _types.is_known(n)]
  return math.prod([*filter(_types.is_known, sizes), *symbols])


def square(x: Array) -> Array:
  """|x|^2, real."""
  if jnp.iscomplexobj(x):
    return jnp.square(x.real) + jnp.square(x.imag)
  return lax.square(x)


def product(x: Array, y: Array) -> Array:
  """Re(conj(x) y)."""
  if jnp.iscomplexobj(x):
    return (x.conj() * y).real
  return _ops.mul(x, y)
