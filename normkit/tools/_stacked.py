"""Layers that `nn.scan` or `nnx.scan` runs: arrays with an axis of layers.

Each layer of them is one of the other framework, so they are taken apart:
'blocks/fc' becomes 'blocks/0/fc', 'blocks/1/fc', and so on.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from normkit.tools._template import Leaf, Template, put

Scanned: TypeAlias = Sequence[str] | Mapping[str, int]


def unstacked(template: Template, scanned: Scanned | None) -> Template:
  """The template with each of the layers that are stacked.

  Args:
    template: the model.
    scanned: the paths of the modules that are scanned, or their axes by path.

  Raises:
    TypeError: if `scanned` is one string.
    ValueError: if a path is of no layer, or arrays under it have no such axis,
      or of other lengths.
  """
  if not scanned:
    return template
  if isinstance(scanned, str):
    raise TypeError(f"scanned must be a sequence of paths: ('{scanned}',).")
  axes = (
    {**scanned} if isinstance(scanned, Mapping) else dict.fromkeys(scanned, 0)
  )
  stacks: dict[Leaf, tuple[list[Leaf], int]] = {}
  for path, axis in axes.items():
    inside = [leaf for leaf in template.leaves if _is_in(leaf[0], path)]
    count = _count(template, path, inside, axis)
    for layer, name in inside:
      layers = _layers(layer, path, count)
      stacks[layer, name] = [(each, name) for each in layers], axis
  leaves = {}
  for leaf, value in template.leaves.items():
    parts, axis = stacks.get(leaf, ([leaf], 0))
    for i, part in enumerate(parts):
      leaves[part] = _taken(value, i, axis) if leaf in stacks else value

  def rebuild(new: Mapping[Leaf, Any]) -> Any:
    whole = {}
    for leaf, value in template.leaves.items():
      if leaf in stacks:
        parts, axis = stacks[leaf]
        arrays = [np.asarray(new[part]) for part in parts]
        whole[leaf] = put(np.stack(arrays, axis), value)
      else:
        whole[leaf] = new[leaf]
    return template.rebuild(whole)

  def all_of(layers: Iterable[str]) -> dict[str, str]:
    """The layers that each of some has become, and it."""
    counts = {
      layer: [p for p, _ in parts] for (layer, _), (parts, _) in stacks.items()
    }
    return {each: old for old in layers for each in counts.get(old, [old])}

  general = {
    e: template.general[o] for e, o in all_of(template.general).items()
  }
  transposed = frozenset(all_of(template.transposed))
  return Template(leaves, rebuild, transposed, general)


def _is_in(layer: str, path: str) -> bool:
  return layer == path or layer.startswith(f'{path}/') or not path


def _layers(layer: str, path: str, count: int) -> list[str]:
  """The names of a layer under a scanned path, one for each of the stack."""
  rest = layer[len(path) :].strip('/')
  return ['/'.join(filter(None, (path, str(i), rest))) for i in range(count)]


def _count(
  template: Template, path: str, inside: Sequence[Leaf], axis: int
) -> int:
  """How many layers are stacked under a path."""
  shapes = {leaf: template.shape(leaf) for leaf in inside}
  counts = {s[axis] if -len(s) <= axis < len(s) else 0 for s in shapes.values()}
  if len(counts) != 1 or 0 in counts:
    told = {'/'.join(leaf): shape for leaf, shape in shapes.items()}
    raise ValueError(
      f'scanned: {path!r} must be the path of a module whose arrays have as '
      f'many layers along axis {axis}. Its arrays are {told!s:.300}, and the '
      f'layers of the model {sorted(template.layers)!s:.300}.'
    )
  return counts.pop()


def _taken(value: Any, i: int, axis: int) -> Any:
  """A layer's array, or its shape, in a stack."""
  if isinstance(value, jax.ShapeDtypeStruct):
    shape = [*value.shape]
    del shape[axis]
    return jax.ShapeDtypeStruct(tuple(shape), value.dtype)
  return np.take(np.asarray(value), i, axis)
