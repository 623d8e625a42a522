"""How other frameworks name their arrays and lay them out.

Each reader takes a tree of one framework apart into `Source` arrays. Each
layout takes the array of one leaf of a layer as its framework holds it, and
gives it as Flax does: kernels as (*spatial, in, out).
"""

from collections.abc import Iterator, Mapping
import dataclasses
import math
import operator
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normkit.tools import files

# The epsilon of the norms of each framework unless told otherwise.
EPSILONS = {
  'equinox': 1e-5,
  'flax': 1e-5,
  'haiku': 1e-5,
  'keras': 1e-3,
  'torch': 1e-5,
}
_TORCH_LEAVES = {
  'running_mean': 'mean',
  'running_var': 'var',
  'num_batches_tracked': 'count',
}
# Where a checkpoint of training holds the state dict.
_TORCH_WRAPPERS = ('state_dict', 'model_state_dict', 'model', 'module', 'net')
# The names in PyTorch of the leaves of Flax.
TORCH_NAMES = {
  **dict.fromkeys(('kernel', 'embedding', 'scale'), 'weight'),
  **{leaf: name for name, leaf in _TORCH_LEAVES.items()},
}
_TORCH_REFUSED = re.compile(
  r'(^|\.)((weight|bias)_[ih]h|weight_[gv]$|parametrizations\.)'
)
# Those of `MultiheadAttention` that belong to no layer of their own.
_TORCH_PROJECTION = re.compile(r'(.*\b[qkv]_proj|.*\bin_proj)_(weight|bias)')
_KERAS_LEAVES = {
  'kernel': 'weight',
  'embeddings': 'embedding',
  'gamma': 'scale',
  'beta': 'bias',
  'moving_mean': 'mean',
  'moving_variance': 'var',
  'depthwise_kernel': 'weight',
}
_HAIKU_LEAVES = {
  'w': 'weight',
  'b': 'bias',
  'offset': 'bias',
  'embeddings': 'embedding',
}


@dataclasses.dataclass(frozen=True)
class Source:
  """An array of another framework.

  Attributes:
    key: its name there, for messages.
    layer: the name of its layer there.
    leaf: what it is: a leaf of Flax, 'weight' (the kernel, embedding or scale,
      whichever the layer has), or the place in Keras's list, '0', '1', ...
    value: the array.
  """

  key: str
  layer: str
  leaf: str
  value: np.ndarray


def unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
  """A state dict without what training saves around it, its parts joined."""
  if not isinstance(state, Mapping):
    raise TypeError(
      'the state must be a mapping of arrays by name, as model.state_dict() '
      f'gives it, got {type(state).__name__}.'
    )
  nested = [key for key, value in state.items() if isinstance(value, Mapping)]
  held = [key for key in _TORCH_WRAPPERS if key in nested]
  if len(held) > 1:
    raise ValueError(
      f'several in this checkpoint may be the state dict: {held}. Give one of '
      f'them, state[{held[0]!r}].'
    )
  if held:
    return unwrapped(state[held[0]])
  flat = {}
  for key, value in state.items():
    if isinstance(value, Mapping):
      inner = unwrapped(value)
      flat.update({f'{key}.{name}': array for name, array in inner.items()})
    else:
      flat[key] = value
  return flat


def read_torch(state: Mapping[str, Any]) -> list[Source]:
  """The arrays of a state dict."""
  files.check_names(state)
  if refused := [key for key in state if _TORCH_REFUSED.search(key)]:
    raise ValueError(
      f'{refused!s:.300} are of recurrent layers or parametrizations, which '
      'are not converted. Leave them out by ignore, and for a parametrization '
      'remove it first.'
    )
  sources = []
  for key, value in state.items():
    if found := _TORCH_PROJECTION.fullmatch(key):
      layer, leaf = found.groups()
    else:
      layer, _, leaf = key.rpartition('.')
    leaf = _TORCH_LEAVES.get(leaf, leaf)
    sources.append(Source(key, layer, leaf, files.as_numpy(key, value)))
  return sources


