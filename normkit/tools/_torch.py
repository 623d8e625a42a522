"""The way back: the arrays of a Flax model as those of a PyTorch model."""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any

import jax
import numpy as np

from normkit.tools import _frameworks
from normkit.tools._frameworks import Source
from normkit.tools._layouts import Shapes
from normkit.tools._template import Leaf, Template, leaf_of, report


def unfilled(
  template: Template,
  is_transposed: Callable[[str], bool],
  flatten: Shapes,
  added: Mapping[str, float],
) -> dict[Leaf, np.ndarray]:
  """Every leaf as PyTorch lays it out; a count is one number."""
  return {
    leaf: _unfilled(leaf, value, is_transposed, flatten, added)
    for leaf, value in template.leaves.items()
  }


def _unfilled(
  leaf: Leaf,
  value: Any,
  is_transposed: Callable[[str], bool],
  flatten: Shapes,
  added: Mapping[str, float],
) -> np.ndarray:
  layer, name = leaf
  if isinstance(value, jax.ShapeDtypeStruct):
    raise TypeError(f'variables: {layer}/{name} is a shape, not an array.')
  array = np.asarray(value)
  if name == 'count':
    return np.asarray(array.max(initial=0), np.int64)
  if name == 'scale' and layer in added:
    wide = np.promote_types(array.dtype, np.float32)
    return np.asarray(array.astype(wide) - added[layer], array.dtype)
  if name != 'kernel':
    return array
  if array.ndim > 2 and is_transposed(layer):
    return _frameworks.to_torch_transposed(array)
  if layer in flatten:
    array = _frameworks.to_flat(array, tuple(flatten[layer]))
  return _frameworks.to_oihw(array)


def named(
  template: Template,
  arrays: Mapping[Leaf, np.ndarray],
  rename: Callable[[str], str],
) -> dict[str, np.ndarray]:
  """The arrays by names that PyTorch's own layers have."""
  state: dict[str, np.ndarray] = {}

  def put(layer: str, leaf: str, array: np.ndarray) -> None:
    leaf = _frameworks.TORCH_NAMES.get(leaf, leaf)
    key = '.'.join(filter(None, (rename(layer), leaf)))
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
  rename: Callable[[str], str],
) -> dict[str, np.ndarray]:
  """The arrays by the names, shapes and dtypes of the sources."""
  state: dict[str, np.ndarray] = {}
  faults = []
  left = dict(arrays)
  for source in sources:
    layer = rename(source.layer)
    leaf = layer, leaf_of(source.leaf, layer, template)
    name, like = '/'.join(leaf), source.value
    if leaf not in arrays:
      if source.leaf == 'count':
        state[source.key] = np.array(like)
      else:
        faults.append(f'missing: {name!r}, for {source.key!r} {like.shape}')
      continue
    left.pop(leaf, None)
    value = arrays[leaf]
    if source.leaf == leaf[1]:  # what has Flax's name there goes as it is
      value = value if leaf[1] == 'count' else np.asarray(template.leaves[leaf])
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


def _fits(leaf: str, here: tuple[int, ...], there: tuple[int, ...]) -> bool:
  """Whether shapes differ in axes of one element, or in how heads lie."""
  if here == there or leaf == 'kernel':
    return here == there
  ours, theirs = (tuple(n for n in shape if n != 1) for shape in (here, there))
  is_flat = leaf == 'scale' and len(there) == 1
  return ours == theirs or (is_flat and math.prod(here) == there[0])
