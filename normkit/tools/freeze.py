"""Freezing batch norm: statistics held inside a training step, and parameters.

A frozen layer normalizes with its running statistics while the rest trains, and
does not update them, as fine-tuning on small batches asks for: He, Zhang, Ren
and Sun, "Deep Residual Learning for Image Recognition" (2016), appendix A.
Whether its scale and bias train is the optimizer's choice, by a mask.
"""

from collections.abc import Callable, Collection, Iterator
import contextlib
import fnmatch
import functools
from typing import Any, TypeAlias

import chex  # type: ignore[import-untyped]
from flax import linen, nnx
import jax

from normkit._types import Array
import normkit.linen
from normkit.nnx._shared import set_class
from normkit.tools import _classes, _layers
from normkit.tools._layers import Model, Path

Match: TypeAlias = str | Collection[str] | Callable[[str], bool]

# What is frozen; compiled programs are kept for each value.
_COMPILED = jax.make_user_context(())


def frozen(
  match: Match = '*',
) -> contextlib._GeneratorContextManager[None]:
  """Freezes the statistics of linen layers that run inside.

  Whatever they are told, they normalize with their running statistics and leave
  them as they are. Use it around `apply`, inside the function that is compiled
  or around its call, as `with` or as a decorator: `loss = frozen('*')(loss)`.
  What was compiled outside is compiled anew inside, and the other way round, so
  that no program is frozen or not by what ran first. What was compiled ahead of
  time, by `.lower().compile()`, stays as it is.

  Args:
    match: which layers, by path, such as 'backbone/BatchNorm_0': a pattern in
      which `*` stands for anything, several, or a function of the path, which
      gives the same for the same path. Each new function compiles anew.

  Returns:
    What `with` takes, or what decorates a function.

  Raises:
    TypeError: if `match` is not what it should be.
    ValueError: at the end, if a pattern, or the function, matched no layer
      with running statistics that ran inside, now or with this match before; at
      the call of one that does not call the batch norm that it derives from.

  References:
    He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition"
    (2016), appendix A.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> from normkit.tools.freeze import frozen
    >>> norm = normkit.linen.BatchNorm(use_running_average=False)
    >>> x = jnp.array([[1.], [3.]])
    >>> variables = norm.init(jax.random.key(0), x)
    >>> with frozen():
    ...   y, updates = norm.apply(variables, x, mutable=['batch_stats'])
    >>> updates['batch_stats']['mean'].tolist()
    [0.0]
  """
  return _frozen(match, _matchers(match))


def freeze(model: nnx.Module, match: Match = '*') -> nnx.Module:
  """Freezes the statistics of layers of an nnx model, for good.

  The layers of the model that is returned normalize with their running
  statistics and leave them as they are, also after `model.train()`, under
  `nnx.view`, and when called with `use_running_average=False`. Make the
  optimizer for this model; `unfreeze` undoes it.

  Args:
    model: the model, which stays as it is.
    match: which layers, by path, such as 'backbone/norms/0': a pattern in which
      `*` stands for anything, several, or a function of the path.

  Returns:
    A copy of the model. Its frozen layers are of a subclass of their class.

  Raises:
    TypeError: if `model` is no `nnx.Module`, or `match` not what it should be.
    ValueError: if a pattern, or the function, matches no layer with running
      statistics, or one that does not call the batch norm that it derives from.

  Examples:
    >>> import jax.numpy as jnp, normkit.nnx
    >>> from flax import nnx
    >>> from normkit.tools.freeze import freeze
    >>> norm = freeze(normkit.nnx.BatchNorm(1, rngs=nnx.Rngs(0)))
    >>> norm.train()
    >>> y = norm(jnp.array([[1.], [3.]]))
    >>> norm.mean[...].tolist()
    [0.0]
  """
  model = _copy(model)
  layers = _layers.nnx_layers(model)
  for path in _select(layers, match):
    kind: Any = _classes.original(type(layers[path]))
    if _classes.nnx_options(layers[path]) is None:
      raise ValueError(_own_call(path, kind))
    set_class(layers[path], _frozen_class(kind))
  return model


