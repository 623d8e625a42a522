"""What is folded into which layer, and the program that is left."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from normkit._types import Array
from normkit.tools._chains import Chain, Layer, spread
from normkit.tools._program import RESHAPES, Graph, Op, Value, read


class Row(NamedTuple):
  """What became of one norm.

  Attributes:
    norm: where its variables are, such as 'Block_0/BatchNorm_0'.
    layer: the layer, or layers, that it was folded into; None if it was not.
    reason: why it was not folded; empty if it was.

  Examples:
    >>> from normkit.tools import fold
    >>> fold.Row('BatchNorm_0', 'Conv_0', '').layer
    'Conv_0'
  """

  norm: str
  layer: str | None
  reason: str


@dataclasses.dataclass(eq=False)
class Fold:
  """A layer, and the chains before and after it that go into its kernel."""

  layer: Layer
  before: Chain | None = None
  after: Chain | None = None

  def arrays(self, get: Callable[[Value], Array]) -> tuple[Array, Array | None]:
    """The new kernel and bias."""
    layer, bias = self.layer, None
    kernel = get(_before_casts(layer.kernel))
    kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    if self.before:
      scale, shift = map(self._at_end, self.before.affine(get))
      summed = [a for a in range(kernel.ndim) if a not in layer.outs]
      if self.before.shifts():
        sums = jnp.sum(kernel * layer.on_inputs(shift), summed, keepdims=True)
        rank = len(layer.op.outputs[0].shape)
        bias = spread(sums, layer.outs, rank)
      kernel = kernel * layer.on_inputs(scale)
    if self.after:
      scale, shift = self.after.affine(get)
      kernel = kernel * layer.on_outputs(scale)
      bias = shift if bias is None else bias * scale + shift
    return kernel.astype(layer.kernel.aval.dtype), bias

  def has_bias(self) -> bool:
    return any(c.shifts() for c in (self.before, self.after) if c)

  def _at_end(self, values: Array) -> Array:
    assert self.before
    axes = {a: i for i, a in enumerate(self.before.axes) if a is not None}
    return spread(values, axes, len(self.before.end.shape))


@dataclasses.dataclass(eq=False)
class Plan:
  """The program without the norms that are folded."""

  graph: Graph
  folds: dict[Op, Fold]
  rows: list[Row]

  def __post_init__(self) -> None:
    chains = [c for f in self.folds.values() for c in (f.before, f.after) if c]
    self.gone = {op for chain in chains for op in chain.steps}
    self.ends = {chain.end for chain in chains}
    self.ops, kept = self._live()
    self.names: dict[Value, str] = {}
    self.kernels: dict[Op, str] = {}
    taken: set[str] = set()
    for op, fold in self.folds.items():
      self.kernels[op] = _unused(label(fold.layer.kernel), taken)
    for value in kept:
      self.names[value] = _unused(label(value), taken)

  @property
  def tree(self) -> Any:
    return self.graph.tree

  @property
  def looks_ahead(self) -> bool:
    """Whether a norm is folded into the layer after it."""
    return any(fold.before for fold in self.folds.values())

  def _live(self) -> tuple[list[Op], list[Value]]:
    """The operations that the outputs need, and the arrays."""
    needed = dict.fromkeys(self.graph.outputs)
    ops = []
    for op in reversed(self.graph.ops):
      outputs = [value for value in op.outputs if value in needed]
      if all(_is_stored(value) for value in outputs):
        continue
      ops.append(op)
      bare = op in self.gone or op in self.folds
      needed.update(dict.fromkeys(op.moving() if bare else op.inputs))
    return ops[::-1], [value for value in needed if _is_stored(value)]

  def arrays(self, variables: Any) -> dict[str, Array]:
    """The parameters of the folded model, from those of the model."""
    env = dict(
      zip(self.graph.variables, jax.tree.leaves(variables), strict=True)
    )
    env.update(self.graph.held)
    for op in self.graph.ops:
      if op.is_constant:
        args = [read(env, value) for value in op.inputs]
        env.update(zip(op.outputs, op.bind(args), strict=True))
    get = functools.partial(read, env)
    params = {}
    for value, name in self.names.items():
      here = tuple(
        slice(None) if axis in value.varying else slice(1)
        for axis in range(len(value.shape))
      )
      params[name] = get(value)[here] if here else get(value)
    for op, fold in self.folds.items():
      kernel, bias = fold.arrays(get)
      params[self.kernels[op]] = kernel
      if fold.has_bias():
        params[f'{self.kernels[op]}:bias'] = bias
    return dict(sorted(params.items()))

  def run(self, params: Mapping[str, Array], leaves: list[Any]) -> list[Any]:
    """The folded program."""
    env = dict(zip(self.graph.inputs, leaves, strict=True))
    for value, name in self.names.items():
      env[value] = jnp.broadcast_to(params[name], value.shape)
    for op in self.ops:
      if op in self.gone:
        env[op.outputs[0]] = env[op.moving()[0]]
      elif op in self.folds:
        env[op.outputs[0]] = self._run_layer(op, params, env)
      else:
        args = [read(env, value) for value in op.inputs]
        env.update(zip(op.outputs, op.bind(args), strict=True))
      for value in self.ends.intersection(op.outputs):
        env[value] = env[value].astype(value.aval.dtype)
    return [read(env, value) for value in self.graph.outputs]

  def _run_layer(self, op: Op, params: Mapping[str, Array], env: Any) -> Array:
    fold = self.folds[op]
    name = self.kernels[op]
    swap = {
      fold.layer.kernel: params[name],
      fold.layer.moving: env[fold.layer.moving],
    }
    y: Array = op.bind([swap[value] for value in op.inputs])[0]
    if fold.has_bias():
      bias = params[f'{name}:bias']
      y = y.astype(bias.dtype) + bias
    if not fold.after:
      y = y.astype(op.outputs[0].aval.dtype)
    return y

  def overflows(self, params: Mapping[str, Array]) -> frozenset[str]:
    """The kernels that cannot hold what is folded into them."""
    return frozenset(
      label(fold.layer.kernel)
      for op, fold in self.folds.items()
      if not jnp.isfinite(params[self.kernels[op]]).all()
    )

  @functools.cached_property
  def recipes(self) -> dict[str, Any]:
    """How each parameter is made of the variables."""
    recipes: dict[str, Any] = {
      name: _recipe(value) for value, name in self.names.items()
    }
    for op, fold in self.folds.items():
      chains = [
        [
          (
            step.name,
            step.is_reversed,
            step.constant and _recipe(step.constant),
          )
          for step in (chain.steps.values() if chain else ())
        ]
        for chain in (fold.before, fold.after)
      ]
      recipes[self.kernels[op]] = _recipe(fold.layer.kernel), chains
    return recipes

  @functools.cached_property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters."""
    variables = [value.aval for value in self.graph.variables]
    arrays = jax.eval_shape(self.arrays, variables)
    return {name: array.shape for name, array in arrays.items()}

  def check(self, params: Mapping[str, Array], first: 'Plan') -> None:
    """Raises unless the program takes parameters, those of the first plan."""
    wanted = self.shapes
    given = {name: jnp.shape(value) for name, value in params.items()}
    x = ', '.join(str(value.aval) for value in self.graph.inputs)
    if self.recipes != first.recipes:
      raise ValueError(
        f'for an input of {x} the model takes its variables another way than '
        'for the input that it was folded with, and other params. Fold the '
        'model again with an input of this shape.'
      )
    if given != wanted:
      wrong = sorted(dict(given.items() ^ wanted.items()))
      raise ValueError(
        f'params do not fit the folded model for an input of {x}: {wrong[0]!r} '
        f'has shape {given.get(wrong[0], "of nothing")}, and '
        f'{wanted.get(wrong[0], "nothing")} is needed. Give the params of this '
        'Folded, or fold the model again with an input of this shape.'
      )