def read_keras(weights: Mapping[str, Any]) -> list[Source]:
  """The arrays of a `.weights.h5` file, or by layer: lists, or by name."""
  files.check_names(weights)
  sources = []
  for name, value in weights.items():
    if isinstance(value, list | tuple):
      for i, array in enumerate(value):
        key = f'{name}[{i}]'
        sources.append(Source(key, name, str(i), files.as_numpy(key, array)))
      continue
    if isinstance(value, Mapping):
      for variable, array in value.items():
        key = f'{name}/{variable}'
        leaf = str(_KERAS_LEAVES.get(variable, variable))
        sources.append(Source(key, name, leaf, files.as_numpy(key, array)))
      continue
    if legacy := _legacy_keras(name):
      layer, leaf = legacy
      if layer:
        sources.append(Source(name, layer, leaf, files.as_numpy(name, value)))
      continue
    *path, vars_, place = ['', *name.split('/')]
    if vars_ != 'vars' or not place.isdecimal():
      raise ValueError(
        f'{name!r} is not a name in the weights of Keras 3, such as '
        "'layers/dense/vars/0'. Save them by model.save_weights, or give "
        'lists of arrays by layer.'
      )
    if 'optimizer' in path[:2] or 'seed_generator' in path:
      continue
    layer = '/'.join(part for part in path if part not in ('', 'layers'))
    sources.append(Source(name, layer, place, files.as_numpy(name, value)))
  return _without_separable(sources)


def _without_separable(sources: list[Source]) -> list[Source]:
  """Separable convolutions as the two that they are here.

  `sep` becomes `sep/depthwise` and `sep/pointwise`, which has the bias.
  """
  layers: dict[str, dict[str, Source]] = {}
  for source in sources:
    layers.setdefault(source.layer, {})[source.leaf] = source
  parted = []
  for source in sources:
    held = layers[source.layer]
    first = held.get('0') or held.get('weight')
    second = held.get('1') or held.get('pointwise_kernel')
    if first and second and _is_separable(first.value, second.value):
      part = 'depthwise' if source is first else 'pointwise'
      leaf = 'weight' if source is first or source is second else 'bias'
      name = f'{source.layer}/{part}'
      parted.append(dataclasses.replace(source, layer=name, leaf=leaf))
    else:
      parted.append(source)
  return parted


def _is_separable(first: np.ndarray, second: np.ndarray) -> bool:
  """Whether kernels are (*spatial, C, M) and (1, ..., C * M, out)."""
  *spatial, ins, _ = second.shape if second.ndim > 2 else (0, 0, 0)
  same = first.ndim == second.ndim and {*spatial} == {1}
  return same and ins == math.prod(first.shape[-2:])


def _legacy_keras(name: str) -> tuple[str, str] | None:
  """The layer and the leaf of a name in a `.h5` file, of Keras 2 or 3.

  Such a name is the layer's, then a path of the model that may begin with it
  again: 'model_weights/dense/net/dense/kernel:0'. The layer is empty where the
  array is none of a layer; another name gives None.
  """
  top, *path = name.split('/')
  if top == 'optimizer_weights':
    return '', ''
  if top != 'model_weights':
    path = [top, *path]
  variable = path.pop().partition(':')[0] if path else ''
  known = variable == 'bias' or variable in _KERAS_LEAVES
  if not path or not (known or top == 'model_weights'):
    return None
  if path[0] == 'top_level_model_weights':
    return '', ''
  again = max(i for i, part in enumerate(path) if part == path[0])
  layer = '/'.join([path[0], *path[again + 1 :]])
  return layer, _KERAS_LEAVES.get(variable, variable)


def read_haiku(
  params: Mapping[str, Any], state: Mapping[str, Any] | None
) -> list[Source]:
  """The arrays of Haiku's parameters, and the averages of its state."""
  sources = []
  for module, leaves in [*params.items(), *(state or {}).items()]:
    layer, _, average = module.rpartition('/~/')
    if average not in ('mean_ema', 'var_ema'):
      for name, value in leaves.items():
        key, leaf = f'{module}/{name}', _HAIKU_LEAVES.get(name, name)
        sources.append(Source(key, module, leaf, files.as_numpy(key, value)))
      continue
    kept = {'average': average.removesuffix('_ema')}
    if average == 'mean_ema':
      kept['counter'] = 'count'
    for name, leaf in kept.items():
      key = f'{module}/{name}'
      value = files.as_numpy(key, leaves[name])
      sources.append(Source(key, layer, leaf, value))
  files.check_names(source.key for source in sources)
  return sources


