"""Which inputs the kernels take, and for which they are chosen.

Chosen by bytes of whole blocks compiled for H200 and v5e, in passes over x, by
XLA / by kernel (layer norm, bfloat16; `python -m benchmarks kernels`):

| | H200 | v5e |
| --- | ---: | ---: |
| norm, gelu: forward | 2.0 / 4.0 | 3.0 / 2.0 |
| norm, gelu: in training | 11.6 / 9.6 | 6.5 / 7.5 |
| matmul, norm, matmul: in training | 21.6 / 18.6 | 13.3 / 17.5 |
| pre-norm: in training | 27.6 / 26.6 | 17.0 / 20.0 |
| post-norm: in training | 32.6 / 29.6 | 21.5 / 16.5 |

So `None` takes the kernels in training on NVIDIA GPUs, and XLA's form, which
joins what stands around it, forward and on TPUs.
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
  if 0 in shape:
    return 'arrays without elements'
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
