"""Models of Flax's nnx norms, run with normkit's and not edited."""

import functools
import inspect
from typing import Any, TypeVar

from flax import nnx

from normkit import _in_place, _types
from normkit._in_place import InPlace
from normkit.nnx import norms
from normkit.nnx._shared import calls_super, set_class

Model = TypeVar('Model', bound=nnx.Module)

_PAIRS: dict[type, type] = {
  nnx.BatchNorm: norms.BatchNorm,
  nnx.LayerNorm: norms.LayerNorm,
  nnx.RMSNorm: norms.RMSNorm,
  nnx.GroupNorm: norms.GroupNorm,
  nnx.InstanceNorm: norms.InstanceNorm,
}


def in_place_of_flax(model: Model, **options: Any) -> tuple[Model, InPlace]:
  """Copies an nnx model with normkit's norms for Flax's, others' models too.

  Batch, layer, RMS, group and instance norms of `flax.nnx` become those of
  `normkit.nnx`, with the same variables: what is saved from one loads into the
  other. Of a class that derives from one of them and calls it by
  `super().__call__`, the norm is normkit's and the rest its own, in a class
  that derives from both. A class with maths of its own is left alone and
  listed; a norm that derives from none of Flax's is not seen. `nnx.WeightNorm`
  and `nnx.SpectralNorm` stay Flax's.

  Args:
    model: the model, which stays as it is.
    **options: what normkit's norms take beyond Flax's, for each norm that takes
      it: `implementation`, `skip_nonfinite`, `unbiased`, `virtual_batch_size`,
      `round_before_scale`; `debias`, which adds a count to the variables, as
      `momentum=None` does. `scale_offset` stands for another parameter, and is
      not taken.

  Returns:
    The copy, and what was found in it: `swapped` and `kept`, names of classes
    by paths.

  Raises:
    TypeError: if the model is not an nnx.Module, or an option is not one of
      these.
    ValueError: if there are norms, and none takes an option.

  Examples:
    >>> import jax.numpy as jnp, normkit.nnx
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(
    ...   nnx.Linear(4, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
    ... )
    >>> ours, found = normkit.nnx.in_place_of_flax(model)
    >>> found.swapped, found.kept
    ({'layers/1': 'LayerNorm'}, {})
    >>> type(ours.layers[1]) is normkit.nnx.LayerNorm
    True
  """
  if not isinstance(model, nnx.Module):
    raise TypeError(
      f'model must be an nnx.Module, got {type(model).__name__}. For linen '
      'there is normkit.linen.in_place_of_flax.'
    )
  known = {flax.__name__: _added(flax, _PAIRS[flax]) for flax in _PAIRS}
  parted = _in_place.parted(options, known)
  found = InPlace()
  there: set[str] = set()
  copy: Model = nnx.clone(model)
  for path, module in nnx.iter_modules(copy):
    kind: Any = type(module)
    flax = next((base for base in kind.__mro__ if base in _PAIRS), None)
    if flax is None or issubclass(kind, norms.DropIn):
      continue
    name = '/'.join(map(str, path))
    if not calls_super(kind, flax):
      found.kept[name] = kind.__name__
      continue
    found.swapped[name] = kind.__name__
    there.add(flax.__name__)
    _become(module, flax, parted[flax.__name__])
  _in_place.check(there, parted)
  return copy, found


def _become(module: Any, flax: Any, options: dict[str, Any]) -> None:
  """Makes a module of Flax one of normkit's."""
  kind: Any = type(module)
  set_class(module, _joined(kind, _PAIRS[flax]))
  for name, value in (_added(flax, _PAIRS[flax]) | options).items():
    setattr(module, name, value)
  module.axis_index_groups = _types.hashable(module.axis_index_groups)
  if flax is nnx.BatchNorm:
    module.make_count(module.num_features)
  elif flax is nnx.GroupNorm:
    module.num_features = module.num_groups * module.group_size


@functools.cache
def _joined(kind: Any, ours: Any) -> Any:
  """Ours, or a class of `kind` for whose `super()` it comes before Flax's."""
  if kind in _PAIRS:
    return ours
  names = {'__module__': kind.__module__, '__qualname__': kind.__qualname__}
  return type(kind.__name__, (kind, ours), names)


@functools.cache
def _added(flax: Any, ours: Any) -> dict[str, Any]:
  """The arguments that Flax's class lacks, and their defaults."""
  theirs, all_ = (
    inspect.signature(c.__init__).parameters for c in (flax, ours)
  )
  return {n: p.default for n, p in all_.items() if n not in theirs}
