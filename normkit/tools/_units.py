"""What is matched: layers, and arrays that stand alone, on both sides.

A unit has a mark, which is the same for a layer there and the one here: the
shape of its kernel as Flax has it, and how many arrays lie beside it.
"""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import re
from typing import Any, TypeAlias

from normkit.tools import _attention, _frameworks
from normkit.tools._frameworks import Source
from normkit.tools._template import Template, leaf_of, matches

Mark: TypeAlias = tuple[Any, ...]

_MAIN = ('weight', 'kernel', 'embedding', 'scale', 'gamma')
_BESIDE = ('bias', 'beta', 'mean', 'var')


@dataclasses.dataclass(frozen=True)
class Unit:
  """A layer, or an array that stands alone.

  Attributes:
    name: the layer's, or the array's own.
    parts: the parts of the name: ('layer1', '0', 'conv1').
    mark: what it has in common with its peer.
    arrays: its arrays, as (layer, leaf).
    roles: of an attention the layers of query, key and value, else none.
  """

  name: str
  parts: tuple[str, ...]
  mark: Mark
  arrays: tuple[tuple[str, str], ...]
  roles: tuple[str, ...] = ()


def units_there(
  sources: Sequence[Source], separator: str, is_torch: bool
) -> list[Unit]:
  """The units of another framework, in the order of the sources."""
  layers: dict[str, dict[str, tuple[int, ...]]] = {}
  for source in sources:
    if source.leaf != 'count':
      shape = _torch_shape(source) if is_torch else source.value.shape
      layers.setdefault(source.layer, {})[source.leaf] = shape
  units = _units(layers, separator, is_torch)
  return units if is_torch else [_as_keras(u, layers) for u in units]


def _as_keras(unit: Unit, layers: Collection[str]) -> Unit:
  """A unit with the modules that Keras writes into its flat names.

  'conv2_block1_3_bn' is in 'block1' of 'conv2', and 'dense' before 'dense_1'.
  """
  is_first = f'{unit.name}_1' in layers
  name = f'{unit.name}_0' if is_first else unit.name
  return dataclasses.replace(unit, parts=tuple(re.split('[/_]', name)))


def units_here(
  template: Template,
  is_torch: bool,
  transposed: Sequence[str],
  inputs_first: Sequence[str],
) -> list[Unit]:
  """The units of a model."""
  is_transposed = template.is_transposed(transposed)
  layers: dict[str, dict[str, tuple[int, ...]]] = {}
  for layer, leaf in template.leaves:
    shape, inputs = template.shape((layer, leaf)), template.heads.get(layer)
    if leaf == 'kernel' and inputs is not None:
      shape = _attention.matrix(shape, inputs)
    if leaf == 'kernel' and len(shape) > 1:
      swaps = len(shape) > 2 and is_transposed(layer)
      if swaps or (len(shape) == 2 and matches(layer, inputs_first)):
        shape = (*shape[:-2], shape[-1], shape[-2])
    if leaf == 'embedding' and is_torch:
      shape = shape[::-1]
    if leaf != 'count':
      layers.setdefault(layer, {})[leaf] = shape
  return _units(layers, '/', is_torch)


def _torch_shape(source: Source) -> tuple[int, ...]:
  shape = tuple(source.value.shape)
  if source.leaf != 'weight' or len(shape) < 2:
    return shape
  outs, ins, *spatial = shape
  return (*spatial, ins, outs)


