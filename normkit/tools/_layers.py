"""Watching the layers with running statistics in a model that runs.

What a watch gathers lies beside the statistics, in the layer's own state, as
further leaves of their shape. So all that carries the statistics (`scan`,
`vmap`, `remat`, `jit`, `pmap`, `shard_map`) carries it too, nothing leaks out
of a trace, and a function compiled before is traced again, since what it is
given has another structure.

A model is a pytree of linen variables or an `nnx.Module`; it is never changed,
a new one is returned. Layers go by their path, a tuple of names.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import functools
from typing import Any, NamedTuple, TypeAlias

from flax import core, linen, nnx, traverse_util
import jax
import jax.numpy as jnp

from normkit import _types
from normkit._types import Array
from normkit.centred import Centred, centred
from normkit.nnx._shared import set_class
from normkit.pooling import pool
from normkit.tools import _classes

Model: TypeAlias = Any
Path: TypeAlias = tuple[Any, ...]
Stats: TypeAlias = dict[str, Array]
Run: TypeAlias = Callable[[Model, Any], Any]
Batches: TypeAlias = Iterable[Any] | Callable[[], Iterable[Any]]


class Call(NamedTuple):
  """One call of a layer.

  Attributes:
    layer: what holds its options `axis`, `axis_name` and so on: the module, or
      the transform of a `normkit.linen.Norm` or `normkit.nnx.Norm`.
    shape: the shape of its statistics.
    x: the input.
    y: the output.
    mask: the mask as it was given, or None.
    evaluates: whether it left its statistics alone, told so or frozen.
  """

  layer: Any
  shape: tuple[int, ...]
  x: Array
  y: Array
  mask: Array | None
  evaluates: bool

  def reduced(self) -> tuple[int, ...]:
    """The axes of x and y over which the layer takes statistics."""
    features = _types.check_axes(self.layer.axis, self.x.ndim, repeats=True)
    return _types.other_axes(features, self.x.ndim)

  def where(self) -> Array | None:
    """The mask, True where an element counts, of the rank of x."""
    if self.mask is None:
      return None
    return _types.check_where(self.mask.astype(bool), self.x.shape)

  def moments(self) -> Centred:
    """Moments of x, pooled as the layer pools, of the statistics' shape."""
    stats = centred(self.x, self.reduced(), self.where())
    stats = pool(stats, self.layer.axis_name, self.layer.axis_index_groups)
    full = stats.pivot.shape
    return Centred(
      *(jnp.broadcast_to(s, full).reshape(self.shape) for s in stats)
    )


class Watch(NamedTuple):
  """What to gather from the calls of the layers.

  Attributes:
    name: comes before the names of the leaves, `name_leaf`. Two watches must
      not share it, for a compiled function knows them by it.
    init: takes the running mean; returns the leaves, of its shape.
    update: takes the leaves and a `Call`; returns leaves of the same shapes
      and dtypes. A layer that is called twice updates twice.
  """

  name: str
  init: Callable[[Array], Stats]
  update: Callable[[Stats, Call], Stats]


def found(model: Model) -> dict[Path, Stats]:
  """The statistics of each layer, and what watches have put beside them.

  A layer is what holds `mean` and `var` side by side.

  Raises:
    TypeError: if the model is neither variables nor an `nnx.Module`.
  """
  return {
    path: stats
    for path, stats in _groups(model)
    if {'mean', 'var'} <= stats.keys()
  }


def layers(model: Model) -> dict[Path, Stats]:
  """As `found`; raises a ValueError if no layer has running statistics."""
  if not (here := found(model)):
    raise ValueError(
      'the model has no layer with running statistics: nothing holds mean and '
      'var in batch_stats. Give all variables, with batch_stats.'
    )
  return here


