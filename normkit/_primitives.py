"""What the primitives of JAX have in common that are made here.

Their last arguments are what they are linear in.
"""

from collections.abc import Callable, Mapping, Sequence
import operator
import types
from typing import Any, NamedTuple

import jax
from jax.interpreters import ad

from normkit._types import Array, is_known


class Sizes(NamedTuple):
  """Which arrays a form is meant for, as they are in the program.

  Args:
    elements: how many the largest array has.
    part: the position of an array, or None for any.
    repeats: how often this one goes into the largest, at least.
  """

  elements: range
  part: int | None = None
  repeats: int = 1


ANY_SIZE: Mapping[str, Sizes] = types.MappingProxyType({})


def compiled(primitive: Any) -> Callable[..., list[Array]]:
  """Runs it as JAX its own: compiled, under `jax.disable_jit` too."""

  def run(*arguments: Array, **params: Any) -> list[Array]:
    jitted = jax.jit(lambda *a: primitive.bind(*a, **params))
    with jax.disable_jit(False):
      found: list[Array] = jitted(*arguments)
    return found

  return run


def transposed(arguments: Sequence[Any], found: Sequence[Any]) -> list[Any]:
  """What a rule of transposition returns, of cotangents for the last ones."""
  count = len(arguments) - len(found)
  unknown = map(ad.is_undefined_primal, arguments[count:])
  return [None] * count + [
    c if u else None for c, u in zip(found, unknown, strict=True)
  ]


def is_one_device(ctx: Any) -> bool:
  """Whether the program is lowered for one device, or one at a time."""
  context = ctx.module_context.axis_context
  if (manual := getattr(context, 'manual_axes', None)) is not None:
    sizes = dict(context.mesh.shape)
    return all(sizes[name] == 1 for name in set(sizes) - set(manual))
  return getattr(context, 'num_devices', 1) in (None, 1)


def fits(sizes: Sizes | None, arrays: Sequence[Any]) -> bool:
  """Whether these are arrays that a form is meant for."""
  if sizes is None:
    return True
  found = [a.size for a in arrays]
  if not all(map(is_known, found)):
    return False
  largest = operator.index(max(found))
  part = 0 if sizes.part is None else operator.index(found[sizes.part])
  return largest in sizes.elements and largest >= sizes.repeats * part
