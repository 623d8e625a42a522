"""Norms that act on weights: weight norm, standardization, spectral norm.

A function takes one weight. A transform takes any pytree of them, chooses those
that it normalizes by their paths, and leaves the others as they are: `weights`
in, `weights` out, with the weights that the optimizer moves never overwritten.
"""

from normkit.weights._shared import Tree as Tree, Where as Where
from normkit.weights.spectral_normalization import (
  SpectralNorm,
  SpectralNormState,
  spectral_norm,
)
from normkit.weights.standardization import (
  WeightStandardization,
  weight_standardize,
)
from normkit.weights.weight_normalization import WeightNorm, weight_norm

__all__ = [
  'SpectralNorm',
  'SpectralNormState',
  'WeightNorm',
  'WeightStandardization',
  'spectral_norm',
  'weight_norm',
  'weight_standardize',
]