def replace(model: Model, new: Mapping[Path, Stats]) -> Model:
  """The model with the statistics of some layers replaced, all leaves of each.

  Leaves that `new` does not hold are removed.
  """
  if not isinstance(model, nnx.Module):
    flat = flat_tree(model['batch_stats'])
    flat = {p: leaf for p, leaf in flat.items() if p[:-1] not in new}
    flat |= {(*p, n): leaf for p in new for n, leaf in new[p].items()}
    return core.copy(model, {'batch_stats': traverse_util.unflatten_dict(flat)})
  model = nnx.clone(model)
  modules = nnx_layers(model)
  for path, leaves in new.items():
    module = modules[path]
    for name in _variables(module).keys() - leaves.keys():
      delattr(module, name)
    for name, value in leaves.items():
      if name in _variables(module):
        getattr(module, name)[...] = value
      else:
        setattr(module, name, nnx.BatchStat(value))
  return model


def start(model: Model, watch: Watch) -> Model:
  """The model with the leaves of the watch beside the statistics."""
  return replace(
    model,
    {
      path: stats | _prefixed(watch, watch.init(stats['mean']))
      for path, stats in layers(model).items()
    },
  )


def seen(stats: Mapping[str, Array], watch: Watch) -> Stats:
  """The leaves of the watch among those of a layer, by their own names."""
  prefix = _prefix(watch)
  return {
    name.removeprefix(prefix): value
    for name, value in stats.items()
    if name.startswith(prefix)
  }


def own(stats: Mapping[str, Array], watch: Watch) -> Stats:
  """The leaves of a layer without those of the watch."""
  return {
    name: value
    for name, value in stats.items()
    if not name.startswith(_prefix(watch))
  }


def update(call: Run, state: Model, batch: Any, watch: Watch) -> Model:
  """Runs `call` on a batch; of the state, only what was gathered changes.

  Args:
    call: for linen, `call(variables, batch)` returns `(outputs, updates)`, as
      `Module.apply(..., mutable=['batch_stats'])` does; for nnx,
      `call(model, batch)` calls the model, and what it returns is ignored.
    state: what `start` returned, or this function.
    batch: whatever `call` takes.
    watch: the one that `start` was given.

  Returns:
    The state after the batch.

  Raises:
    TypeError: if `call` does not return what it should.
  """
  after = _run_nnx if isinstance(state, nnx.Module) else _run_linen
  new = layers(after(call, state, batch, watch))
  return replace(
    state,
    {
      path: own(stats, watch) | _prefixed(watch, seen(new[path], watch))
      for path, stats in layers(state).items()
    },
  )


def check_call(call: Any, name: str = 'call') -> None:
  """Raises unless `call` is a function."""
  if not callable(call):
    raise TypeError(
      f'{name} must be a function of the variables and a batch, got '
      f'{call!r:.60}.'
    )


def check_batches(batches: Any, *, repeats: bool = False) -> None:
  """Raises unless `batches` can be read, with `repeats` more than once."""
  if callable(batches):
    return
  if not isinstance(batches, Iterable):
    raise TypeError(
      'batches must be an iterable, or a function that returns one, got '
      f'{batches!r:.60}.'
    )
  if repeats and iter(batches) is batches:
    raise ValueError(
      f'batches is {type(batches).__name__}, which can be read once, and is '
      'read several times here. Give a list, or a function that returns a new '
      'iterator.'
    )


def read(batches: Batches) -> Iterable[Any]:
  """The batches, to be read once."""
  return batches() if callable(batches) else batches


def unpack(result: Any) -> tuple[Any, Mapping[str, Any]]:
  """The outputs and updates that `call` returns of a linen model."""
  match result:
    case (outputs, {'batch_stats': _} as updates):
      return outputs, updates
  raise TypeError(
    'call must return (outputs, updates), with batch_stats in updates, as '
    "Module.apply(..., mutable=['batch_stats']) does; got "
    f'{jax.tree.structure(result)!s:.200}.'
  )


def with_params(model: Model, params: Any) -> Model:
  """The model with these parameters, a nested dictionary of some or all."""
  if isinstance(model, nnx.Module):
    model = nnx.clone(model)
    nnx.update(model, params)
    return model
  flat = flat_tree(model['params']) | flat_tree(params)
  return core.copy(model, {'params': traverse_util.unflatten_dict(flat)})


def flat_tree(tree: Any) -> dict[Path, Any]:
  """The leaves of nested dictionaries by their paths, with empty ones."""
  flat: dict[Path, Any] = traverse_util.flatten_dict(
    core.unfreeze(tree), keep_empty_nodes=True
  )
  return flat


