"""Which inputs the kernels take, and for which they are chosen.

Chosen by bytes of whole blocks compiled for H200 and v5e, in passes over x, by
XLA / by kernel (bfloat16, layer or group norm; `python -m benchmarks kernels`)

| | H200 | v5e |
| --- | ---: | ---: |
| norm, gelu: forward | 2.0 / 4.0 | 3.0 / 2.0 |
| norm, gelu: in training | 11.6 / 9.6 | 6.5 / 7.5 |
| matmul, norm, matmul: in training | 21.6 / 18.6 | 13.3 / 17.5 |
| pre-norm: in training | 27.6 / 26.6 | 17.0 / 20.0 |
| post-norm: in training | 32.6 / 29.6 | 21.5 / 16.5 |
| group norm, relu: in training | 10.3 / 9.2 | 6.2 / 14.5 |
| conv, group norm, relu, conv: in training | 23.4 / 22.3 | 13.6 / 22.3 |

So the kernels would be chosen in training on NVIDIA GPUs, and XLA's form, which
joins what stands around it, forward and on TPUs. But bytes are not time, and no
kernel has run on a device yet: `None` takes those of `record`, alone.

A norm is one of rows, over the last axis, or one of groups of channels, over
all axes of x (batch, ..., channels) but the first: `groups` counts them, and is
None for rows.
"""

from collections.abc import Callable
import math

import jax.numpy as jnp

from normkit._types import Array, DType, Implementation, is_known
from normkit.kernels import activations, configs, plans, record

LONGEST = 65_536
TRITON_WIDTH = 8192  # of which a row is held in registers
# Elements of groups held there, by channels: 28 x 28 x 16 and 48 x 48 x 8. More
# spill, as NVIDIA's assembler says.
TRITON_GROUP, NARROW, TRITON_NARROW_GROUP = 12_544, 8, 18_432
# Of images whose groups are chosen. Beyond, in half precision, XLA fuses a ReLU
# after the norm and moves 7 n in training where the kernels move 9; in float32
# it does so mostly, or moves less where a residual is added. Measured by
# `python -m benchmarks kernels --sizes`, with JAX 0.10 and in part 0.12.
LEAST_PLACES, MOST_PLACES = 7 * 7, 64 * 64
MOST_IMAGES, MOST_SUMS = 128, 2**15  # sums: of each image and channel
MOSAIC_GROUP = 2**20  # elements of an example, tiles filled up
LANES = 128


def refusal(  # noqa: PLR0911
  implementation: Implementation,
  shape: tuple[int, ...],
  dtype: DType,
  groups: int | None = None,
  residual: bool = False,
  activation: Callable[[Array], Array] | None = None,
  parameters: tuple[tuple[int, ...], ...] = (),
  rounds: bool = False,
  gate: bool = False,
) -> str | None:
  """Why the kernel does not take an input, or None.

  `parameters` are the shapes of a scale and bias that are of x's rank: of an
  example, as in adaLN, or of a head. With a gate the activation is its own.
  """
  if not all(map(is_known, shape)):
    return 'sizes that are symbols'
  if 0 in shape:
    return 'arrays without elements'
  if implementation == 'triton' and math.prod(shape) >= 2**31:
    return 'arrays of 2^31 elements or more'
  if implementation == 'mosaic_tpu' and dtype == jnp.float16:
    return 'float16'
  if implementation != 'mosaic_gpu' or groups is not None:
    others = {
      'scale or bias of more than one number a feature': parameters,
      'rounding before the scale': rounds,
      'a gate': gate,
    }
    if why := next(filter(others.get, others), None):
      return why
  if groups is not None:
    return _refusal_of_groups(implementation, shape, dtype, groups)
  if shape[-1] > LONGEST:
    return f'rows of more than {LONGEST:,} elements'
  if activation and not activations.is_lowered(activation, implementation):
    return 'an activation in primitives that it does not lower'
  if implementation != 'mosaic_gpu':
    return None
  sets = plans.sets_of(shape, *parameters)
  if sets is None:
    return 'a scale or bias that is neither of an example nor of a head'
  if sets.rows == 1 < sets.number:
    return 'a scale or bias for each row'
  inputs = 2 if residual or gate else 1
  fits = _config(shape, dtype, inputs, gate=gate) is not None
  return None if fits else 'rows that do not fit in shared memory'


