"""Where the threads of a warpgroup have the elements of an array."""

from typing import Any

from jax.experimental.pallas import mosaic_gpu as gpu


def of_rows(width: int, vector: int) -> Any:
  """Each row of a tile in the lanes of a warp, in vectors of 16 bytes."""
  lanes = min(32, width // vector)
  most, high = lanes * vector, 32 // lanes
  if high == 1:
    tiling = gpu.Tiling(((4, most), (vector,)))
    return gpu.Layout.TILED(tiling, (-3,), (-2,), -1)
  tiling = gpu.Tiling(((4 * high, most), (high, most), (vector,)))
  return gpu.Layout.TILED(tiling, (-5,), (-3, -2), -1)


def of_all() -> Any:
  """Each thread has all of a vector."""
  every = gpu.Replicated
  return gpu.Layout.TILED(gpu.Tiling(((4,),)), (every(4),), (every(32),), -1)
