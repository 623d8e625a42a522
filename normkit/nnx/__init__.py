"""Flax nnx modules: variables in, a pure function of normkit, variables out.

The norms are Flax's classes with normkit's call, so that changing
`nnx.BatchNorm` to `normkit.nnx.BatchNorm` is all there is to do. No maths here.
"""

from normkit.nnx.gated import GatedRMSNorm
from normkit.nnx.in_place import in_place_of_flax
from normkit.nnx.norm import Norm
from normkit.nnx.norms import (
  BatchNorm,
  BatchRenorm,
  GroupNorm,
  InstanceNorm,
  LayerNorm,
  RMSNorm,
)
from normkit.nnx.recurrent import (
  RNN,
  BatchNormLSTMCell,
  LayerNormGRUCell,
  LayerNormLSTMCell,
)
from normkit.nnx.weights import (
  SpectralNorm,
  WeightNorm,
  WeightStandardization,
)

__all__ = [
  'RNN',
  'BatchNorm',
  'BatchNormLSTMCell',
  'BatchRenorm',
  'GatedRMSNorm',
  'GroupNorm',
  'InstanceNorm',
  'LayerNorm',
  'LayerNormGRUCell',
  'LayerNormLSTMCell',
  'Norm',
  'RMSNorm',
  'SpectralNorm',
  'WeightNorm',
  'WeightStandardization',
  'in_place_of_flax',
]