def read_equinox(
  model: Any, state: Any, is_trained: bool = True
) -> list[Source]:
  """The arrays of an Equinox module, and the statistics of its state.

  Raises for statistics that have seen nothing, unless told otherwise.
  """
  import equinox  # noqa: PLC0415

  def is_batch_norm(node: Any) -> bool:
    return isinstance(node, equinox.nn.BatchNorm)

  sources = []
  for path, node in jax.tree_util.tree_leaves_with_path(
    model, is_leaf=is_batch_norm
  ):
    names = [path_part(part) for part in path]
    leaves = {names[-1] if names else '': node}
    if is_batch_norm(node):
      name = '.'.join(names)
      leaves = dict(_equinox_batch_norm(name, node, state, is_trained))
    else:
      names = names[:-1]
    for leaf, value in leaves.items():
      if hasattr(value, 'shape'):
        key = '.'.join([*names, leaf])
        array = files.as_numpy(key, value)
        sources.append(Source(key, '.'.join(names), leaf, array))
  return sources


def path_part(part: Any) -> str:
  """The name of a step in the path of a leaf."""
  for name in ('name', 'key', 'idx'):
    if hasattr(part, name):
      return str(getattr(part, name))
  return str(part)


def _equinox_batch_norm(
  name: str, norm: Any, state: Any, is_trained: bool
) -> Iterator[tuple[str, Any]]:
  """The leaves of a batch norm, its averages without the initial zeros."""
  if state is None:
    raise ValueError(
      f'{name!r} is a batch norm, whose statistics are in the state: give '
      'state=, the second result of equinox.nn.make_with_state.'
    )
  yield from (('weight', norm.weight), ('bias', norm.bias))
  if norm.mode == 'ema':
    if is_trained and state.get(norm.ema_first_time_index):
      raise ValueError(f'{name!r} has no statistics: it was never trained.')
    mean, var = state.get(norm.ema_state_index)
  else:
    count = np.asarray(state.get(norm.batch_counter))
    share = 1 - norm.momentum ** int(count) if count else 1
    mean, var = (
      np.asarray(x) / share for x in state.get(norm.batch_state_index)
    )
    yield 'count', count
  yield from (('mean', mean), ('var', var))


def write_equinox(
  model: Any, state: Any, arrays: Mapping[str, np.ndarray], count: int
) -> tuple[Any, Any]:
  """A module and its state with arrays by the keys that `read_equinox` gives.

  `count` is that of batches for statistics that are new.
  """
  import equinox  # noqa: PLC0415

  def is_batch_norm(node: Any) -> bool:
    return isinstance(node, equinox.nn.BatchNorm)

  def new(path: Any, node: Any) -> Any:
    nonlocal state
    key = '.'.join(map(path_part, path))
    if not is_batch_norm(node):
      return jnp.asarray(arrays[key]) if key in arrays else node
    old = dict(_equinox_batch_norm(key, node, state, is_trained=False))
    held = {n: arrays.get(f'{key}.{n}', a) for n, a in old.items()}
    moments = held['mean'], held['var']
    if not all(map(np.array_equal, moments, (old['mean'], old['var']))):
      state = _with_moments(node, state, moments, count)
    for name in ('weight', 'bias'):
      if held[name] is not None:
        value = jnp.asarray(held[name])
        node = equinox.tree_at(operator.attrgetter(name), node, value)
    return node

  filled = jax.tree_util.tree_map_with_path(new, model, is_leaf=is_batch_norm)
  return filled, state


