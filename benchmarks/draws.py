"""Random uses of Flax's norms: constructor arguments, inputs, masks.

Most are valid; about one in eight has an argument that no norm can take.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import linen as nn
import jax.numpy as jnp
import numpy as np

NORMS = 'BatchNorm', 'LayerNorm', 'RMSNorm', 'GroupNorm', 'InstanceNorm'
DEVICES = 2
AXIS_NAME = 'devices'
INPUT_DTYPES = ('float32',) * 4 + (
  'bfloat16',
  'float16',
  'int32',
  'complex64',
  'float64',
)
CHANNELS = 4, 6, 6, 8, 12
# Arguments and flags that a draw of the constructor's options chooses from.
SHARED: dict[str, tuple[Any, ...]] = {
  'epsilon': (1e-3, 1e-5, 0.1, 0.0),
  'dtype': (
    *(jnp.float32, jnp.bfloat16) * 2,
    *(jnp.float16, jnp.complex64, jnp.float64),
  ),
  'param_dtype': (jnp.bfloat16, jnp.float16),
  'use_scale': (False,),
  'use_bias': (False,),
  'scale_init': (nn.initializers.normal(1.0),),
  'bias_init': (nn.initializers.uniform(),),
  'use_fast_variance': (False,),
  'force_float32_reductions': (False,),
}
INVALID: dict[str, tuple[Any, ...]] = {
  'epsilon': (12, -1e-3),
  'dtype': (jnp.int32,),
  'axis_name': (AXIS_NAME,),
  'axis_index_groups': ([[0, 1]],),
}
ABSENT = {
  'RMSNorm': ('use_bias', 'bias_init'),
  'nnx': ('force_float32_reductions',),
}
# nnx refuses masks of numbers.
MASK_DTYPES = {
  'linen': (np.bool_, np.bool_, np.bool_, np.int32, np.float32),
  'nnx': (np.bool_,) * 9 + (np.int32,),
}


@dataclasses.dataclass(frozen=True)
class Case:
  """One use of a norm.

  Attributes:
    family: 'linen' or 'nnx'.
    norm: the name of the module.
    options: the constructor's arguments that are not left at their default.
    x: the input; its first axis is mapped if `mapped`.
    mask: the mask of the call, mapped with x, or None.
    dy: the cotangent of the output, of the shape of x.
    flag: where batch norm is told whether to use its running averages: 'call',
      'constructor', 'both' or 'neither'.
    mapped: whether the norm runs under `vmap`, its axis named.
    stored: the dtype of the parameters in the checkpoint, None as they start.
  """

  family: str
  norm: str
  options: dict[str, Any]
  x: np.ndarray
  mask: Any = None
  dy: Any = None
  flag: str = 'call'
  mapped: bool = False
  stored: Any = None

  def option(self, name: str, default: Any = None) -> Any:
    return self.options.get(name, default)

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of what one call of the norm gets."""
    return self.x.shape[1:] if self.mapped else self.x.shape

  @property
  def wide(self) -> bool:
    """Whether it takes numbers of 64 bits."""
    return np.float64 in (self.x.dtype, self.option('dtype'))


