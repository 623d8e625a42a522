"""The model that receives weights: its layers, and the account of every array.

Layers are named by their paths, 'Block_0/Conv_1', in linen and in nnx alike.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import fnmatch
import functools
import math
from typing import Any, TypeAlias

from flax import nnx
from flax.core import meta
import jax
import jax.numpy as jnp
import numpy as np

from normkit import _types
from normkit.tools import _attention
from normkit.tools._frameworks import Source, path_part

Leaf: TypeAlias = tuple[str, str]  # the layer's path, the leaf's name
# What a layer here is given, its leaf and its shape: an array as Flax has it.
Layout: TypeAlias = Callable[
  [str, str, np.ndarray, tuple[int, ...]], np.ndarray
]
# From an array there to the path of its layer here, and to its leaf: one here,
# or what the source says.
Rename: TypeAlias = Callable[[Source], tuple[str, str]]

_WEIGHTS = ('kernel', 'embedding', 'scale')
_IN_ORDER = (*_WEIGHTS, 'bias', 'mean', 'var')
_ALIASES = {'gamma': 'scale', 'beta': 'bias'}
_FILLED = nnx.Any(nnx.Param, nnx.BatchStat)


@dataclasses.dataclass(frozen=True)
class Template:
  """A Flax model taken apart.

  Attributes:
    leaves: arrays, or their shapes and dtypes.
    rebuild: makes the model of new leaves.
    transposed: the layers that are seen to be transposed convolutions.
    general: the layers that are seen to have several axes of inputs or of
      outputs: how many are of inputs.
  """

  leaves: Mapping[Leaf, Any]
  rebuild: Callable[[Mapping[Leaf, Any]], Any]
  transposed: frozenset[str] = frozenset()
  general: Mapping[str, int] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def heads(self) -> Mapping[str, int]:
    """The layers whose kernels have heads: how many axes are of inputs."""
    return _attention.heads(self.leaves) | {**self.general}

  @functools.cached_property
  def layers(self) -> frozenset[str]:
    """The paths of all layers."""
    return frozenset(layer for layer, _ in self.leaves)

  def shape(self, leaf: Leaf) -> tuple[int, ...]:
    """The shape of a leaf."""
    return tuple(self.leaves[leaf].shape)

  def is_transposed(self, patterns: Sequence[str]) -> Callable[[str], bool]:
    """Tells of a layer whether it is a transposed convolution."""
    return lambda layer: layer in self.transposed or matches(layer, patterns)


def template_of(variables: Any) -> Template:
  """Takes linen variables or an nnx.Module apart."""
  if isinstance(variables, nnx.Module):
    return _of_module(variables)
  if not isinstance(variables, Mapping) or not all(
    tree is None or isinstance(tree, Mapping) for tree in variables.values()
  ):
    raise TypeError(
      'variables must be an nnx.Module or linen variables, '
      f"{{'params': {{...}}, ...}}, got {type(variables).__name__}."
    )
  nodes, tree = jax.tree_util.tree_flatten_with_path(variables, is_leaf=_is_box)
  flat = {tuple(map(path_part, path)): node for path, node in nodes}
  paths = _unique(((path[1:], path) for path in flat), '/')
  leaf_at = {path: leaf for leaf, path in paths.items()}

  def rebuild(leaves: Mapping[Leaf, Any]) -> Any:
    new = [_boxed(node, leaves[leaf_at[path]]) for path, node in flat.items()]
    return jax.tree.unflatten(tree, new)

  return Template(
    {leaf: _unboxed(flat[path]) for leaf, path in paths.items()}, rebuild
  )


def _is_box(node: Any) -> bool:
  return isinstance(node, meta.AxisMetadata)


def _unboxed(node: Any) -> Any:
  """What is in a box, such as `nn.Partitioned`, and was not moved by it."""
  while _is_box(node):
    node = node.value if hasattr(node, 'value') else node.unbox()
  return node


def _boxed(node: Any, value: Any) -> Any:
  """A value in boxes like those of a node."""
  if not _is_box(node):
    return value
  inside = node.value if hasattr(node, 'value') else node.unbox()
  return node.replace_boxed(_boxed(inside, value))


def _of_module(model: nnx.Module) -> Template:
  flat = dict(nnx.to_flat_state(nnx.state(model, _FILLED)))
  paths = _unique(((path, path) for path in flat), '/')

  def rebuild(leaves: Mapping[Leaf, Any]) -> Any:
    new = [
      (paths[leaf], flat[paths[leaf]].replace(value))
      for leaf, value in leaves.items()
    ]
    copy = nnx.clone(model)
    nnx.update(copy, nnx.from_flat_state(new))
    return copy

  transposed, general = set(), {}
  for path, module in nnx.iter_modules(model):
    name = '/'.join(map(str, path))
    if isinstance(module, nnx.LinearGeneral) and not module.batch_axis:
      general[name] = len(module.axis)
    if isinstance(module, nnx.ConvTranspose):
      transposed.add(name)
      if module.transpose_kernel:
        raise ValueError(
          f'{name!r} has transpose_kernel=True, which is not converted. Build '
          'it with False.'
        )
  leaves = {leaf: jax.tree.leaves(flat[paths[leaf]])[0] for leaf in paths}
  return Template(leaves, rebuild, frozenset(transposed), general)


def _unique(paths: Iterable[tuple[Any, Any]], sep: str) -> dict[Leaf, Any]:
  """Paths by layer and leaf; raises where two have the same."""
  named: dict[Leaf, Any] = {}
  for path, whole in paths:
    *layer, leaf = map(str, path)
    key = sep.join(layer), leaf
    if key in named:
      raise ValueError(
        f'variables: {whole} and {named[key]} have one name, without the '
        'collection. Give those that hold the weights alone.'
      )
    named[key] = whole
  return named


def matches(name: str, patterns: Sequence[str]) -> bool:
  """Whether a name fits one of the patterns."""
  if isinstance(patterns, str):
    raise TypeError(f"give patterns as a sequence: ('{patterns}',).")
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def without(
  arrays: Mapping[str, Any], patterns: Sequence[str]
) -> dict[str, Any]:
  """The arrays whose names fit none of the patterns."""
  return {k: v for k, v in arrays.items() if not matches(str(k), patterns)}


def fill(
  template: Template,
  sources: Sequence[Source],
  rename: Rename,
  layout: Layout,
  count: int | None,
  added: Mapping[str, float],
) -> Any:
  """The model with the arrays of the sources; raises unless all fit.

  `added` is what the scales of layers are given beside.
  """
  values: dict[Leaf, Any] = {}
  origin: dict[Leaf, str] = {}
  faults = []
  for source in sources:
    for leaf, value in placed(source, rename(source), template, layout):
      if leaf in origin:
        raise ValueError(
          f'{origin[leaf]!r} and {source.key!r} both go to {"/".join(leaf)!r}. '
          'Mend names.'
        )
      origin[leaf] = source.key
      if leaf in template.leaves:
        faults += _faults(source, leaf, value, template)
        values[leaf] = with_added(value, leaf, template, added)
      elif source.leaf != 'count':
        faults.append(
          f'extra: {source.key!r} {source.value.shape}, for {"/".join(leaf)!r}'
        )
  for leaf, struct in template.leaves.items():
    if leaf[1] == 'count' and leaf not in values and count is not None:
      values[leaf] = np.full(struct.shape, count)
      given = Source('count=', '', 'count', values[leaf])
      faults += _faults(given, leaf, values[leaf], template)
    elif leaf not in values:
      faults.append(f'missing: {"/".join(leaf)!r} {tuple(struct.shape)}')
  if faults:
    raise ValueError(report(faults))
  leaves = template.leaves.items()
  return template.rebuild(
    {leaf: put(values[leaf], struct) for leaf, struct in leaves}
  )


def put(value: Any, struct: Any) -> jax.Array:
  """An array of the dtype of another, or of its shape, and where that is."""
  sharding = getattr(struct, 'sharding', None)
  mesh = getattr(sharding, 'mesh', None)
  is_somewhere = not isinstance(mesh, jax.sharding.AbstractMesh)
  if not getattr(struct, 'committed', is_somewhere):
    sharding = None
  # Of NumPy's own copy: jnp.array compiles a program for each shape and dtype.
  array: jax.Array = jax.device_put(np.array(value, struct.dtype), sharding)
  return array


def targets(place: tuple[str, str], template: Template) -> list[Leaf]:
  """The leaves that an array for a layer goes to, of which it may be a part."""
  layer, leaf = place
  layers = _attention.targets(layer, template.layers)
  return [(here, leaf_of(leaf, here, template)) for here in layers]


def placed(
  source: Source, place: tuple[str, str], template: Template, layout: Layout
) -> list[tuple[Leaf, np.ndarray]]:
  """The leaves that a source goes to, each with its value as Flax has it."""
  leaves = targets(place, template)
  held = [leaf for leaf in leaves if leaf in template.leaves]
  if not held:
    return [(leaves[0], source.value)]
  value = _laid_out(source, held[0], template, layout)
  if len(held) < len(leaves):
    return [(leaf, value) for leaf in leaves]
  if len(leaves) > 1:
    sizes = [_outputs(leaf, template) for leaf in leaves]
    if value.ndim and value.shape[-1] == sum(sizes):
      parts = np.split(value, np.cumsum(sizes)[:-1], -1)
      return [
        (leaf, _with_heads(leaf, part, template))
        for leaf, part in zip(leaves, parts, strict=True)
      ]
  return [(leaves[0], _with_heads(leaves[0], value, template))]


def _outputs(leaf: Leaf, template: Template) -> int:
  """How many outputs a kernel or a bias has, those of all heads."""
  inputs = template.heads.get(leaf[0], 1) if leaf[1] == 'kernel' else 0
  return math.prod(template.shape(leaf)[inputs:])


def _with_heads(
  leaf: Leaf, value: np.ndarray, template: Template
) -> np.ndarray:
  if leaf[0] not in template.heads:
    return value
  inputs, shape = template.heads[leaf[0]], template.shape(leaf)
  return _attention.with_heads(leaf[1], value, shape, inputs)


def leaf_of(leaf: str, layer: str, template: Template) -> str:
  """The name here of a leaf of a source."""
  if leaf == 'weight':
    held = [name for name in _WEIGHTS if (layer, name) in template.leaves]
  elif leaf.isdecimal():
    held = [name for name in _IN_ORDER if (layer, name) in template.leaves]
    if held[:1] in (['scale'], ['bias']) and held[1:2] != ['bias']:
      raise ValueError(
        f'{layer!r} has a {held[0]} alone, and no order tells whether gamma or '
        "beta is there. Give its arrays by name, {'beta': ..., ...}."
      )
    held = held[int(leaf) :]
  elif (layer, leaf) not in template.leaves and leaf in _ALIASES:
    alias = _ALIASES[leaf]
    held = [alias] if (layer, alias) in template.leaves else []
  else:
    held = []
  return held[0] if held else leaf


def _laid_out(
  source: Source, leaf: Leaf, template: Template, layout: Layout
) -> np.ndarray:
  """A value as Flax has it; axes of one element come and go in vectors."""
  value, shape = source.value, template.shape(leaf)
  if leaf[1] == 'count' and value.ndim == 0:
    return np.broadcast_to(value, shape)
  if source.leaf != leaf[1]:  # what has Flax's name there goes as it is
    value = layout(*leaf, value, shape)
  size = math.prod(shape)
  if len(shape) < 2 and value.shape != shape and value.size == size:
    longest = max(value.shape, default=1)
    return value.reshape(shape) if longest == value.size else value
  return value


def _faults(
  source: Source, leaf: Leaf, value: np.ndarray, template: Template
) -> list[str]:
  """What is wrong with the value that a leaf is given."""
  name, struct = '/'.join(leaf), template.leaves[leaf]
  if value.shape != tuple(struct.shape):
    return [
      f'shape: {source.key!r} {source.value.shape} becomes {value.shape}, but '
      f'{name!r} is {tuple(struct.shape)}'
    ]
  kinds = jnp.integer, jnp.floating, jnp.complexfloating
  theirs, ours = (
    next((i for i, k in enumerate(kinds) if jnp.issubdtype(dtype, k)), -1)
    for dtype in (value.dtype, struct.dtype)
  )
  is_count = leaf[1] == 'count' and theirs == 0
  # Integers are no floats: those of quantized weights need their scales.
  if theirs > ours or (theirs < min(ours, 1) and not is_count):
    return [f'dtype: {source.key!r} {value.dtype}, but {name!r} {struct.dtype}']
  with np.errstate(over='ignore'):
    narrow = value.astype(struct.dtype)
  wraps = ours < 1 and np.any(narrow != value)
  if wraps or np.any(np.isfinite(value) & ~np.isfinite(narrow)):
    return [f'range: {source.key!r} is too large for {name!r} {struct.dtype}']
  is_batch_norm = (leaf[0], 'mean') in template.leaves
  if is_batch_norm and leaf[1] in ('var', 'count') and not np.all(value >= 0):
    return [f'value: {source.key!r} is negative or NaN, for {name!r}']
  return []


def with_added(
  value: np.ndarray, leaf: Leaf, template: Template, added: Mapping[str, float]
) -> np.ndarray:
  """A value for a leaf, a scale with what is added to it."""
  if leaf[1] != 'scale' or leaf[0] not in added:
    return value
  wide = np.promote_types(template.leaves[leaf].dtype, np.float64)
  shifted: np.ndarray = value.astype(wide) + added[leaf[0]]
  return shifted


def value_of(
  leaf: Leaf, template: Template, added: Mapping[str, float]
) -> np.ndarray:
  """A leaf as numbers, a scale without what was added; raises for a shape."""
  (layer, name), value = leaf, template.leaves[leaf]
  if isinstance(value, jax.ShapeDtypeStruct):
    raise TypeError(f'variables: {layer}/{name} is a shape, not an array.')
  array = np.asarray(value)
  if name != 'scale' or layer not in added:
    return array
  wide = np.promote_types(array.dtype, np.float32)
  return np.asarray(array.astype(wide) - added[layer], array.dtype)


def report(faults: Sequence[str]) -> str:
  """One message for all that does not fit."""
  lines = '\n'.join(f'  {fault}' for fault in sorted(faults))
  return (
    f'{len(faults)} arrays do not fit, and nothing was converted:\n{lines}\n'
    'names= says where a layer goes, ignore= leaves arrays out, count= is for '
    'a count that is missing.'
  )


def matched(
  pattern: str, leaf: str, template: Template, name: str
) -> list[str]:
  """The layers with a leaf whose paths fit; `name` is whose pattern it is."""
  layers = [layer for layer, held in template.leaves if held == leaf]
  found = [layer for layer in layers if matches(layer, (pattern,))]
  if not found:
    raise ValueError(
      f'{name}: {pattern!r} matches no layer with a {leaf}. They are '
      f'{layers!s:.300}.'
    )
  return found


def check_added(
  add_to_scale: Mapping[str, float] | None, template: Template
) -> dict[str, float]:
  """Returns by layer what its scale is given; raises unless each is one's."""
  if add_to_scale is not None and not isinstance(add_to_scale, Mapping):
    raise TypeError(
      'add_to_scale must be a mapping of patterns of paths to numbers, such as '
      f"{{'*norm': 1.0}}, got {add_to_scale!r:.60}."
    )
  added: dict[str, float] = {}
  for pattern, given in (add_to_scale or {}).items():
    number = _types.check_real(given, 'add_to_scale')
    for layer in matched(pattern, 'scale', template, 'add_to_scale'):
      if added.setdefault(layer, number) != number:
        raise ValueError(
          f'add_to_scale gives {layer!r} both {added[layer]} and {number}. '
          'Make its patterns match less.'
        )
  return added