def _is_stored(value: Value) -> bool:
  """Whether a constant becomes a parameter, not what reshapes one."""
  source = value.source
  return bool(value.leaves) and not (source and source.name in RESHAPES)


def _recipe(value: Value) -> list[str]:
  """What a constant is made of, whatever its shape."""
  recipe, seen, found = [], set(), [value]
  while found:
    value = found.pop()
    if value in seen:
      continue
    seen.add(value)
    if value.source is None:
      recipe.append(value.label or str(value.literal))
      continue
    if value.source.name not in RESHAPES:
      recipe.append(value.source.name)
    found.extend(value.source.inputs)
  return recipe


def _before_casts(value: Value) -> Value:
  """The constant that was narrowed to `value`, if it was."""
  while (op := value.source) and op.name == 'convert_element_type':
    wide = op.inputs[0].aval.dtype
    if jnp.promote_types(wide, value.aval.dtype) != wide:
      break
    value = op.inputs[0]
  return value


def label(value: Value) -> str:
  """The path of the largest variable that a constant is made of."""
  return value.main.label if value.main else 'constant'


def _unused(name: str, taken: set[str]) -> str:
  """The name, with a number if it is taken; it is taken then."""
  unused, number = name, 2
  while unused in taken:
    unused, number = f'{name}:{number}', number + 1
  taken.add(unused)
  return unused