def unfreeze(model: nnx.Module) -> nnx.Module:
  """Undoes `freeze`.

  Args:
    model: the model, which stays as it is.

  Returns:
    A copy of the model with all its layers of their own classes.

  Raises:
    TypeError: if `model` is no `nnx.Module`.

  Examples:
    >>> import normkit.nnx
    >>> from flax import nnx
    >>> from normkit.tools.freeze import freeze, unfreeze
    >>> norm = freeze(normkit.nnx.BatchNorm(1, rngs=nnx.Rngs(0)))
    >>> type(unfreeze(norm)) is normkit.nnx.BatchNorm
    True
  """
  model = _copy(model)
  for layer in _layers.nnx_layers(model).values():
    kind: Any = type(layer)
    set_class(layer, _classes.original(kind))
  return model


def frozen_mask(variables: Model, match: Match = '*') -> Any:
  """Says of each parameter whether it is of a layer that matches.

  For `optax.selective_transform(optimizer, freeze_mask=mask)`, which updates
  the others alone. A gradient of zero would not be enough: weight decay moves
  what has none, and so does momentum from before.

  Args:
    variables: linen variables, with `params` and `batch_stats`, or an
      `nnx.Module`.
    match: which layers, as for `frozen` and `freeze`.

  Returns:
    A tree of booleans like `variables['params']`, or like the pure form of
    `nnx.state(model, nnx.Param)`, which an `nnx.Optimizer` updates: True where
    a parameter is the scale or bias of such a layer.

  Raises:
    TypeError: if `variables` is neither, or `match` not what it should be.
    ValueError: if a pattern, or the function, matches no layer with running
      statistics, or if there is none.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen, optax
    >>> from normkit.tools.freeze import frozen_mask
    >>> norm = normkit.linen.BatchNorm(use_running_average=False)
    >>> variables = norm.init(jax.random.key(0), jnp.ones((2, 3)))
    >>> mask = frozen_mask(variables)
    >>> mask
    {'bias': True, 'scale': True}
    >>> optimizer = optax.selective_transform(
    ...   optax.adamw(1e-3), freeze_mask=mask
    ... )
    >>> state = optimizer.init(variables['params'])
  """
  chosen = _select(_layers.layers(variables), match)

  def is_frozen(path: Any, _: Any) -> bool:
    place = _place(path)
    return any(place[: len(layer)] == layer for layer in chosen)

  return jax.tree.map_with_path(is_frozen, _params(variables))


def assert_frozen(
  before: Model, after: Model, match: Match = '*', *, params: bool = True
) -> None:
  """Raises unless layers are, bit for bit, what they were.

  Args:
    before: linen variables or an `nnx.Module`, from before some training.
    after: the same from after it.
    match: which layers, as for `frozen` and `freeze`.
    params: whether their scales and biases have to be as before too, and not
      only their statistics.

  Raises:
    AssertionError: if a leaf moved; the message names it.
    TypeError: if `before` or `after` is neither, or `match` not what it should
      be.
    ValueError: if a pattern, or the function, matches no layer with running
      statistics.

  Examples:
    >>> import jax.numpy as jnp
    >>> from normkit.tools.freeze import assert_frozen
    >>> stats = {'mean': jnp.zeros(3), 'var': jnp.ones(3)}
    >>> before = {'params': {}, 'batch_stats': {'norm': stats}}
    >>> assert_frozen(before, before)
  """
  chosen = _select(_layers.layers(before), match)
  held = [_contents(model, chosen, params) for model in (before, after)]
  chex.assert_trees_all_equal(*held)


@contextlib.contextmanager
def _frozen(
  match: Match, matches: list[Callable[[str], bool]]
) -> Iterator[None]:
  key = match if isinstance(match, str) or callable(match) else tuple(match)
  ran = _ran(key)

  def is_chosen(module: Any) -> bool:
    return any(matcher(_layers.name(module.path)) for matcher in matches)

  def evaluated(module: Any, call: Any, args: Any, kwargs: Any) -> Any:
    ran.add(module.path)
    if is_chosen(module):
      return _evaluate(call, module, *args, **kwargs)
    return call(*args, **kwargs)

  def missed(module: Any) -> None:
    if is_chosen(module):
      raise ValueError(_own_call(module.path, type(module)))

  intercept = _classes.intercepting(evaluated, missed)
  compiled = _COMPILED((*_COMPILED.value, key))
  with linen.intercept_methods(intercept), compiled:
    yield
  _select(ran, match, ' Those ran inside: use it around apply.')


