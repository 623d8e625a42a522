"""What the modules share: a check that Flax lacks, scales, fields by name."""

from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any

from flax import linen as nn
from flax.linen import initializers
from flax.typing import Initializer
import jax

from normkit import _types, _words, arguments
from normkit._types import Implementation


class Checked(_words.OwnWords, nn.Module):
  """A module whose epsilon is no width, which Flax does not check."""

  def __post_init__(self) -> None:
    width = 'Modules find the width themselves.'
    arguments.check_not_width(self.epsilon, width)
    super().__post_init__()


class DropIn(Checked):
  """A norm in place of Flax's: what all five have beside Flax's fields."""

  _: KW_ONLY
  implementation: Implementation | None = None


def scale_init(module: Any) -> Initializer:
  """What draws the scale; Flax's ones stand for a scale of one."""
  init: Initializer = module.scale_init
  offset = getattr(module, 'scale_offset', 0.0)
  offset = _types.check_real(offset, 'scale_offset')
  if offset and init is initializers.ones:
    return initializers.constant(1 - offset)
  return init


def map_fields(
  function: Callable[[str, Any], Any], tree: Any, default: str
) -> Any:
  """Maps the fields of a NamedTuple by name, or any other tree as a whole."""
  if not jax.tree.leaves(tree):
    return tree
  if not hasattr(tree, '_fields'):
    return function(default, tree)
  return type(tree)(
    *(
      None if value is None else function(name, value)
      for name, value in zip(tree._fields, tree, strict=True)
    )
  )
