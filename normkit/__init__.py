"""normkit: functional normalization for JAX and Flax.

Pure functions and transforms with their state in the open: moments in, affine
map out, running statistics beside. The Flax modules are in `normkit.linen` and
`normkit.nnx`, the checks for people's own norms in `normkit.testing`; none of
them is imported here.
"""

from importlib import metadata

from normkit.moments import Moments, moments
from normkit.norm import (
  EmptyState,
  Norm,
  NormParams,
  normalize,
  products_saveable,
)
from normkit.norms.batch import BatchNorm, BatchNormState, batch_norm
from normkit.norms.group import GroupNorm, group_norm
from normkit.norms.instance import InstanceNorm, instance_norm
from normkit.norms.layer import LayerNorm, add_layer_norm, layer_norm
from normkit.norms.rms import RMSNorm, add_rms_norm, rms_norm

__version__ = metadata.version('normkit')

__all__ = [
  'BatchNorm',
  'BatchNormState',
  'EmptyState',
  'GroupNorm',
  'InstanceNorm',
  'LayerNorm',
  'Moments',
  'Norm',
  'NormParams',
  'RMSNorm',
  'add_layer_norm',
  'add_rms_norm',
  'batch_norm',
  'group_norm',
  'instance_norm',
  'layer_norm',
  'moments',
  'normalize',
  'products_saveable',
  'rms_norm',
]