def name(path: Path) -> str:
  """A path as people write it: 'encoder/BatchNorm_0'."""
  return '/'.join(map(str, path))


def nnx_layers(model: nnx.Module) -> dict[Path, Any]:
  """The modules that hold `mean` and `var` as `nnx.BatchStat`."""
  return {
    tuple(path): module
    for path, module in nnx.iter_modules(model)
    if {'mean', 'var'} <= _variables(module).keys()
  }


def _groups(model: Model) -> Iterator[tuple[Path, Stats]]:
  """Leaves of batch statistics, by what holds them."""
  if isinstance(model, nnx.Module):
    for path, module in nnx_layers(model).items():
      yield path, {n: v[...] for n, v in _variables(module).items()}
    return
  if not isinstance(model, Mapping):
    raise TypeError(
      'variables must be a dictionary of linen variables, with batch_stats, or '
      f'an nnx.Module, got {type(model).__name__}.'
    )
  groups: dict[Path, Stats] = {}
  for path, leaf in flat_tree(model.get('batch_stats', {})).items():
    groups.setdefault(path[:-1], {})[path[-1]] = leaf
  yield from groups.items()


def _variables(module: Any) -> dict[str, Any]:
  return {
    name: value
    for name, value in vars(module).items()
    if isinstance(value, nnx.BatchStat)
  }


def _prefix(watch: Watch) -> str:
  return f'{watch.name}_'


def _prefixed(watch: Watch, leaves: Stats) -> Stats:
  return {_prefix(watch) + name: leaf for name, leaf in leaves.items()}


def _run_linen(call: Run, state: Model, batch: Any, watch: Watch) -> Model:
  """The updates that `call` returns, with what the watch gathered."""

  def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    layer = _classes.options(module, context.orig_method.func)
    before = dict(module.variables.get('batch_stats', {}))
    y = next_fun(*args, **kwargs)
    if layer is not None and module.is_mutable_collection('batch_stats'):
      stats = module.variables.get('batch_stats', {})
      new = _watched(watch, layer, before, stats, y, *args, **kwargs)
      for name, value in new.items():
        module.put_variable('batch_stats', name, value)
    return y

  with linen.intercept_methods(intercept):
    return unpack(call(state, batch))[1]


def _run_nnx(call: Run, state: Model, batch: Any, watch: Watch) -> Model:
  """A copy of the model that `call` ran, with what the watch gathered."""
  model = nnx.clone(state)
  for module in nnx_layers(model).values():
    if _classes.nnx_options(module) is not None:
      kind: Any = type(module)
      set_class(module, _watching(kind, watch))
  call(model, batch)
  return model


@functools.cache
def _watching(kind: Any, watch: Watch) -> Any:
  """A module class whose calls the watch sees."""

  def around(base: Any) -> Run:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
      before = {n: v[...] for n, v in _variables(self).items()}
      y = base.__call__(self, *args, **kwargs)
      stats = {n: v[...] for n, v in _variables(self).items()}
      layer = _classes.nnx_options(self)
      new = _watched(watch, layer, before, stats, y, *args, **kwargs)
      for name, value in new.items():
        getattr(self, name)[...] = value
      return y

    return __call__

  return _classes.wrapped(kind, around)


def _watched(
  watch: Watch,
  layer: Any,
  before: Mapping[str, Array],
  stats: Mapping[str, Array],
  y: Array,
  x: Any,
  *_: Any,
  mask: Any = None,
  **__: Any,
) -> Stats:
  """The new leaves of the watch, given a call and the statistics around it."""
  old = seen(stats, watch)
  if not old:  # variables that are being initialized
    return {}
  call = Call(
    layer=layer,
    shape=stats['mean'].shape,
    x=_types.as_inexact(x, jnp.result_type(y)),
    y=y,
    mask=None if mask is None else jnp.asarray(mask),
    # A layer in training mode writes new arrays, be their values the old.
    evaluates=stats['mean'] is before['mean'],
  )
  new = watch.update(old, call)
  leaves = {n: jnp.asarray(v, old[n].dtype) for n, v in new.items()}
  return _prefixed(watch, leaves)
