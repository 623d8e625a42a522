"""Where the layers of one side go on the other: by names, prefixes or order."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import re
from typing import Any, TypeAlias

from normkit.tools._frameworks import Source
from normkit.tools._template import Rename, Template

Names: TypeAlias = Mapping[str, str] | Callable[[str], str] | str | None

# What a wrapper of a PyTorch module puts before all names of its state dict.
_PREFIXES = ('module', '_orig_mod', 'model', 'state_dict')


def without_prefix(
  sources: Sequence[Source], names: Names, template: Template
) -> list[Source]:
  """The sources without a prefix of a wrapper that all of them have.

  One that `names` or the model here knows is no wrapper's.
  """
  given = [*names] if isinstance(names, Mapping) else []
  ours = {layer.partition('/')[0] for layer in template.layers}
  known = {str(name).partition('.')[0] for name in given} | ours
  sources = list(sources)
  while sources and not callable(names):
    tops = {source.layer.partition('.')[0] for source in sources}
    if len(tops) > 1 or tops & known or not tops.issubset(_PREFIXES):
      break
    sources = [
      dataclasses.replace(source, layer=source.layer.partition('.')[2])
      for source in sources
    ]
  return sources


@dataclasses.dataclass(frozen=True)
class Rules:
  """A mapping of names or their beginnings, in which `*` is of one part.

  Attributes:
    names: the mapping.
    old: what is between the parts of its names.
    new: what is between the parts of what they become.
  """

  names: Mapping[str, str]
  old: str
  new: str

  @functools.cached_property
  def table(self) -> dict[str, str]:
    """The mapping, without what may end a beginning."""
    return {
      str(name).strip(self.old): target.strip(self.new)
      for name, target in self.names.items()
    }

  @functools.cached_property
  def patterns(self) -> list[tuple[re.Pattern[str], str]]:
    """Those with `*`; raises unless both sides have as many."""
    patterns = []
    for name, target in self.table.items():
      if name.count('*') != target.count('*'):
        raise ValueError(
          f'names: {name!r} and {target!r} must have as many *: what each '
          'stands for is put in its place.'
        )
      if '*' in name:
        part = f'([^{re.escape(self.old)}]+)'
        pattern = part.join(map(re.escape, name.split('*')))
        patterns.append((re.compile(pattern), target))
    return patterns

  def exactly(self, name: str) -> str | None:
    """What a whole name becomes, if it is named."""
    if name in self.table:
      return self.table[name]
    for pattern, target in self.patterns:
      if found := pattern.fullmatch(name):
        first, *rest = target.split('*')
        pairs = zip(found.groups(), rest, strict=True)
        return first + ''.join(map(''.join, pairs))
    return None

  def beginning(self, name: str) -> tuple[str, str] | None:
    """What the longest beginning that is named becomes, and the rest."""
    parts = name.split(self.old)
    for end in range(len(parts), 0, -1):
      target = self.exactly(self.old.join(parts[:end]))
      if target is not None:
        return target, self.new.join(parts[end:])
    return None

  def layer(self, name: str) -> str:
    """What the name of a layer becomes; its own parts if it is not named."""
    found = self.beginning(name) or (name.replace(self.old, self.new),)
    return self.new.join(filter(None, found))

  def leaf(self, layer: str, leaf: str) -> tuple[str, str] | None:
    """The layer and the name of an array that is named itself."""
    if leaf not in {name.rpartition(self.old)[2] for name in self.table}:
      return None
    target = self.exactly(self.old.join(filter(None, (layer, leaf))))
    above, _, last = (target or '').rpartition(self.new)
    return None if target is None else (above, last)


def rules(names: Names, old: str, new: str) -> Rules:
  """The rules of a mapping, or of None."""
  if names is not None and not isinstance(names, Mapping):
    raise ValueError(
      f"names must be None, a mapping, a function or 'order', got {names!r}."
    )
  found = Rules(names or {}, old, new)
  found.patterns  # noqa: B018, checked once
  return found


def renamer(names: Names, old: str, new: str) -> Rename:
  """The function from one side's arrays, with `old` between their parts."""
  if callable(names):
    return by_layer(names)
  known = rules(names, old, new)

  def rename(source: Source) -> tuple[str, str]:
    leaf = source.key.rpartition(old)[2]
    named = known.leaf(source.layer, leaf)
    return named or (known.layer(source.layer), source.leaf)

  return rename


def by_layer(rename: Callable[[str], str]) -> Rename:
  """The function from arrays of one from layers."""
  return lambda source: (rename(source.layer), source.leaf)


def in_order(template: Template, sources: Sequence[Source]) -> Rename:
  """Pairs the layers of each kind in natural order of their names."""
  given = _kinds((s.layer, s.leaf, s.value.shape) for s in sources)
  held = _kinds(
    (layer, leaf, array.shape)
    for (layer, leaf), array in template.leaves.items()
  )
  for kind in sorted({*given, *held}):
    theirs, ours = given.get(kind, []), held.get(kind, [])
    if len(theirs) != len(ours):
      raise ValueError(
        f"names='order' finds {len(theirs)} layers of the kind {kind!r} "
        f'there, {theirs}, but {len(ours)} here, {ours}. Name them.'
      )
  pairs = {
    theirs: ours
    for kind in held
    for theirs, ours in zip(given[kind], held[kind], strict=True)
  }
  return by_layer(pairs.__getitem__)


def _kinds(
  leaves: Iterable[tuple[str, str, tuple[int, ...]]],
) -> dict[str, list[str]]:
  """The layers of each kind, in natural order."""
  layers: dict[str, dict[str, tuple[int, ...]]] = {}
  for layer, leaf, shape in leaves:
    layers.setdefault(layer, {})[leaf] = tuple(shape)
  kinds: dict[str, list[str]] = {}
  first: dict[frozenset[Any], str] = {}
  for layer in sorted(layers, key=_natural):
    shapes = layers[layer]
    alike = first.setdefault(frozenset(shapes.items()), layer)
    if _unnumbered(alike) != _unnumbered(layer):
      raise ValueError(
        f"names='order' cannot tell which of {alike!r} and {layer!r} comes "
        'first: they have the same shapes, and their names differ in more '
        'than numbers. Give names= as a mapping.'
      )
    kinds.setdefault(_kind(shapes), []).append(layer)
  return kinds


def _kind(shapes: Mapping[str, tuple[int, ...]]) -> str:
  """The kind of a layer, by what both sides know of its leaves."""
  if 'mean' in shapes or {'0', '1', '2'} <= shapes.keys():
    return 'batch norm'
  rank = max(len(shape) for shape in shapes.values())
  return {1: 'norm', 2: 'matrix'}.get(rank, f'kernel of rank {rank}')


def _unnumbered(name: str) -> str:
  """A name without its numbers: that of 'dense_1' is that of 'dense'."""
  return re.sub(r'_?\d+', '', name)


def _natural(name: str) -> list[tuple[int, str]]:
  """A key that sorts numbers in names as numbers."""
  return [
    (int(part), '') if part.isdecimal() else (-1, part)
    for part in re.split(r'(\d+)', name)
  ]


def renamer_of(
  template: Template, sources: Sequence[Source], names: Names, separator: str
) -> Rename:
  """What `names` means, or the order, for the arrays of a framework."""
  if names == 'order':
    return in_order(template, sources)
  return renamer(names, separator, '/')
