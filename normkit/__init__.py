"""normkit: functional normalization for JAX and Flax.

Pure functions and transforms with their state in the open: moments in, affine
map out, running statistics beside. The Flax modules are in `normkit.linen` and
`normkit.nnx`, the checks for people's own norms in `normkit.testing`; none of
them is imported before it is used.
"""

from importlib import metadata
import inspect
from typing import TYPE_CHECKING

from normkit import _lazy
from normkit._words import own_words
from normkit.general import normalize
from normkit.masks import decay_mask
from normkit.moments import Moments, moments
from normkit.norm import EmptyState, Norm, NormParams
from normkit.norms._evonorm import EvoNormParams
from normkit.norms._running import BatchNormState
from normkit.norms.adaptive import (
  adaptive_layer_norm,
  adaptive_residual,
  adaptive_rms_norm,
)
from normkit.norms.batch import BatchNorm, batch_norm
from normkit.norms.derf import Derf, DerfParams, derf
from normkit.norms.dyt import DyT, DyTParams, dyt
from normkit.norms.evonorm_b0 import EvoNormB0, evonorm_b0
from normkit.norms.evonorm_s0 import EvoNormS0, evonorm_s0
from normkit.norms.gated import GatedRMSNorm, gated_rms_norm
from normkit.norms.global_response import (
  GlobalResponseNorm,
  global_response_norm,
)
from normkit.norms.group import GroupNorm, group_norm
from normkit.norms.instance import (
  InstanceNorm,
  adaptive_instance_norm,
  instance_norm,
)
from normkit.norms.l2 import ScaleNorm, l2_norm
from normkit.norms.layer import LayerNorm, add_layer_norm, layer_norm
from normkit.norms.quantized import quantized_layer_norm, quantized_rms_norm
from normkit.norms.renorm import BatchRenorm, batch_renorm
from normkit.norms.response import (
  FilterResponseNorm,
  FilterResponseParams,
  filter_response_norm,
)
from normkit.norms.rms import RMSNorm, add_rms_norm, rms_norm
from normkit.norms.streaming import StreamingNorm, streaming_norm
from normkit.norms.whitening import (
  IterativeWhitening,
  WhiteningState,
  iterative_whitening,
)
from normkit.platforms import for_platform, implementation
from normkit.policies import products_saveable

try:
  __version__ = metadata.version('normkit')
except metadata.PackageNotFoundError:  # a checkout or an archive
  __version__ = '0+not.installed'

__all__ = [
  'BatchNorm',
  'BatchNormState',
  'BatchRenorm',
  'Derf',
  'DerfParams',
  'DyT',
  'DyTParams',
  'EmptyState',
  'EvoNormB0',
  'EvoNormParams',
  'EvoNormS0',
  'FilterResponseNorm',
  'FilterResponseParams',
  'GatedRMSNorm',
  'GlobalResponseNorm',
  'GroupNorm',
  'InstanceNorm',
  'IterativeWhitening',
  'LayerNorm',
  'Moments',
  'Norm',
  'NormParams',
  'RMSNorm',
  'ScaleNorm',
  'StreamingNorm',
  'WhiteningState',
  'adaptive_instance_norm',
  'adaptive_layer_norm',
  'adaptive_residual',
  'adaptive_rms_norm',
  'add_layer_norm',
  'add_rms_norm',
  'batch_norm',
  'batch_renorm',
  'decay_mask',
  'derf',
  'dyt',
  'evonorm_b0',
  'evonorm_s0',
  'filter_response_norm',
  'for_platform',
  'gated_rms_norm',
  'global_response_norm',
  'group_norm',
  'implementation',
  'instance_norm',
  'iterative_whitening',
  'l2_norm',
  'layer_norm',
  'moments',
  'normalize',
  'products_saveable',
  'quantized_layer_norm',
  'quantized_rms_norm',
  'rms_norm',
  'streaming_norm',
]

for _name in __all__:
  _function = globals()[_name]
  if inspect.isfunction(_function) and _function.__kwdefaults__:
    globals()[_name] = _function = own_words(_function)
    _function.__module__ = __name__  # where pickle finds it

if not TYPE_CHECKING:  # a checker would take every name then
  __getattr__ = _lazy.modules(
    __name__, 'linen', 'nnx', 'recurrent', 'testing', 'tools', 'weights'
  )
