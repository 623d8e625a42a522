"""What devices have shown of the kernels: `record.json`, read when first asked.

`python -m benchmarks gpu --record` writes it, each case with the chip, the
versions, the date, the check of its numbers and the times of blocks with the
norm in them. A case counts where the kernel was faster in every block.
"""

import functools
import json
import math
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp

from normkit._types import DType, Implementation

PATH = pathlib.Path(__file__).with_name('record.json')


class Entry(NamedTuple):
  """A case on a device.

  Attributes:
    chip: the device, as JAX names it.
    jax: its version.
    date: of the run.
    kernel: the implementation.
    center: whether the mean is subtracted: layer norm, not RMS norm.
    dtype: of x.
    shape: of x.
    groups: of channels, or None for rows.
    error: the largest difference from float64 in its check, over the largest
      value there, or over 1.
    milliseconds: for each block in training, by XLA and by kernel.
  """

  chip: str
  jax: str
  date: str
  kernel: Implementation
  center: bool
  dtype: str
  shape: tuple[int, ...]
  groups: int | None
  error: float
  milliseconds: dict[str, tuple[float, float]]

  @property
  def is_won(self) -> bool:
    """Whether the kernel was faster in every block."""
    times = self.milliseconds.values()
    return bool(times) and all(kernel < xla for xla, kernel in times)

  @property
  def of_kernel(self) -> float:
    """Its time in all of them."""
    return math.fsum(kernel for _, kernel in self.milliseconds.values())


@functools.cache
def entries() -> tuple[Entry, ...]:
  """All of them."""
  return tuple(map(_entry, json.loads(PATH.read_text())))


def _entry(found: dict[str, Any]) -> Entry:
  return Entry(**found | {'shape': tuple(found['shape'])})


def kernels(
  shape: tuple[int, ...], dtype: DType, groups: int | None, center: bool
) -> dict[Implementation, tuple[str, ...]]:
  """The kernels that won, the fastest first, and on which chips.

  That is for sets of the same size, and as many of them or more.
  """
  found: dict[Implementation, tuple[str, ...]] = {}
  for entry in sorted(entries(), key=lambda e: e.of_kernel):
    case = entry.dtype, entry.groups, entry.center
    if (
      entry.is_won
      and case == (jnp.dtype(dtype).name, groups, center)
      and _set(entry.shape, groups) == _set(shape, groups)
      and math.prod(entry.shape) <= math.prod(shape)
    ):
      found[entry.kernel] = (*found.get(entry.kernel, ()), entry.chip)
  return found


def _set(shape: tuple[int, ...], groups: int | None) -> tuple[int, ...]:
  """How long a row is; or the places and channels of an example."""
  if groups is None:
    return shape[-1:]
  return math.prod(shape[1:-1]), shape[-1]