class Draw:
  """A random generator with words for what the draws below do."""

  def __init__(self, *seed: int):
    self.rng = np.random.default_rng(seed)

  def chance(self, share: float) -> bool:
    return bool(self.rng.random() < share)

  def pick(self, values: Any) -> Any:
    return values[int(self.rng.integers(len(values)))]

  def some(self, table: dict[str, Any], share: float) -> dict[str, Any]:
    """A value for each name of the table that is drawn."""
    return {
      name: self.pick(values)
      for name, values in table.items()
      if self.chance(share)
    }

  def normal(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    values = self.rng.standard_normal(shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
      values = values + 1j * self.rng.standard_normal(shape)
    return np.asarray(values, dtype)


def draw(family: str, norm: str, *seed: int) -> Case:
  """A random use of the norm; the same for the same seed."""
  rng = Draw(NORMS.index(norm), *seed)
  shape = draw_shape(rng, norm)
  options = draw_options(rng, family, norm, shape)
  mapped = rng.chance(0.12) and 'axis_name' not in options
  if mapped:
    options['axis_name'] = AXIS_NAME
    options |= rng.some({'axis_index_groups': ([[0, 1]], [[0], [1]])}, 0.2)
    shape = (DEVICES, *shape)
  mask = draw_mask(rng, shape, mapped)
  if mask is not None:
    mask = mask.astype(rng.pick(MASK_DTYPES[family]))
  x = draw_input(rng, shape, mask)
  dy = rng.normal(shape, np.result_type(x.dtype, np.float64))
  flag = rng.pick(('call',) * 9 + ('constructor',) * 9 + ('both', 'neither'))
  stored = rng.pick((None, None, None, jnp.float32, jnp.bfloat16))
  return Case(family, norm, options, x, mask, dy, flag, mapped, stored)


def draw_options(
  rng: Draw, family: str, norm: str, shape: tuple[int, ...]
) -> dict[str, Any]:
  options = rng.some(SHARED, 0.25) | AXES[norm](rng, shape)
  if rng.chance(0.1):
    name = rng.pick(list(INVALID))
    options[name] = rng.pick(INVALID[name])
  absent = ABSENT.get(norm, ()) + ABSENT.get(family, ())
  return {n: v for n, v in options.items() if n not in absent}


def draw_shape(rng: Draw, norm: str) -> tuple[int, ...]:
  spatial = norm == 'InstanceNorm'
  ndim = rng.pick((2, 3, 3, 3, 4, 4) if spatial else (1, 2, 2, 3, 3, 4))
  batch = rng.pick((1, 2, 2, 3, 3, 4, 4, 5, 5, 0))
  inner = (rng.pick((1, 2, 2, 3)) for _ in range(ndim - 2))
  channels = rng.pick(CHANNELS)
  return (channels,) if ndim == 1 else (batch, *inner, channels)


def draw_axes(rng: Draw, ndim: int) -> Any:
  """An axis or several: in any order, negative, twice, beyond the rank."""
  if rng.chance(0.05):
    return rng.pick((ndim, -ndim - 1, (0, ndim + 1), ()))
  if rng.chance(0.5):
    return int(rng.rng.integers(-ndim, ndim))
  count = int(rng.rng.integers(1, ndim + 1))
  axes = rng.rng.integers(-ndim, ndim, count).tolist()
  return rng.pick((list, tuple))(axes)


def batch_axes(rng: Draw, shape: tuple[int, ...]) -> dict[str, Any]:
  options = {}
  if rng.chance(0.5):
    options['axis'] = draw_axes(rng, len(shape))
  if rng.chance(0.5):
    options['momentum'] = rng.pick(
      (0.9, 0.9, 0.5, 0.5, 0.9, 0.0, 0.0, 1.0, 1.0, 1.5)
    )
  return options


def layer_axes(rng: Draw, shape: tuple[int, ...]) -> dict[str, Any]:
  names = 'reduction_axes', 'feature_axes'
  return {n: draw_axes(rng, len(shape)) for n in names if rng.chance(0.5)}


def group_axes(rng: Draw, shape: tuple[int, ...]) -> dict[str, Any]:
  options: dict[str, Any] = {'num_groups': rng.pick((1, 2, 2, shape[-1]))}
  if rng.chance(0.3):
    sizes = 1, 2, 2, shape[-1]
    options = {'num_groups': None, 'group_size': rng.pick(sizes)}
  if rng.chance(0.06):
    name = rng.pick(('num_groups', 'group_size'))
    options[name] = rng.pick((None, 5, 0, -2, 2))
  if rng.chance(0.03):
    options = {}
  if rng.chance(0.4):
    axes = draw_axes(rng, len(shape))
    last = rng.chance(0.8) and isinstance(axes, (list, tuple))
    options['reduction_axes'] = [*axes, -1] if last else axes
  return options


def instance_axes(rng: Draw, shape: tuple[int, ...]) -> dict[str, Any]:
  if rng.chance(0.5):
    return {}
  axes = draw_axes(rng, len(shape))
  if isinstance(axes, (list, tuple)) and rng.chance(0.7):
    axes = [a for a in axes if a % len(shape)]
  return {'feature_axes': axes}


AXES: dict[str, Callable[[Draw, tuple[int, ...]], dict[str, Any]]] = {
  'BatchNorm': batch_axes,
  'LayerNorm': layer_axes,
  'RMSNorm': layer_axes,
  'GroupNorm': group_axes,
  'InstanceNorm': instance_axes,
}


def draw_mask(rng: Draw, shape: tuple[int, ...], mapped: bool) -> Any:
  """None, or a mask: full, broadcasting, of numbers, empty, or misshapen."""
  if rng.chance(0.45):
    return None
  mask = rng.rng.random(shape) < 0.7
  if rng.chance(0.1):
    mask[...] = False
  if rng.chance(0.2) and mask.size:
    mask[(slice(None),) * int(rng.rng.integers(len(shape))) + (0,)] = False
  if rng.chance(0.3):
    keep = [(mapped and a == 0) or rng.chance(0.5) for a in range(len(shape))]
    mask = mask[tuple(slice(None if k else 1) for k in keep)]
  if rng.chance(0.1) and not mapped:
    mask = mask[0] if mask.shape[0] else mask
  if rng.chance(0.05):
    mask = (
      np.repeat(mask, 2, int(mapped)) if rng.chance(0.5) else mask[..., None]
    )
  return mask


def draw_input(rng: Draw, shape: tuple[int, ...], mask: Any) -> np.ndarray:
  """Values about one, far from zero, all equal, or with some not finite."""
  dtype = jnp.dtype(rng.pick(INPUT_DTYPES))
  if dtype == np.int32:
    return rng.rng.integers(-9, 9, shape, np.int32)
  x = np.asarray(1 + 2 * rng.normal(shape, dtype).astype(wider(dtype)))
  if rng.chance(0.1):
    x = x + 300
  if rng.chance(0.05):
    x[...] = 3.3
  if rng.chance(0.2) and mask is not None and mask.ndim == len(shape):
    hide(rng, x, mask)
  if rng.chance(0.03) and x.size:
    x.flat[int(rng.rng.integers(x.size))] = rng.pick((np.nan, np.inf))
  return x.astype(dtype)


def hide(rng: Draw, x: np.ndarray, mask: np.ndarray) -> None:
  """Puts numbers that are not finite where the mask is False."""
  try:
    hidden = ~np.broadcast_to(mask.astype(bool), x.shape)
  except ValueError:
    return
  x[hidden & (rng.rng.random(x.shape) < 0.5)] = rng.pick((np.nan, np.inf))


def wider(dtype: Any) -> Any:
  return np.complex128 if dtype == np.complex64 else np.float64
