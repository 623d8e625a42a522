"""The way back: the arrays of a Flax model as those of a PyTorch model."""

from collections.abc import Callable, Mapping, Sequence
import importlib
import math
from typing import Any

import numpy as np

from normkit.tools import _attention, _frameworks, files
from normkit.tools._frameworks import Source
from normkit.tools._layouts import Shapes
from normkit.tools._template import (
  Leaf,
  Rename,
  Template,
  matches,
  report,
  targets,
  value_of,
)


def unfilled(
  template: Template,
  is_transposed: Callable[[str], bool],
  flatten: Shapes,
  added: Mapping[str, float],
  inputs_first: Sequence[str],
) -> dict[Leaf, np.ndarray]:
  """Every leaf as PyTorch lays it out; a count is one number."""

  def laid_out(leaf: Leaf) -> np.ndarray:
    array = _unfilled(leaf, template, flatten, added)
    if leaf[1] != 'kernel' or array.ndim < 2:
      return array
    if array.ndim > 2 and is_transposed(leaf[0]):
      return _frameworks.to_torch_transposed(array)
    if array.ndim == 2 and matches(leaf[0], inputs_first):
      return array
    return _frameworks.to_oihw(array)

  return {leaf: laid_out(leaf) for leaf in template.leaves}


def _unfilled(
  leaf: Leaf,
  template: Template,
  flatten: Shapes,
  added: Mapping[str, float],
) -> np.ndarray:
  """A leaf as numbers, without heads, its inputs flattened as there."""
  layer, name = leaf
  array = value_of(leaf, template, added)
  if name == 'count':
    return np.asarray(array.max(initial=0), np.int64)
  if layer in template.heads:
    array = _attention.without_heads(name, array, template.heads[layer])
  if name == 'kernel' and layer in flatten:
    array = _frameworks.to_flat(array, tuple(flatten[layer]))
  return array


def named(
  template: Template,
  arrays: Mapping[Leaf, np.ndarray],
  rename: Rename,
) -> dict[str, np.ndarray]:
  """The arrays by names that PyTorch's own layers have."""
  state: dict[str, np.ndarray] = {}

  def put(layer: str, leaf: str, array: np.ndarray) -> None:
    there = _frameworks.TORCH_NAMES.get(leaf, leaf)
    path = '/'.join(filter(None, (layer, leaf)))
    key = '.'.join(filter(None, rename(Source(path, layer, there, array))))
    if key in state:
      raise ValueError(f'two arrays would be {key!r}. Mend names.')
    state[key] = np.array(array, order='C')

  for (layer, leaf), array in arrays.items():
    put(layer, leaf, array)
    if leaf == 'mean' and (layer, 'count') not in template.leaves:
      put(layer, 'count', np.asarray(0, np.int64))
  return state


def alike(
  template: Template,
  arrays: Mapping[Leaf, np.ndarray],
  sources: Sequence[Source],
  rename: Rename,
  is_transposed: Callable[[str], bool],
  inputs_first: Sequence[str],
) -> dict[str, np.ndarray]:
  """The arrays by the names, shapes and dtypes of the sources."""
  state: dict[str, np.ndarray] = {}
  faults = []
  left = dict(arrays)
  for source in sources:
    leaves = targets(rename(source), template)
    leaf, like = leaves[0], source.value
    name = ' + '.join('/'.join(leaf) for leaf in leaves)
    if not all(leaf in arrays for leaf in leaves):
      if source.leaf == 'count':
        state[source.key] = np.array(like)
      else:
        faults.append(f'missing: {name!r}, for {source.key!r} {like.shape}')
      continue
    for part in leaves:
      left.pop(part, None)
    value = _like_source(
      template, arrays, leaves, source, is_transposed, inputs_first
    )
    if not _fits(leaf[1], value.shape, like.shape):
      faults.append(
        f'shape: {name!r} becomes {value.shape}, but {source.key!r} is '
        f'{like.shape}'
      )
      continue
    state[source.key] = np.array(value.reshape(like.shape), like.dtype)
  faults += [
    f'extra: {"/".join(leaf)!r}' for leaf in left if leaf[1] != 'count'
  ]
  if faults:
    raise ValueError(report(faults))
  return state


def _like_source(
  template: Template,
  arrays: Mapping[Leaf, np.ndarray],
  leaves: Sequence[Leaf],
  source: Source,
  is_transposed: Callable[[str], bool],
  inputs_first: Sequence[str],
) -> np.ndarray:
  """What the leaves of a source are there, before its axes of one element."""
  (layer, leaf), like = leaves[0], source.value.shape
  value = arrays[leaves[0]]
  if len(leaves) > 1:
    axis = -1 if matches(layer, inputs_first) else 0
    return np.concatenate([arrays[part] for part in leaves], axis)
  if source.leaf == leaf and leaf in ('kernel', 'bias'):
    held = template.leaves[leaves[0]]  # Flax's name there too: as it is
    return np.asarray(held) if held.shape == like else value
  if leaf == 'kernel' and value.ndim == len(like) > 2 and is_transposed(layer):
    return _frameworks.in_groups(value, like)
  return value


def _fits(leaf: str, here: tuple[int, ...], there: tuple[int, ...]) -> bool:
  """Whether shapes differ in axes of one element, or in how heads lie."""
  if here == there or leaf == 'kernel':
    matrices = [s[:2] if {*s[2:]} == {1} else s for s in (here, there)]
    return matrices[0] == matrices[1]
  ours, theirs = (tuple(n for n in shape if n != 1) for shape in (here, there))
  is_flat = leaf == 'scale' and len(there) == 1
  return ours == theirs or (is_flat and math.prod(here) == there[0])


def tensor(name: str, value: Any) -> Any:
  """An array as a tensor of the same bits."""
  torch: Any = importlib.import_module('torch')
  array = np.array(files.as_numpy(name, value), order='C')
  array = array.astype(array.dtype.newbyteorder('='), copy=False)
  if array.dtype not in files.NOT_OF_NUMPY:
    return torch.from_numpy(array)
  bits = array.view(np.int16 if array.dtype.itemsize == 2 else np.uint8)
  return torch.from_numpy(bits).view(getattr(torch, array.dtype.name))