def _units(
  layers: Mapping[str, Mapping[str, tuple[int, ...]]],
  separator: str,
  is_torch: bool,
) -> list[Unit]:
  units = []

  def parts(name: str) -> tuple[str, ...]:
    return tuple(name.split(separator))

  for layer, shapes in layers.items():
    known = [leaf for leaf in shapes if leaf in _BESIDE or leaf.isdecimal()]
    main = [leaf for leaf in _MAIN if leaf in shapes][:1]
    whole = [*main, *known]
    if whole in (['gamma'], ['bias'], ['beta']):
      whole = []
    if whole:
      held = {leaf: shapes[leaf] for leaf in whole}
      arrays = tuple((layer, leaf) for leaf in whole)
      mark = _mark(held, is_torch)
      units.append(Unit(layer, parts(layer), mark, arrays))
    for leaf in shapes:
      if leaf not in whole:
        name = separator.join(filter(None, (layer, leaf)))
        mark = _alone(shapes[leaf])
        units.append(Unit(name, parts(name), mark, ((layer, leaf),)))
  return _with_attention(units, separator)


def _mark(shapes: Mapping[str, tuple[int, ...]], is_torch: bool) -> Mark:
  """That of a layer; which of two vectors is which, Keras does not tell."""
  first, *_ = shapes.values()
  if len(shapes) == 1 and _is_vector(first):
    return _alone(first)
  if _is_vector(first):
    has_mean = is_torch and 'mean' in shapes
    return 'norm', max(first, default=1), len(shapes), has_mean
  if not is_torch and len(first) > 2 and first[-1] == 1:
    first = (*first[:-2], 1, first[-2])  # depthwise
  return 'kernel', _frameworks.without_ones(first), len(shapes)


def _alone(shape: tuple[int, ...]) -> Mark:
  if _is_vector(shape):
    return 'vector', max(shape, default=1)
  return 'array', tuple(shape)


def _is_vector(shape: tuple[int, ...]) -> bool:
  """Whether at most one axis has more than one element."""
  return sum(size > 1 for size in shape) < 2


def _with_attention(units: Sequence[Unit], separator: str) -> list[Unit]:
  """Query, key and value as one unit, whether or not they are one array."""
  layers = {u.name: u for u in units if u.mark[0] == 'kernel'}
  found: list[Unit] = []
  taken: dict[str, Unit] = {}
  for unit in layers.values():
    parent, _, last = unit.name.rpartition(separator)
    if _attention.is_fused(last):
      mark = ('qkv', *unit.mark[1:])
      taken[unit.name] = dataclasses.replace(unit, mark=mark)
      continue
    roles = _attention.projections(parent, layers, separator)
    if unit.name in roles and all(len(layers[r].mark[1]) == 2 for r in roles):
      taken[unit.name] = _together(parent, roles, layers, separator)
  for unit in units:
    kept = taken.get(unit.name, unit)
    if kept not in found:
      found.append(kept)
  return found


def _together(
  parent: str,
  roles: tuple[str, ...],
  layers: Mapping[str, Unit],
  separator: str,
) -> Unit:
  marks = [layers[role].mark for role in roles]
  inputs, _ = marks[0][1]
  mark = 'qkv', (inputs, sum(m[1][1] for m in marks)), marks[0][2]
  name = separator.join(filter(None, (parent, 'qkv')))
  arrays = tuple(a for role in roles for a in layers[role].arrays)
  return Unit(name, tuple(name.split(separator)), mark, arrays, roles)


def named(
  there: Unit, here: Unit, template: Template, separator: str
) -> dict[str, str]:
  """What `names` of the converters has to say of a pair."""
  if there.roles and here.roles:
    return dict(zip(there.roles, here.roles, strict=True))
  if here.roles:  # taken apart by the name that it has there
    last = there.name.rpartition(separator)[2]
    parent = here.name.rpartition('/')[0]
    return {there.name: '/'.join(filter(None, (parent, last)))}
  if there.roles:
    raise ValueError(
      f'{", ".join(there.roles)} are one array here, in {here.name!r}, which '
      'is not converted. Join them there, or part them here.'
    )
  (layer, leaf), (path, held) = there.arrays[0], here.arrays[0]
  is_layer = there.name == layer
  if is_layer and leaf_of(leaf, path, template) == held:
    return {layer: path}
  name = separator.join(filter(None, (layer, leaf)))
  return {name: '/'.join(filter(None, (path, held)))}