def _with_moments(norm: Any, state: Any, moments: Any, count: int) -> Any:
  """The state of a batch norm that has seen many batches."""
  moments = tuple(map(jnp.asarray, moments))
  if norm.mode == 'ema':
    state = state.set(norm.ema_first_time_index, jnp.asarray(False))
    return state.set(norm.ema_state_index, moments)
  old = state.get(norm.batch_counter)
  state = state.set(norm.batch_counter, jnp.full_like(old, count))
  return state.set(norm.batch_state_index, moments)


def from_oihw(value: np.ndarray) -> np.ndarray:
  """(out, in, *spatial) to (*spatial, in, out); a matrix is transposed."""
  return np.moveaxis(value, (1, 0), (-2, -1))


def to_oihw(value: np.ndarray) -> np.ndarray:
  """The inverse of `from_oihw`."""
  return np.moveaxis(value, (-2, -1), (1, 0))


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape of a kernel (*spatial, in, out), that of a matrix if it is one.

  A convolution of windows of one place is a dense layer.
  """
  *spatial, ins, outs = shape if len(shape) > 1 else (*shape, 1)
  return (ins, outs) if {*spatial} == {1} else shape


def flipped(value: np.ndarray) -> np.ndarray:
  """A kernel with its spatial axes, all but the last two, turned round."""
  return np.flip(value, tuple(range(value.ndim - 2)))


def from_torch_transposed(
  value: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
  """(in, out, *spatial), flipped, of ConvTranspose.

  The kernel of one in groups, (in, out / groups, *spatial), becomes that of one
  without, zero between groups, which is what Flax has; or of a convolution in
  groups, (*spatial, in / groups, out), with dilated inputs.
  """
  value = flipped(np.moveaxis(value, (0, 1), (-2, -1)))
  *spatial, ins, outs = value.shape
  groups = shape[-1] // outs
  if groups < 2 or groups * outs != shape[-1] or ins % groups:
    return value
  blocks = np.split(value, groups, -2)
  if shape[-2] != ins:
    return np.concatenate(blocks, -1)
  whole = np.zeros((*spatial, ins, shape[-1]), value.dtype)
  for i, block in enumerate(blocks):
    whole[_block(i, groups, whole)] = block
  return whole


def in_groups(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """(in, out, *spatial) as (in, out / groups, *spatial), where it is that."""
  ins, outs, *spatial = value.shape
  if outs % shape[1] or [*shape[2:]] != spatial:
    return value
  groups = outs // shape[1]
  if shape[0] == ins * groups:  # a convolution in groups here
    return np.concatenate(np.split(value, groups, 1))
  if shape[0] != ins or ins % groups:
    return value
  last = np.moveaxis(value, (0, 1), (-2, -1)).copy()
  blocks = []
  for i in range(groups):
    blocks.append(last[_block(i, groups, last)].copy())
    last[_block(i, groups, last)] = 0
  if last.any():  # not zero between groups
    return value
  return np.moveaxis(np.concatenate(blocks, -2), (-2, -1), (0, 1))


def _block(i: int, groups: int, value: np.ndarray) -> tuple[Any, ...]:
  """Where group `i` is in a kernel (*spatial, in, out)."""
  ins, outs = (n // groups for n in value.shape[-2:])
  inputs, outputs = (
    slice(i * ins, (i + 1) * ins),
    slice(i * outs, (i + 1) * outs),
  )
  return ..., inputs, outputs


def to_torch_transposed(value: np.ndarray) -> np.ndarray:
  """The inverse of `from_torch_transposed`."""
  return np.moveaxis(flipped(value), (-2, -1), (0, 1))


def from_flat(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """A kernel of inputs flattened as (C, *spatial): to (*spatial, C)."""
  split = value.reshape(*shape, -1)
  return np.moveaxis(split, 0, -2).reshape(value.shape)


def to_flat(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """The inverse of `from_flat`, given the same (C, *spatial)."""
  split = value.reshape(*shape[1:], shape[0], -1)
  return np.moveaxis(split, -2, 0).reshape(value.shape)


def from_depthwise(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """(*spatial, C, M) of Keras to (*spatial, 1, C * M), if that is asked."""
  channels = math.prod(value.shape[-2:])
  grouped = (*value.shape[:-2], 1, channels)
  return value.reshape(grouped) if shape == grouped else value
