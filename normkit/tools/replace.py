"""Other norms in the place of a model's batch norms, its weights kept.

An nnx model is copied with other modules in it. A linen model makes its modules
anew at each call, so there the exchange is a context around the call.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
from typing import Any, TypeAlias, TypeVar

from flax import linen as nn, nnx
import jax
import jax.numpy as jnp

from normkit import nnx as modules
from normkit._types import Array, AxisName
from normkit.norms.global_response import GlobalResponseNorm
from normkit.tools import _classes

Where: TypeAlias = Callable[[str], bool]
Model = TypeVar('Model', bound=nnx.Module)


def replace_norms(
  model: Model, transform: Any, *, where: Where | None = None
) -> Model:
  """Copies an nnx model with another norm for each batch norm.

  Scale, bias and `dtype` are carried over; the running statistics are dropped.
  What the model computes changes, and it has to be trained on.

  Args:
    model: the model, of `flax.nnx` or `normkit.nnx` batch norms. It is not
      changed.
    transform: a norm without state over the last axis, such as
      `normkit.GroupNorm(num_groups=8)` or `normkit.LayerNorm()`. A `dtype`
      of its own beats that of the batch norm. With `scale_offset` the new
      parameter is the scale less that. What it has beside scale and bias, such
      as the alpha of `normkit.Derf()`, is as the transform makes it.
    where: chooses the batch norms by path, 'blocks/0/norm'; None takes all.

  Returns:
    The copy, with `normkit.nnx.Norm(transform, ...)` in those places.

  Raises:
    TypeError: if the model is not an nnx.Module, the transform keeps a state
      or knows no scale and bias, or is global response norm, whose scale
      weighs a response.
    ValueError: if there is no batch norm, one normalizes another axis than the
      last, is of a class with a `__call__` of its own, or the transform has no
      place for its scale or bias.

  References:
    Wu and He, "Group Normalization" (2018), section 4.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> from flax import nnx
    >>> from normkit.tools import replace
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(
    ...   nnx.Linear(3, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
    ... )
    >>> replaced = replace.replace_norms(model, nk.GroupNorm(num_groups=2))
    >>> replaced.layers[1].transform.num_groups
    2
    >>> replaced(jnp.ones((1, 3))).shape
    (1, 8)
  """

  offset = getattr(transform, 'scale_offset', 0.0)

  def replaced(name: str, old: Any) -> nnx.Module:
    if _classes.has_own_call(type(old)):
      raise ValueError(_own_call(name, type(old)))
    x = jax.ShapeDtypeStruct((1, 1, 1, old.num_features), jnp.float32)
    params, _ = _init(name, transform, x, old.axis)
    new = modules.Norm(
      _typed(transform, old), x, use_running_average=old.use_running_average
    )
    for field in ('scale', 'bias'):
      value = getattr(old, field)
      if value is None:
        continue
      if getattr(params, field) is None:
        raise ValueError(_no_place(name, field, transform))
      if field == 'scale' and offset:
        value = value.replace((value[...] - offset).astype(value.dtype))
      setattr(new, field, value)
    return new

  return _mapped(model, replaced, where)


def synchronize_norms(
  model: Model, axis_name: AxisName | None, *, where: Where | None = None
) -> Model:
  """Copies an nnx model with batch norms that pool over mapped axes.

  Args:
    model: the model, of `flax.nnx` or `normkit.nnx` batch norms. It is not
      changed.
    axis_name: names of the mapped axes; None pools no more.
    where: chooses the batch norms by path, 'blocks/0/norm'; None takes all.

  Returns:
    The copy, with the same variables.

  Raises:
    TypeError: if the model is not an nnx.Module.
    ValueError: if there is no batch norm.

  Examples:
    >>> from flax import nnx
    >>> from normkit.tools import replace
    >>> model = nnx.Sequential(nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
    >>> replace.synchronize_norms(model, 'devices').layers[0].axis_name
    'devices'
  """

  def synchronized(name: str, old: Any) -> Any:
    del name
    old.axis_name = axis_name  # of the copy
    return old

  return _mapped(model, synchronized, where)


@contextlib.contextmanager
def replacing_norms(
  transform: Any, *, where: Where | None = None
) -> Iterator[None]:
  """Runs linen models with another norm for each batch norm.

  Inside the context `init` and `apply` use the transform with the scale and
  bias of the batch norm, under their names, also where a class derives from one
  and calls it by `super().__call__`, whose rest stays. Statistics are neither
  made, read nor written, and `{'params': variables['params']}` is all that is
  needed, but for what the transform has beside scale and bias, such as the
  alpha of `normkit.Derf()`: `init` inside the context makes it. A jitted
  function keeps the norms that it was first traced with: trace it inside, or
  put the context into it.

  Args:
    transform: as `replace_norms` takes it, without `scale_offset`, since the
      parameters are those of the batch norms.
    where: chooses the batch norms by path, 'Block_0/BatchNorm_0'; None takes
      all.

  Yields:
    Nothing.

  Raises:
    TypeError: at the call, as `replace_norms` raises it.
    ValueError: at the call, if a batch norm normalizes another axis than the
      last, or is of a class that does not call the one it derives from; if
      the transform has no place for its scale or bias, or an offset, or
      a parameter of its own is not there; at the end, if batch norms were
      called and `where` chose none.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit as nk
    >>> from flax import linen as nn
    >>> from normkit.tools import replace
    >>> model = nn.Sequential([nn.BatchNorm(use_running_average=False)])
    >>> x = jnp.arange(8.0).reshape(1, 8)
    >>> variables = model.init(jax.random.key(0), x)
    >>> with replace.replacing_norms(nk.LayerNorm()):
    ...   y = model.apply({'params': variables['params']}, x)
    >>> bool(jnp.allclose(y, nk.layer_norm(x)))
    True
  """

  def replaced(module: Any, x: Array, mask: Array | None = None) -> Array:
    name = '/'.join(module.path)
    params, state = _init(name, transform, x, module.axis)
    if getattr(transform, 'scale_offset', False):
      raise ValueError(
        f'{type(transform).__name__} adds to its scale, and the scale of '
        f'{name!r} is that of a batch norm, around one. Give a norm without '
        'scale_offset here.'
      )
    values = {
      field: _own(module, name, field, value)
      for field, value in params._asdict().items()
      if field not in ('scale', 'bias')
    }
    for field in ('scale', 'bias'):
      initial = getattr(params, field)
      if not getattr(module, f'use_{field}'):
        values[field] = initial
      elif initial is None:
        raise ValueError(_no_place(name, field, transform))
      else:
        init = getattr(module, f'{field}_init')
        values[field] = module.param(
          field, init, initial.shape, module.param_dtype
        )
    y: Array
    y, _ = _typed(transform, module).apply(
      type(params)(**values), state, x, train=False, where=mask
    )
    return y

  def instead(module: Any, call: Any, args: Any, kwargs: Any) -> Any:
    if not choose(module):
      return call(*args, **kwargs)
    x = args[0] if args else kwargs['x']
    return replaced(module, x, kwargs.get('mask'))

  def missed(module: Any) -> None:
    if choose(module):
      raise ValueError(_own_call('/'.join(module.path), type(module)))

  with (
    _choosing(where) as choose,
    nn.intercept_methods(_classes.intercepting(instead, missed)),
  ):
    yield


@contextlib.contextmanager
def synchronizing_norms(
  axis_name: AxisName | None, *, where: Where | None = None
) -> Iterator[None]:
  """Runs linen models with batch norms that pool over mapped axes.

  Variables stay as they are. A jitted function keeps what it was first traced
  with: trace it inside, or put the context into it.

  Args:
    axis_name: names of the mapped axes; None pools no more.
    where: chooses the batch norms by path, 'Block_0/BatchNorm_0'; None takes
      all.

  Yields:
    Nothing.

  Raises:
    ValueError: at the end, if batch norms were called and `where` chose none.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from normkit.tools import replace
    >>> model = nn.Sequential([nn.BatchNorm(use_running_average=False)])
    >>> x = jnp.array([[[1.0]], [[3.0]]])  # two devices, an example each
    >>> variables = model.init(jax.random.key(0), x[0])
    >>> with replace.synchronizing_norms('devices'):
    ...   y, _ = jax.vmap(
    ...     lambda x: model.apply(variables, x, mutable='batch_stats'),
    ...     axis_name='devices',
    ...   )(x)
    >>> y.ravel().round(2).tolist()
    [-1.0, 1.0]
  """

  def pooled(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    if context.method_name != '__call__' or not choose(module):
      return call(*args, **kwargs)
    before = module.axis_name
    # A bound module is frozen, and its copy would need variables of its own.
    object.__setattr__(module, 'axis_name', axis_name)
    try:
      return call(*args, **kwargs)
    finally:
      object.__setattr__(module, 'axis_name', before)

  with _choosing(where) as choose, nn.intercept_methods(pooled):
    yield


def _mapped(
  model: Model, function: Callable[[str, Any], Any], where: Where | None
) -> Model:
  """A copy of the model, the chosen batch norms mapped by their paths."""
  if not isinstance(model, nnx.Module):
    raise TypeError(
      f'model must be an nnx.Module, got {type(model).__name__}. For linen '
      'there are the contexts replacing_norms and synchronizing_norms.'
    )
  found = []

  def visit(path: tuple[Any, ...], node: Any) -> Any:
    name = '/'.join(map(str, path))
    if not isinstance(node, nnx.BatchNorm) or not (
      where is None or where(name)
    ):
      return node
    found.append(name)
    return function(name, node)

  copied: Model = nnx.recursive_map(visit, nnx.clone(model))
  if not found:
    raise ValueError('model has no batch norm, or none that where= chooses.')
  return copied


@contextlib.contextmanager
def _choosing(where: Where | None) -> Iterator[Callable[[Any], bool]]:
  """Whether a linen module is a batch norm that is chosen; at least one is."""
  chosen: dict[str, bool] = {}

  def choose(module: Any) -> bool:
    if not isinstance(module, nn.BatchNorm):
      return False
    name = '/'.join(module.path)
    chosen[name] = where is None or where(name)
    return chosen[name]

  yield choose
  if chosen and not any(chosen.values()):
    raise ValueError(f'where= chose none of the batch norms {[*chosen]}.')


def _typed(transform: Any, module: Any) -> Any:
  """The transform with the dtype of the batch norm, if it has none itself."""
  if getattr(transform, 'dtype', module.dtype) is not None:
    return transform
  return dataclasses.replace(transform, dtype=module.dtype)


def _own(module: Any, name: str, field: str, value: Any) -> Any:
  """A parameter that the transform has, and a batch norm has not."""
  if value is None:
    return None
  if not (module.is_initializing() or module.has_variable('params', field)):
    raise ValueError(
      f'{name!r} has no {field}, which the norm in its place learns. Call init '
      'inside the context, and give its parameters, with the scale and bias '
      'that are to be kept.'
    )
  return module.param(field, lambda _: value)


def _init(name: str, transform: Any, x: Any, axis: Any) -> tuple[Any, Any]:
  """What the transform makes for x, if it can replace this batch norm."""
  if axis != -1:
    raise ValueError(
      f'{name!r} has axis={axis!r}: only norms of the last axis, -1, are '
      'replaced.'
    )
  params, state = transform.init(x)
  fields = getattr(params, '_fields', ())
  is_response = isinstance(transform, GlobalResponseNorm)
  if (
    jax.tree.leaves(state) or not {'scale', 'bias'} <= {*fields} or is_response
  ):
    raise TypeError(
      'transform must be a norm without state whose parameters are scale and '
      f'bias, such as normkit.GroupNorm(num_groups=8), got {transform!r:.200}.'
    )
  affine = params.scale, params.bias
  if any(p is not None and p.shape != x.shape[-1:] for p in affine):
    raise ValueError(
      f'{type(transform).__name__} cannot take the parameters of {name!r}, '
      f'one number a channel, {x.shape[-1:]}. Give a norm over the last axis.'
    )
  return params, state


def _own_call(name: str, kind: type) -> str:
  return (
    f'{name!r} is a {kind.__name__}, whose __call__ is its own: what it does '
    'beside its norm would be lost. Leave it out by where=, or make the norm '
    'an attribute of it.'
  )


def _no_place(name: str, field: str, transform: Any) -> str:
  return (
    f'{name!r} has a {field}, for which {type(transform).__name__} has no '
    'place. Choose a norm that has one, or leave this one out by where=.'
  )
