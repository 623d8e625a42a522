"""Flax linen modules: variables in, a pure function of normkit, variables out.

The norms are Flax's classes with normkit's call, so that changing
`nn.BatchNorm` to `normkit.linen.BatchNorm` is all there is to do. No maths
here.
"""

from normkit.linen.gated import GatedRMSNorm
from normkit.linen.in_place import in_place_of_flax
from normkit.linen.norm import Norm
from normkit.linen.norms import (
  BatchNorm,
  BatchRenorm,
  GroupNorm,
  InstanceNorm,
  LayerNorm,
  RMSNorm,
)
from normkit.linen.recurrent import (
  RNN,
  BatchNormLSTMCell,
  LayerNormGRUCell,
  LayerNormLSTMCell,
)
from normkit.linen.weights import (
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
