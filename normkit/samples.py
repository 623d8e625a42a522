"""Some elements of each set, whose mean is the pivot of its statistics."""

import math

from jax import lax

from normkit import _shards, _types
from normkit._types import Array

# The pivot of the one-pass form is the mean of a sample: one element in so
# many, and at least so many. Whatever the data, it lies within the square root
# of SAMPLE_STRIDE standard deviations of the mean, which costs the variance at
# most a few times SAMPLE_STRIDE roundings; for most data, none.
SAMPLE_STRIDE, SAMPLE_SIZE = 32, 16
# A row gives some elements of each of so many parts, of so many elements at
# least: what `jit` shards in as many stays where it is. Each is a part of a
# memory transaction of its own, and so they are few.
SAMPLE_PARTS, PART_SIZE = 16, 256
# Of a short row or a small image a CPU takes fewer: the square root holds.
FEW = 4


def sample(
  x: Array,
  axes: tuple[int, ...],
  in_parts: bool = True,
  least: int = SAMPLE_SIZE,
) -> Array:
  """Some elements of each set, evenly spaced: `least` or more, if it has them.

  Small steps along several axes, rather than a large one, mostly divide the
  shards of a sharded axis, and then nothing moves between devices: along the
  first, of which a device may have one example, only if others are too short.
  The last axis is left whole, for its elements share memory transactions (where
  it is the only one, the sample is the first elements of it or of its parts),
  and so is one that an explicit mesh shards, which cannot be sliced. An axis
  whose size is a symbol is left whole too, and counts as one element.
  """
  last = x.ndim - 1
  size = math.prod(x.shape[a] for a in axes if _types.is_known(x.shape[a]))
  steps = min(SAMPLE_STRIDE, size // least).bit_length() - 1
  free = _free(x, axes)
  if free == [last]:
    parts = num_parts(x, axes) if in_parts else 1
    some = -(-size // (parts * 2 ** max(steps, 0)))
    if parts == 1:
      return x[..., :some]
    each = lax.reshape(x, (*x.shape[:-1], parts, size // parts))
    return lax.collapse(each[..., :some], last, last + 2)
  free = [a for a in free if a != last]
  step = [1] * x.ndim
  for _ in range(steps):
    fits = [a for a in free if 2 * step[a] <= x.shape[a]]
    if fits:
      step[min(filter(None, fits), key=step.__getitem__, default=0)] *= 2
  return lax.slice(x, [0] * x.ndim, x.shape, step)


def _free(x: Array, axes: tuple[int, ...]) -> list[int]:
  """Those that may be sliced."""
  sharded = _shards.sharded_axes(x)
  return [a for a in axes if _types.is_known(x.shape[a]) and a not in sharded]


def num_parts(x: Array, axes: tuple[int, ...]) -> int:
  """Of a row, a power of two; one of anything else."""
  if _free(x, axes) != [x.ndim - 1]:
    return 1
  most = min(SAMPLE_PARTS, x.shape[-1] // PART_SIZE)
  return math.gcd(x.shape[-1], 1 << max(most, 1).bit_length() - 1)


def is_of_small_images(x: Array, axes: tuple[int, ...]) -> bool:
  """Whether a sample of FEW has fewer elements than one of SAMPLE_SIZE."""
  if not axes or axes[0] == 0 or axes[-1] == x.ndim - 1:
    return False
  sizes = [x.shape[a] for a in axes]
  if not all(map(_types.is_known, sizes)):
    return False
  return 2 * FEW <= math.prod(sizes) < SAMPLE_STRIDE * SAMPLE_SIZE


def has_few(x: Array) -> bool:
  """Whether a few elements of each row are enough; see SAMPLE_STRIDE."""
  row = x.shape[-1]
  return _types.is_known(row) and FEW <= row <= FEW * SAMPLE_STRIDE


def few(x: Array) -> list[Array]:
  """A few elements of each row, evenly spaced."""
  row = x.shape[-1]
  places = [(2 * i + 1) * row // (2 * FEW) for i in range(FEW)]
  return [lax.slice_in_dim(x, a, a + 1, axis=-1) for a in places]