def _refusal_of_groups(
  implementation: Implementation,
  shape: tuple[int, ...],
  dtype: DType,
  groups: int,
) -> str | None:
  if implementation == 'mosaic_gpu':
    results = dtype, jnp.bfloat16, jnp.float32
    why = (_why_not(shape, groups, (dtype,), (d,)) for d in results)
    return next(filter(None, why), None)
  if implementation == 'triton':
    fits = group_width(shape, dtype, groups) is not None
    return None if fits else 'groups that do not fit in registers'
  *outer, inner = shape[1:-1] or (1,)
  inner, lanes = -(-inner // 16) * 16, -(-shape[-1] // LANES) * LANES
  fits = math.prod(outer) * inner * lanes <= MOSAIC_GROUP
  return None if fits else 'examples that do not fit on chip'


def _why_not(
  shape: tuple[int, ...],
  groups: int,
  inputs: tuple[DType, ...],
  outputs: tuple[DType, ...],
) -> str | None:
  """Why Mosaic GPU's kernel of groups does not hold these."""
  case = configs.groups_of(shape, groups, inputs, outputs)
  if not configs.widths(case):
    return (
      f'groups that come to multiples of 16 bytes in more than {configs.PIECE} '
      'channels'
    )
  fits = configs.groups(case) is not None
  return None if fits else 'groups that do not fit in shared memory'


def group_width(
  shape: tuple[int, ...], dtype: DType, groups: int
) -> int | None:
  """How many channels, whole groups, a Triton program holds at once, if any.

  At each place they should fill a line of 128 bytes, or half a sector of 32 at
  least: less would load the same memory again and again.
  """
  places, size = math.prod(shape[1:-1]), shape[-1] // groups
  line = 128 // jnp.dtype(dtype).itemsize
  most, least = (min(-(-width // size), groups) for width in (line, line // 8))
  for count in range(most, least - 1, -1):
    width = power_of_2(count * size)
    if places * width <= (
      TRITON_NARROW_GROUP if width <= NARROW else TRITON_GROUP
    ):
      return count * size
  return None


def power_of_2(size: int) -> int:
  """The least that is not smaller."""
  return 1 << (size - 1).bit_length()


def has_backward(
  implementation: Implementation,
  shape: tuple[int, ...],
  dtype: DType,
  groups: int | None = None,
  activation: bool = False,
  sums: int = 2,
  residual: bool = True,
  result: DType | None = None,
  has_sets: bool = False,
  gate: bool = False,
) -> bool:
  """Whether there is a backward: XLA's moves no more for the rows left out.

  Where there is no bias, `sums` is one, and there is room for longer rows. Of
  groups `result` is the norm's dtype, where it is not that of x.
  """
  if refusal(implementation, shape, dtype, groups) is not None:
    return False
  if implementation == 'mosaic_gpu' and groups is not None:
    read = dtype, dtype if result is None else result
    return _why_not(shape, groups, read, (dtype,)) is None
  if implementation == 'mosaic_gpu':
    inputs = 3 if residual or gate else 2
    more = activation or gate, has_sets, gate
    found = _config(shape, dtype, inputs, sums, *more)
    return found is not None and found.stages > found.tiles
  is_row_of_triton = implementation == 'triton' and groups is None
  return not is_row_of_triton or shape[-1] <= TRITON_WIDTH


def _config(
  shape: tuple[int, ...],
  dtype: DType,
  inputs: int,
  sums: int = 0,
  activation: bool = False,
  has_sets: bool = False,
  gate: bool = False,
) -> configs.Config | None:
  """Mosaic GPU's for rows of as large an output as there may be."""
  dtype, wide = jnp.dtype(dtype), jnp.dtype(jnp.float32)
  others = 0 if gate else inputs - 1
  outputs = (wide, *(dtype,) * others)
  if sums:
    outputs = (dtype,) * (2 if gate else 1)
  given = (dtype,) * inputs, outputs, (wide, wide), sums
  case = configs.Case(shape[-1], *given, has_sets, activation)
  return configs.config(case)


def chosen(
  shape: tuple[int, ...],
  dtype: DType,
  groups: int | None = None,
  preferred: Implementation | None = None,
  residual: bool = False,
  activation: Callable[[Array], Array] | None = None,
  parameters: tuple[tuple[int, ...], ...] = (),
  rounds: bool = False,
  gate: bool = False,
  center: bool = True,
  result: DType | None = None,
) -> dict[Implementation, tuple[str, ...] | None]:
  """The kernels that take XLA's place in training, each on its platform.

  With each the chips on which it won, all else being XLA's; None for any, where
  it is preferred. No residual, activation, gate or rounding has been recorded,
  nor a scale of an example or of a head, nor a result of another dtype.
  """
  if preferred is not None:
    extra = residual, activation, parameters, rounds, gate
    is_taken = refusal(preferred, shape, dtype, groups, *extra) is None
    return {preferred: None} if is_taken else {}
  is_other = residual or activation or parameters or rounds or gate
  is_cast = result is not None and jnp.dtype(result) != dtype
  if is_other or is_cast or not record.entries():
    return {}
  if not all(map(is_known, shape)):
    return {}
  is_worth = groups is None or _is_worth(shape, dtype)
  found = record.kernels(shape, dtype, groups, center) if is_worth else {}
  return {
    n: c for n, c in found.items() if has_backward(n, shape, dtype, groups)
  }


def _is_worth(shape: tuple[int, ...], dtype: DType) -> bool:
  """Whether kernels of groups move less in training, before a ReLU too."""
  images, *places, channels = shape
  return (
    LEAST_PLACES <= math.prod(places) <= MOST_PLACES
    and images <= MOST_IMAGES
    and images * channels <= MOST_SUMS
    and jnp.dtype(dtype).itemsize == 2
  )