def _matchers(match: Match) -> list[Callable[[str], bool]]:
  """One function of a path for each pattern, or the one that was given."""
  if callable(match):
    return [match]
  patterns = [match] if isinstance(match, str) else match
  are_several = isinstance(patterns, Collection) and len(patterns) > 0
  if are_several and all(isinstance(p, str) for p in patterns):
    return [
      functools.partial(fnmatch.fnmatchcase, pat=pattern)
      for pattern in patterns
    ]
  raise TypeError(
    'match must be a pattern of paths, several of them, or a function of a '
    f"path, got {match!r:.60}. For example match='backbone/*'."
  )


def _select(paths: Collection[Path], match: Match, hint: str = '') -> set[Path]:
  """The paths that match; raises if a pattern, or the function, has none."""
  chosen: set[Path] = set()
  for matcher in _matchers(match):
    found = {path for path in paths if matcher(_layers.name(path))}
    if not found:
      names = sorted(map(_layers.name, paths))
      raise ValueError(
        f'match={match!r:.60} has a part that matches no layer with running '
        f'statistics. Those that are there: {names!s:.400}.{hint}'
      )
    chosen |= found
  return chosen


def _evaluate(
  next_fun: Any, module: Any, x: Array, *_: Any, **kwargs: Any
) -> Any:
  """Calls a linen layer in evaluation mode, whatever it is told."""
  if isinstance(module, normkit.linen.Norm):
    return next_fun(x, **kwargs | {'train': False})
  told = module.use_running_average
  kwargs['use_running_average'] = True
  # Linen refuses to be told twice, even the same.
  object.__setattr__(module, 'use_running_average', None)
  try:
    return next_fun(x, **kwargs)
  finally:
    object.__setattr__(module, 'use_running_average', told)


@functools.cache
def _ran(key: Any) -> set[Path]:
  """The layers that ran where this was frozen; a kept program traces none."""
  del key
  return set()


@functools.cache
def _frozen_class(kind: Any) -> Any:
  """The class of the frozen layers of a class."""

  def around(base: Any) -> Callable[..., Any]:
    def __call__(
      self: Any,
      x: Array,
      use_running_average: bool | None = None,
      *,
      mask: Array | None = None,
    ) -> Array:
      """Normalizes x with the running statistics."""
      del use_running_average
      y: Array = base.__call__(self, x, True, mask=mask)
      return y

    return __call__

  return _classes.wrapped(kind, around)


def _own_call(path: Path, kind: type) -> str:
  return (
    f'the layer {_layers.name(path)!r} cannot be frozen: {kind.__name__} does '
    'not call super().__call__, the call of a batch norm of Flax or normkit. '
    'Leave it out by match=, and run it in evaluation.'
  )


def _copy(model: nnx.Module) -> nnx.Module:
  if not isinstance(model, nnx.Module):
    raise TypeError(
      f'model must be an nnx.Module, got {type(model).__name__}. For linen, '
      'use frozen around apply.'
    )
  copy: nnx.Module = nnx.clone(model)
  return copy


def _params(model: Model) -> Any:
  if isinstance(model, nnx.Module):
    return nnx.as_pure(nnx.state(model, nnx.Param))
  return model.get('params', {})


def _contents(
  model: Model, chosen: set[Path], params: bool
) -> dict[str, dict[str, Any]]:
  """Statistics and, if asked for, parameters of layers, by path."""
  stats = _layers.layers(model)
  contents = {_layers.name(p): dict(stats[p]) for p in chosen}
  for path, leaf in jax.tree.leaves_with_path(_params(model) if params else {}):
    for layer in chosen:
      place = _place(path)
      if place[: len(layer)] == layer:
        contents[_layers.name(layer)][_layers.name(place[len(layer) :])] = leaf
  return contents


def _place(path: Any) -> Path:
  """The keys of a path in a tree of parameters."""
  return tuple(getattr(key, 'key', getattr(key, 'name', None)) for key in path)
