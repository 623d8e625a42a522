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
import warnings

import jax.numpy as jnp

from normkit._types import DType, Implementation, check_implementation

PATH = pathlib.Path(__file__).with_name('record.json')
UNREADABLE = OSError, ValueError, TypeError, KeyError, AttributeError


class Entry(NamedTuple):
  """A case on a device.

  Attributes:
    chip: the device, as JAX names it.
    versions: of JAX, its compiler, normkit, and what drives the device.
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
  versions: dict[str, str]
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
  """All of them; none, with a warning, where they cannot be read."""
  try:
    return read(PATH)
  except UNREADABLE as error:
    why = f'{type(error).__name__}: {error}'
    warnings.warn(
      f'{PATH}: no record of kernels by this version of normkit ({why}). Norms '
      "run by XLA; install normkit anew, or record again with 'python -m "
      "benchmarks gpu --record'.",
      stacklevel=2,
    )
    return ()


def read(path: pathlib.Path) -> tuple[Entry, ...]:
  """The entries of a file; raises one of `UNREADABLE`."""
  return tuple(map(_entry, json.loads(path.read_text())))


def _entry(found: dict[str, Any]) -> Entry:
  check_implementation(found['kernel'])
  times = {
    k: (float(a), float(b)) for k, (a, b) in found['milliseconds'].items()
  }
  return Entry(
    **found | {'shape': tuple(map(int, found['shape'])), 'milliseconds': times}
  )


def kernels(
  shape: tuple[int, ...], dtype: DType, groups: int | None, center: bool
) -> dict[Implementation, tuple[str, ...]]:
  """The kernel that won on each chip, the fastest there, with its chips.

  That is for sets of the same size: of a kernel's cases that have as many of
  them or fewer the one with most.
  """
  wanted = jnp.dtype(dtype).name, groups, center
  nearest: dict[tuple[str, Implementation], Entry] = {}
  for entry in sorted(entries(), key=lambda e: math.prod(e.shape)):
    if (
      (entry.dtype, entry.groups, entry.center) == wanted
      and _set(entry.shape, groups) == _set(shape, groups)
      and math.prod(entry.shape) <= math.prod(shape)
    ):
      nearest[entry.chip, entry.kernel] = entry
  best: dict[str, Entry] = {}
  for entry in sorted(nearest.values(), key=lambda e: e.of_kernel):
    if entry.is_won:
      best.setdefault(entry.chip, entry)
  found: dict[Implementation, tuple[str, ...]] = {}
  for entry in best.values():
    found[entry.kernel] = (*found.get(entry.kernel, ()), entry.chip)
  return found


def _set(shape: tuple[int, ...], groups: int | None) -> tuple[int, ...]:
  """How long a row is; or the places and channels of an example."""
  if groups is None:
    return shape[-1:]
  return math.prod(shape[1:-1]), shape[-1]
