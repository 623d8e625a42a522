"""A function in a form for each platform, traced when it is lowered.

`jax.lax.platform_dependent` traces every form, differentiates and transposes
it, though one is compiled. Here they are one equation until the platform is
known. What differentiates, transposes or batches it, makes another of these.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from normkit import _primitives, _rules
from normkit._types import Array

Function = Callable[..., Any]

form_p = core.Primitive('normkit_form')
form_p.multiple_results = True


class Forms:
  """Functions of arrays to lists of arrays, by platform and 'default'.

  A platform may have several, of which the first counts that fits: other words
  may follow its name, and where one is 'alone', the form is for programs of
  one device. `sizes` says for which arrays a form is meant, as they are in the
  program: `vmap` may have added axes. They close over no array. A program that
  is printed shows the platforms.
  """

  def __init__(
    self, forms: Mapping[str, Function], sizes: Mapping[str, _primitives.Sizes]
  ) -> None:
    self.of, self.sizes = dict(forms), sizes

  def __repr__(self) -> str:
    return '/'.join(self.of)

  def map(self, change: Callable[[Function], Function]) -> 'Forms':
    """Each of them, changed."""
    changed = {name: change(form) for name, form in self.of.items()}
    return Forms(changed, self.sizes)

  def on(
    self, platforms: Sequence[str], is_alone: bool, arrays: Sequence[Any]
  ) -> Function:
    """The one for a platform, or for several a choice."""
    default = self.of['default']
    found = dict.fromkeys(platforms, default)
    for name, form in reversed(self.of.items()):
      platform, *words = name.split()
      if platform not in found or ('alone' in words and not is_alone):
        continue
      if _primitives.fits(self.sizes.get(name), arrays):
        found[platform] = form
    if len(platforms) == 1:
      return found[platforms[0]]
    own = {name: form for name, form in found.items() if form is not default}
    if not own:
      return default
    return lambda *a: lax.platform_dependent(*a, default=default, **own)


def choose(
  forms: Mapping[str, Callable[..., Any]],
  operands: Sequence[Array],
  result: Any,
  linear: Sequence[Array] = (),
  sizes: Mapping[str, _primitives.Sizes] = _primitives.ANY_SIZE,
) -> Any:
  """Runs a function in the form of the platform.

  Args:
    forms: functions `(*operands, *linear)` to a tree of arrays, by platform as
      in `Forms`; one of them for `'default'`. They close over no array.
    operands: what the function is not linear in.
    result: the type of what it returns, as `jax.typeof` gives it: a tree.
    linear: what the function is linear in: it may be transposed by these.
    sizes: which arrays a form is meant for; see `Forms`.

  Returns:
    What the form of the platform returns.
  """
  leaves, tree = jax.tree.flatten(result)
  lists = Forms(forms, sizes).map(lambda f: lambda *a: jax.tree.leaves(f(*a)))
  return jax.tree.unflatten(tree, _bind(lists, operands, linear, leaves))


def _bind(
  forms: Forms, operands: Sequence[Any], linear: Sequence[Any], results: Any
) -> Any:
  return form_p.bind(
    *operands,
    *linear,
    forms=forms,
    linear=tuple(map(jax.typeof, linear)),
    results=tuple(results),
    is_wide=bool(jax.enable_x64.value),
  )


def _abstract_eval(*_: Any, results: Any, **__: Any) -> Any:
  return results


def _lower(
  ctx: Any, *arguments: Any, forms: Forms, is_wide: bool, **_: Any
) -> Any:
  """By the settings that count while the norm is traced, not here."""
  is_alone = _primitives.is_one_device(ctx)
  platforms = ctx.module_context.platforms
  run = mlir.lower_fun(forms.on(platforms, is_alone, ctx.avals_in))
  with jax.enable_x64(is_wide), jax.numpy_dtype_promotion('standard'):
    return run(ctx, *arguments)


def _jvp(
  primals: Any, tangents: Any, *, forms: Forms, results: Any, **params: Any
) -> Any:
  """Linear in the tangents; where it was already, by the forms themselves."""
  found = form_p.bind(*primals, forms=forms, results=results, **params)
  count = len(primals) - len(params['linear'])
  moved = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]
  operands = primals
  if moved and moved[0] >= count:
    operands, moved = primals[:count], list(range(count, len(primals)))
  else:
    forms = forms.map(lambda form: _derivative(form, moved))
  given = [ad.instantiate_zeros(tangents[i]) for i in moved]
  return found, _bind(forms, operands, given, results)


def _derivative(form: Function, moved: Sequence[int]) -> Function:
  """`(*primals, *tangents of those that moved)`."""

  def derivative(*leaves: Array) -> Any:
    count = len(leaves) - len(moved)
    return _rules.along(form, leaves[:count], moved, leaves[count:])[1]

  return derivative


def _transpose(
  cotangents: Any, *arguments: Any, forms: Forms, linear: Any, **_: Any
) -> Any:
  count = len(arguments) - len(linear)
  forms = forms.map(lambda form: _transposed(form, count, linear))
  given = [ad.instantiate_zeros(c) for c in cotangents]
  results = [a.to_ct_aval() for a in linear]
  found = _bind(forms, arguments[:count], given, results)
  return _primitives.transposed(arguments, found)


def _transposed(form: Function, count: int, linear: Any) -> Function:
  """`(*operands, *cotangents)`."""

  def transposed(*leaves: Array) -> Any:
    operands, cotangents = leaves[:count], list(leaves[count:])
    run = jax.linear_transpose(lambda *a: form(*operands, *a), *linear)
    return list(run(cotangents))

  return transposed


def _batch(
  arguments: Any, axes: Any, *, forms: Forms, linear: Any, **_: Any
) -> Any:
  """Each form under `vmap`.

  What has no axis of it gets none: its gradient is summed inside of the form.
  """
  count = len(arguments) - len(linear)
  forms = forms.map(lambda form: jax.vmap(form, axes))
  results = jax.make_jaxpr(forms.of['default'])(*arguments).out_avals
  found = _bind(forms, arguments[:count], arguments[count:], results)
  return found, [0] * len(found)


form_p.def_impl(_primitives.compiled(form_p))
form_p.def_abstract_eval(_abstract_eval)
mlir.register_lowering(form_p, _lower)
ad.primitive_jvps[form_p] = _jvp
ad.primitive_transposes[form_p] = _transpose
batching.primitive_batchers[form_p] = _batch
