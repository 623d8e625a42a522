"""A model of PyTorch and one of Flax, each run once: what their layers see."""

from collections.abc import Callable, Mapping
import functools
import importlib
import itertools
from typing import Any, NamedTuple, TypeAlias

from flax import linen, nnx
import jax
import jax.numpy as jnp
import numpy as np

from normkit.nnx._shared import set_class
from normkit.tools import files

Run: TypeAlias = Callable[[Any, Any], Any]
_numbers = itertools.count()
# Programs that were compiled before do not tell; each run has a number.
_RUN = jax.make_user_context(default_value=-1)


class Seen(NamedTuple):
  """A call of a layer.

  Attributes:
    module: the layer.
    given: its first input, or None.
    output: its first output, or None.
    inside: what modules inside of it were given.
    options: its other arguments by name.
  """

  module: Any
  given: np.ndarray | None
  output: np.ndarray | None
  inside: tuple[np.ndarray, ...] = ()
  options: Mapping[str, Any] = {}

  @property
  def is_bare(self) -> bool:
    """Whether it is a layer of PyTorch without weights."""
    return self.given is not None and not any(self.module.children())


def of_torch(
  module: Any, args: Any, kwargs: Any
) -> tuple[Any, list[tuple[str, Seen]]]:
  """Runs a PyTorch model in evaluation.

  Returns:
    Its output, and the calls of its modules by name, in the order in which
    they ended.
  """
  torch: Any = importlib.import_module('torch')
  seen: list[tuple[str, Seen]] = []
  running: list[tuple[np.ndarray | None, list[np.ndarray]]] = []

  def before(layer: Any, args: Any, kwargs: Any) -> None:
    given = _first_tensor(torch, (args, kwargs)) if is_kept(layer) else None
    if running and given is not None:
      running[-1][1].append(given)
    running.append((given, []))

  def after(name: str, layer: Any, _: Any, __: Any, output: Any) -> None:
    given, inside = running.pop()
    y = _first_tensor(torch, output) if is_kept(layer) else None
    seen.append((name, Seen(layer, given, y, tuple(inside))))

  modes = {layer: layer.training for layer in module.modules()}
  hooks = []
  try:
    for name, layer in module.named_modules():
      hooks += [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(
          functools.partial(after, name), with_kwargs=True
        ),
      ]
    with torch.no_grad():
      output = module.eval()(*args, **kwargs)
  finally:
    for hook in hooks:
      hook.remove()
    for layer, mode in modes.items():
      layer.training = mode
  return _first_tensor(torch, output), seen


def is_kept(layer: Any) -> bool:
  """Whether a module is a layer: nothing inside of it has parameters."""
  inside = [p for child in layer.children() for p in child.parameters()]
  return not inside or hasattr(layer, 'in_proj_weight')


def _first_tensor(torch: Any, tree: Any) -> np.ndarray | None:
  """A copy of the first tensor in dicts and sequences, or None."""
  if isinstance(tree, torch.Tensor):
    return np.array(files.as_numpy('', tree))
  if isinstance(tree, Mapping):
    tree = list(tree.values())
  if isinstance(tree, list | tuple):
    found = (_first_tensor(torch, part) for part in tree)
    return next((array for array in found if array is not None), None)
  return None


class Recorder:
  """What the calls of a Flax model's layers leave, by the layers' paths."""

  def __init__(self) -> None:
    self._calls: dict[str, list[tuple[int, Seen]]] = {}
    self._traced = itertools.count()

  def calls(self) -> dict[str, list[Seen]]:
    """The calls of each layer, in the order of the program."""
    in_order = {
      name: sorted(calls, key=lambda call: call[0])
      for name, calls in self._calls.items()
    }
    return {
      name: [seen for _, seen in calls] for name, calls in in_order.items()
    }

  def tell(self, name: str, module: Any, args: Any, kwargs: Any, y: Any) -> Any:
    """Has the program tell what a call is given, and gives.

    Returns:
      The output, which passes through: `nn.scan` refuses what has an effect.
    """
    place, inputs = next(self._traced), _arrays((args, kwargs))
    given = inputs[0] if inputs else None
    options = {'positional': args[1:], **kwargs}
    leaves, tree = jax.tree.flatten(y)
    index = next((i for i, a in enumerate(leaves) if _is_array(a)), None)
    if index is None:
      return y

    def keep(given: Any, output: Any) -> Any:
      arrays = [None if a is None else np.array(a) for a in (given, output)]
      seen = Seen(module, arrays[0], arrays[1], options=options)
      self._calls.setdefault(name, []).append((place, seen))
      return arrays[1]

    struct = jax.ShapeDtypeStruct(leaves[index].shape, leaves[index].dtype)
    leaves[index] = jax.pure_callback(
      keep, struct, given, leaves[index], vmap_method='sequential'
    )
    return jax.tree.unflatten(tree, leaves)


def _arrays(tree: Any) -> list[Any]:
  """The arrays of numbers in a tree."""
  return [a for a in jax.tree.leaves(tree) if _is_array(a)]


def _is_array(leaf: Any) -> bool:
  numbers = jnp.number, jnp.bool_
  return hasattr(leaf, 'ndim') and any(
    jnp.issubdtype(leaf.dtype, kind) for kind in numbers
  )


_recorders: list[Recorder] = []


def of_flax(call: Run, variables: Any, x: Any) -> tuple[Any, Recorder]:
  """Runs a Flax model, an nnx one in evaluation, in one compiled program.

  Args:
    call: `call(variables, x)`.
    variables: those of linen, or an nnx model, of which a copy runs.
    x: what `call` takes.

  Returns:
    The first array of its output, and the calls of its modules.
  """
  recorder = Recorder()
  if isinstance(variables, nnx.Module):
    graph, variables = nnx.split(_telling(variables))
    run = lambda v, x: call(nnx.merge(graph, v), x)  # noqa: E731
  else:
    run = call
  _recorders.append(recorder)
  try:
    with (
      linen.intercept_methods(_intercept(recorder)),
      _RUN(next(_numbers)),
      jax.default_matmul_precision('highest'),
    ):
      # All that it gives, so that no layer is left out of the program.
      arrays = jax.jit(lambda v, x: _arrays(run(v, x)))(variables, x)
      jax.block_until_ready(arrays)
  finally:
    _recorders.remove(recorder)
  return np.asarray(arrays[0]) if arrays else None, recorder


def _intercept(recorder: Recorder) -> Callable[..., Any]:
  """What `linen.intercept_methods` takes; of `super().__call__`, one tells."""
  running: list[Any] = []

  def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    if context.method_name != '__call__' or module.path in running[-1:]:
      return call(*args, **kwargs)
    running.append(module.path)
    try:
      y = call(*args, **kwargs)
    finally:
      running.pop()
    return recorder.tell('/'.join(module.path), module, args, kwargs, y)

  return intercept


def _telling(model: nnx.Module) -> nnx.Module:
  """A copy of an nnx model in evaluation, whose modules tell of their calls."""
  model = nnx.clone(model)
  model.eval()
  module: Any
  for path, module in nnx.iter_modules(model):
    if callable(module):
      module._normkit_name = '/'.join(map(str, path))
      kind: Any = type(module)
      set_class(module, _telling_class(kind))
  return model


@functools.cache
def _telling_class(kind: Any) -> Any:
  """A module class whose calls the last recorder is told."""

  def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
    y = kind.__call__(self, *args, **kwargs)
    return _recorders[-1].tell(self._normkit_name, self, args, kwargs, y)

  return type(kind.__name__, (kind,), {'__call__': __call__})
