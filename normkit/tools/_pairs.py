"""Calls of layers there and here, side by side, in one layout."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
from typing import Any, TypeAlias

import numpy as np

from normkit.tools import _frameworks
from normkit.tools._runs import Seen

Maybe: TypeAlias = np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
  """A call of a layer, there and here.

  Attributes:
    name: the layer's path here, or several, 'query + key + value'.
    there: its name there.
    call: which of its calls this is.
    module: the layer here.
    source: the layer there; both are None of the outputs of the whole models.
    options: the arguments of the call here.
    given: the input here, and `their_given` there, in the layout of here if
      it has one of this shape.
    output: the output here, and `their_output` there.
    given_error: how far the inputs are apart, see `apart`.
    error: how far the outputs are.
    place: which call it is among all those there.
  """

  name: str
  there: str
  call: int
  module: Any
  source: Any
  options: Mapping[str, Any]
  given: Maybe
  their_given: Maybe
  output: Maybe
  their_output: Maybe
  given_error: float
  error: float
  place: int = 0


def paired(
  there: str,
  names: Sequence[str],
  theirs: Sequence[Seen],
  ours: Sequence[Sequence[Seen]],
  flat: Sequence[int] | None,
) -> Iterator[Pair]:
  """The calls of a layer there, and of the one or several that it is here."""
  for call, (their, *parts) in enumerate(zip(theirs, *ours, strict=False)):
    here = parts[0]
    output = _joined([part.output for part in parts])
    given, given_error = nearest([their.given], here.given, flat)
    # A norm of timm has an activation inside; what that is given is the norm's.
    shown = [their.output, *their.inside]
    their_output, error = nearest(shown, output)
    yield Pair(
      name=' + '.join(names),
      there=there,
      call=call,
      module=here.module,
      source=their.module,
      options=here.options,
      given=here.given,
      their_given=given,
      output=output,
      their_output=their_output,
      given_error=given_error,
      error=error,
    )


def outputs(ours: Maybe, theirs: Maybe, place: int) -> Pair:
  """The outputs of the whole models."""
  moved, error = nearest([theirs], ours)
  arrays = (ours, moved, ours, moved)
  return Pair('', '', 0, None, None, {}, *arrays, error, error, place)


def _joined(arrays: Sequence[Maybe]) -> Maybe:
  """The array, or several without heads, one after the other."""
  found = [a for a in arrays if a is not None]
  if len(found) < 2:
    return found[0] if found else None
  rank = min(a.ndim for a in found)
  rank = rank - 1 if rank > 3 else rank
  flat = [a.reshape(*a.shape[: rank - 1], -1) for a in found]
  return np.concatenate(flat, -1)


def nearest(
  theirs: Sequence[Maybe], ours: Maybe, flat: Sequence[int] | None = None
) -> tuple[Maybe, float]:
  """The array there that is next to one here, in its layout, and `apart`.

  An array there may lie in several ways; where none has the shape here, it
  comes as it is, and infinitely far away.
  """
  found = [a for a in theirs if a is not None]
  if ours is None or not found:
    return (found[0] if found else None), math.nan
  moved = [m for a in found for m in _moved(a, ours.shape, flat)]
  if not moved:
    return found[0], math.inf
  errors = [apart(m, ours) for m in moved]
  best = min(range(len(moved)), key=errors.__getitem__)
  return moved[best], errors[best]


def apart(theirs: np.ndarray, ours: np.ndarray) -> float:
  """The largest difference, as a share of the largest value there."""
  a, b = (np.asarray(array, np.float64) for array in (theirs, ours))
  if not a.size:
    return 0.0
  size = np.abs(a).max() or np.abs(b).max() or 1.0
  error = float(np.abs(a - b).max() / size)
  return error if math.isfinite(error) else math.inf


def _moved(
  array: np.ndarray, shape: tuple[int, ...], flat: Sequence[int] | None
) -> Iterator[np.ndarray]:
  """An array in the layouts that have a shape."""
  forms = [array]
  if array.ndim > 2:
    forms += [np.moveaxis(array, 1, -1), array.swapaxes(0, 1)]
  if flat is not None and array.ndim == 2:
    forms = [_frameworks.from_flat(array.T, tuple(flat)).T]
  for form in forms:
    if form.shape == shape or _refines(form.shape, shape):
      yield form.reshape(shape)


def _refines(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
  """Whether shapes differ in axes of one element, or in axes that are split."""
  a, b = ({*np.cumprod(shape).tolist(), 1} for shape in (one, other))
  return math.prod(one) == math.prod(other) and (a <= b or b <= a)
