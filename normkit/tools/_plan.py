"""Which norm goes into which layer, and the program that is left."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.extend import core
import jax.numpy as jnp

from normkit._types import Array
from normkit.tools._chains import (
  LAYERS,
  Chain,
  Layer,
  as_layer,
  chains,
  spread,
)
from normkit.tools._program import (
  RESHAPES,
  Call,
  Graph,
  Op,
  Value,
  bodies,
  read,
  struct,
  trace,
)


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
class _Fold:
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
  folds: dict[Op, _Fold]
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
      self.kernels[op] = _unused(_label(fold.layer.kernel), taken)
    for value in kept:
      self.names[value] = _unused(_label(value), taken)

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
      _label(fold.layer.kernel)
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


Planner: TypeAlias = Callable[[Any, tuple[jax.ShapeDtypeStruct, ...]], Plan]


def planner(
  call: Call, variables: Any, forward: bool, overflows: frozenset[str]
) -> Planner:
  """Traces and plans, once for each structure of inputs.

  Args:
    call: the model.
    variables: its variables, or their shapes.
    forward: whether to fold norms into the layers after them.
    overflows: the kernels to fold nothing into.

  Returns:
    The plan of an input, from its structure and leaves.
  """
  structs = jax.tree.map(struct, variables)

  @functools.cache
  def plan(tree: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> Plan:
    graph = trace(call, structs, jax.tree.unflatten(tree, leaves))
    return _plan(graph, forward, overflows)

  return plan


def _plan(graph: Graph, forward: bool, overflows: frozenset[str]) -> Plan:
  """Decides for each chain which layer takes it, if any."""
  layers = {op: layer for op in graph.ops if (layer := as_layer(op))}
  folds: dict[Op, _Fold] = {}
  rows = _own_statistics(graph)
  own = {row.norm for _, row in rows}
  biases: dict[Op, Chain] = {}
  order = {op: i for i, op in enumerate(graph.ops)}
  for chain in chains(graph, layers):
    layer, names = chain.layer, chain.owners()
    if not layer:
      reason, takers = _refusal(chain, layers, forward)
    else:
      _trim(chain)
      reason, takers = '', [layer.op]
      if not names:
        biases[layer.op] = chain
    if not names:
      continue
    if overflows.intersection(_label(layers[op].kernel) for op in takers):
      reason, takers = _OVERFLOWS, []
    for op in takers:
      fold = folds.setdefault(op, _Fold(layers[op]))
      setattr(fold, 'after' if layer else 'before', chain)
    into = ' + '.join(_owner(layers[op].kernel) for op in takers)
    for name in names:
      if takers or name not in own:
        row = Row(name, into or None, reason)
        rows.append((order[chain.ops[0]], row))
  for op, fold in folds.items():
    fold.after = fold.after or biases.get(op)
  rows.sort(key=lambda row: row[0])
  _check_evaluation(rows, folds)
  return Plan(graph, folds, [row for _, row in rows])


def _refusal(
  chain: Chain, layers: Mapping[Op, Layer], forward: bool
) -> tuple[str, list[Op]]:
  """Why no layer after the chain can take it, or else the layers."""
  takers: list[Op] = []
  reasons = []
  for op in chain.end.uses:
    layer = layers.get(op) if op else None
    if layer is None or op is None or layer.moving is not chain.end:
      reasons.append(f'goes to {op.title if op else "the output"}')
    elif chain.shifts() and layer.pads:
      reasons.append(
        'goes to a convolution that pads with zeros, which the shift would '
        'have changed'
      )
    elif not chain.reaches(layer):
      reasons.append('is not by the features of the layer after it')
    else:
      takers.append(op)
  narrow, wide = chain.end.aval.dtype, chain.base.aval.dtype
  if jnp.promote_types(narrow, wide) != narrow:
    reasons.append(f'is narrowed from {wide} to {narrow} after it')
  if not forward:
    reasons.append(
      'lies too far from zero for the layer after it to keep digits'
    )
  if not reasons and takers:
    return '', takers
  source = chain.base.source
  origin = (
    'shares its input with others'
    if len(chain.base.uses) > 1
    else f'follows {source.title if source else "the input"}'
  )
  return f'{origin}, {reasons[0] if reasons else "unused"}', []


def _trim(chain: Chain) -> None:
  """Ends the chain with its last sum or product."""
  while chain.ops[-1] not in chain.steps:
    chain.end = chain.ops.pop().moving()[0]


def _check_evaluation(rows: list[tuple[int, Row]], folds: Any) -> None:
  for _, row in rows:
    if row.reason == _BATCH and not folds:
      raise ValueError(
        f'nothing can be folded: {row.norm} {_BATCH}. In evaluation batch norm '
        'takes its running statistics (use_running_average=True, train=False).'
      )


_BATCH = (
  'normalizes by statistics over the first axis: if that is the batch, call '
  'the model in evaluation'
)
_OWN = 'normalizes by statistics of its own input'
_OVERFLOWS = 'is too large for the dtype of the kernel that it would go into'
_LOOPS = frozenset({'scan', 'while'})
_ROOTS = frozenset({'rsqrt', 'sqrt'})


def _own_statistics(graph: Graph) -> list[tuple[int, Row]]:
  """The norms whose statistics the program computes, and where they are."""
  rows: dict[str, tuple[int, Row]] = {}
  for i, op in enumerate(graph.ops):
    if reason := _statistics(op):
      name = _nearest(op) or str(op.eqn.source_info.name_stack) or op.name
      rows.setdefault(name, (i, Row(name, None, reason)))
  return list(rows.values())


def _statistics(op: Op) -> str:
  """Why an operation, or one inside it, is a norm that stays; or nothing."""
  roots = (e for e in _inner(op.eqn) if e.primitive.name in _ROOTS)
  if op.is_constant or not any(roots):
    return ''
  if op.name in _ROOTS:
    sums = list(_sums(op))
    if not sums:
      return ''
    return _BATCH if any(map(_is_over_batch, sums)) else _OWN
  if op.name in _LOOPS:
    return 'is inside a loop'
  found = {_statistics(inner) for body in bodies(op) for inner in body.ops}
  known = (reason for reason in (_BATCH, _OWN) if reason in found)
  return next(known, f'is inside {op.name}')


def _inner(eqn: core.JaxprEqn) -> Iterator[core.JaxprEqn]:
  """An equation and those inside it."""
  yield eqn
  for jaxpr in core.jaxprs_in_params(eqn.params):
    for inside in jaxpr.eqns:
      yield from _inner(inside)


def _sums(op: Op) -> Iterator[core.JaxprEqn]:
  """The nearest sums that an operation follows from."""
  seen: set[Op] = set()
  found = [op]
  while found:
    for value in found.pop().moving():
      source = value.source
      if source is None or source in seen or source.name in LAYERS:
        continue
      seen.add(source)
      sums = [e for e in _inner(source.eqn) if e.primitive.name == 'reduce_sum']
      yield from sums
      if not sums:
        found.append(source)


def _is_over_batch(eqn: core.JaxprEqn) -> bool:
  summed: Any = eqn.invars[0].aval
  return 0 in eqn.params['axes'] and len(summed.shape) > 1


def _nearest(op: Op) -> str:
  """Whose variables an operation, or one soon after it, takes."""
  ops = [op]
  for _ in range(6):
    leaves = [leaf for op in ops for v in op.inputs for leaf in v.leaves]
    if leaves:
      return leaves[0].owner
    ops = [use for op in ops for v in op.outputs for use in v.uses if use]
    ops = [use for use in ops if use.name not in LAYERS]
  return ''


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


def _owner(value: Value) -> str:
  return value.main.owner if value.main else 'constant'


def _label(value: Value) -> str:
  return value.main.label if value.main else 'constant'


def _unused(name: str, taken: set[str]) -> str:
  """The name, with a number if it is taken; it is taken then."""
  unused, number = name, 2
  while unused in taken:
    unused, number = f'{name}:{number}', number + 1
  taken.add(unused)
  return unused
