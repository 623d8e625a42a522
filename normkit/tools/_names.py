"""Where the layers of one side go on the other: by names, prefixes or order."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import re
from typing import Any, TypeAlias

from normkit.tools._frameworks import Source
from normkit.tools._template import Template

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


def renamer(names: Names, old: str, new: str) -> Callable[[str], str]:
  """The function from one side's layer names, with `old` between parts."""
  if callable(names):
    return names
  if names is not None and not isinstance(names, Mapping):
    raise ValueError(
      f"names must be None, a mapping, a function or 'order', got {names!r}."
    )
  prefixes = names or {}

  def rename(layer: str) -> str:
    parts = layer.split(old)
    for end in range(len(parts), 0, -1):
      prefix = old.join(parts[:end])
      if prefix in prefixes:
        return new.join(filter(None, (prefixes[prefix], *parts[end:])))
    return new.join(parts)

  return rename


def in_order(
  template: Template, sources: Sequence[Source]
) -> Callable[[str], str]:
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
  return pairs.__getitem__


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
