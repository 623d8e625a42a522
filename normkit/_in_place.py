"""What both Flax adapters share where they stand in for Flax's norms."""

from collections.abc import Collection, Mapping
import dataclasses
from typing import Any

# Its scale is another parameter than the one that is there.
WITHHELD = frozenset({'scale_offset'})


@dataclasses.dataclass(eq=False)
class InPlace:
  """Which norms of a model run normkit's call; `str` makes a table of it.

  Attributes:
    swapped: names of classes by paths, of the norms that do.
    kept: of those that do not, for they do not call what they derive from.
  """

  swapped: dict[str, str] = dataclasses.field(default_factory=dict)
  kept: dict[str, str] = dataclasses.field(default_factory=dict)

  def __str__(self) -> str:
    lines = [f"{p or '.'}: {n}, normkit's" for p, n in self.swapped.items()]
    lines += [f'{p or "."}: {n}, its own' for p, n in self.kept.items()]
    return '\n'.join(lines) or 'no norm of Flax'


def check(there: set[str], taken: Mapping[str, Collection[str]]) -> None:
  """Raises if an option is for no class that is there; `taken` is by class."""
  for name in {option for options in taken.values() for option in options}:
    if there and not any(name in taken[kind] for kind in there):
      able = [kind for kind, options in taken.items() if name in options]
      raise ValueError(
        f'{name} is for {", ".join(able)}, and the norms here are '
        f'{", ".join(sorted(there))}. Leave it out.'
      )


def parted(
  options: Mapping[str, Any], known: Mapping[str, Collection[str]]
) -> dict[str, dict[str, Any]]:
  """The options of each class, of those that it takes beyond Flax's."""
  every = {name for names in known.values() for name in names} - WITHHELD
  if wrong := sorted(options.keys() - every):
    raise TypeError(
      f'in_place_of_flax takes what normkit adds to the norms of Flax, '
      f'{", ".join(sorted(every))}, got {", ".join(wrong)}. All else is said '
      'by the model itself.'
    )
  return {
    kind: {n: value for n, value in options.items() if n in names}
    for kind, names in known.items()
  }
