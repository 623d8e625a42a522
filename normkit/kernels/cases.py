"""Which inputs the kernels take, and for which they are chosen.

Chosen by bytes, in passes over x, of programs compiled for H200, v5e and v6e
(`python -m benchmarks kernels`):

| | XLA | kernel |
| --- | ---: | ---: |
| backward, rows up to 8,192 | 5.0 | 3.0 to 3.3 |
| backward, longer rows, H200 | 5.0 | 5.0 at best, not written |
| backward, longer rows, TPU | 5.0 | 3.0 |
| backward, TPU, rows not a multiple of 128 or odd numbers of them | 5.0 | 9.1 |
| forward, alone | 2.0 H200, 3.0 TPU | 2.0 |
| forward, an activation after it, H200 | 2.0 | 4.0 |

So `None` takes the kernels' backward, and XLA's forward, which joins what
stands around it.
"""

import math

import jax.numpy as jnp

from normkit._types import DType, Implementation

LONGEST = 65_536
TRITON_WIDTH = 8192  # of which a row is held in registers


def refusal(
  implementation: Implementation, shape: tuple[int, ...], dtype: DType
) -> str | None:
  """Why the kernel does not take an input, or None."""
  if shape[-1] > LONGEST:
    return f'rows of more than {LONGEST:,} elements'
  if implementation == 'triton' and math.prod(shape) >= 2**31:
    return 'arrays of 2^31 elements or more'
  if implementation == 'mosaic_tpu' and dtype == jnp.float16:
    return 'float16'
  return None


def has_backward(
  implementation: Implementation, shape: tuple[int, ...], dtype: DType
) -> bool:
  """Whether there is a backward: XLA's moves no more for the rows left out."""
  is_short = implementation != 'triton' or shape[-1] <= TRITON_WIDTH
  return is_short and refusal(implementation, shape, dtype) is None


def chosen(shape: tuple[int, ...], dtype: DType) -> tuple[Implementation, ...]:
  """The kernels that take XLA's place in training, each on its platform."""
  return ('triton',) if has_backward('triton', shape, dtype) else ()
