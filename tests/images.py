"""Images in the formats of MNIST."""

import numpy as np


def idx(array):
  """The bytes of an IDX file."""
  header = np.array([2048 + array.ndim, *array.shape], '>u4')
  return header.tobytes() + array.astype(np.uint8).tobytes()
