"""Models of Flax's linen norms, run with normkit's and not edited."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import inspect
from typing import Any

from flax import linen as nn
import jax

from normkit import _in_place
from normkit._in_place import InPlace
from normkit.linen import norms
from normkit.linen._shared import DropIn

_PAIRS: dict[type, type] = {
  nn.BatchNorm: norms.BatchNorm,
  nn.LayerNorm: norms.LayerNorm,
  nn.RMSNorm: norms.RMSNorm,
  nn.GroupNorm: norms.GroupNorm,
  nn.InstanceNorm: norms.InstanceNorm,
}
_FLAX: Any = tuple(_PAIRS)

# What runs in place of Flax's; compiled programs are kept for each value.
_COMPILED = jax.make_user_context(())


@contextlib.contextmanager
def in_place_of_flax(**options: Any) -> Iterator[InPlace]:
  """Runs linen models of Flax's norms with normkit's, others' models too.

  Around `init` and `apply`, or inside a function that is compiled: batch,
  layer, RMS, group and instance norms of `flax.linen` compute as those of
  `normkit.linen` do, with the same variables. Of a class that derives from one
  of them and calls it by `super().__call__`, the norm is normkit's and the rest
  its own. A class with maths of its own is left alone and listed; a norm that
  derives from none of Flax's is not seen. `nn.WeightNorm` and `nn.SpectralNorm`
  stay Flax's.

  What was compiled outside is compiled anew inside, and the other way round.
  `frozen`, `recalibrate` and `inspect` work inside and around.

  Args:
    **options: what normkit's norms take beyond Flax's, for each norm that takes
      it: `implementation`, `skip_nonfinite`, `unbiased`, `virtual_batch_size`,
      `round_before_scale`; `debias`, which keeps a count in the variables.
      `scale_offset` stands for another parameter, and is not taken.

  Yields:
    What was found, in the order of the program: `swapped` and `kept`, names of
    classes by paths. It fills as programs are traced; one that was compiled
    inside before adds nothing.

  Raises:
    TypeError: if an option is not one of these.
    ValueError: at the end, if there were norms, and none takes an option.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> from flax import linen as nn
    >>> model = nn.Sequential([nn.Dense(8), nn.LayerNorm()])
    >>> x = jnp.ones((2, 4))
    >>> variables = model.init(jax.random.key(0), x)
    >>> with normkit.linen.in_place_of_flax() as found:
    ...   y = model.apply(variables, x)
    >>> found.swapped, found.kept
    ({'layers_1': 'LayerNorm'}, {})
  """
  known = {flax.__name__: _added(flax, _PAIRS[flax]) for flax in _PAIRS}
  parted = _in_place.parted(options, known)
  found = InPlace()
  there: set[str] = set()

  def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    if not isinstance(module, _FLAX) or isinstance(module, DropIn):
      return call(*args, **kwargs)
    name, kind = '/'.join(module.path), type(module).__name__
    flax = _CALLS.get(inspect.unwrap(context.orig_method.func))
    if flax is None:
      y = call(*args, **kwargs)
      if context.method_name == '__call__' and name not in found.swapped:
        found.kept[name] = kind
      return y
    found.swapped[name] = kind
    there.add(flax.__name__)
    # The innermost, so that what intercepts inside of this sees the call.
    context.orig_method.__setstate__(
      _instead(module, flax, parted[flax.__name__])
    )
    return call(*args, **kwargs)

  key = tuple(sorted(options.items()))
  with nn.intercept_methods(intercept), _COMPILED((*_COMPILED.value, key)):
    yield found
  _in_place.check(there, parted)


class _With:
  """A module of Flax with the options that it lacks."""

  def __init__(self, module: nn.Module, options: dict[str, Any]) -> None:
    vars(self).update(options, _module=module)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._module, name)


def _instead(module: nn.Module, flax: type, options: dict[str, Any]) -> Any:
  """The state of a partial function: normkit's call of a module of Flax."""
  told = _With(module, _added(flax, _PAIRS[flax]) | options)
  return inspect.unwrap(_PAIRS[flax].__call__), (told,), {}, None


@functools.cache
def _added(flax: Any, ours: Any) -> dict[str, Any]:
  """The fields that Flax's class lacks, and their defaults."""
  theirs = {field.name for field in dataclasses.fields(flax)}
  fields = (f for f in dataclasses.fields(ours) if f.name not in theirs)
  return {field.name: field.default for field in fields}


_CALLS: dict[Callable[..., Any], type] = {
  inspect.unwrap(flax.__call__): flax for flax in _PAIRS
}
