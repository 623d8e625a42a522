"""The program of a model as a graph: what tracing it gives."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
from typing import Any, TypeAlias

import jax
from jax.extend import core
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

Call: TypeAlias = Callable[[Any, Any], Any]

ARITHMETIC = frozenset({'add', 'sub', 'mul', 'div', 'neg'})
RESHAPES = frozenset({'reshape', 'squeeze', 'broadcast_in_dim'})
_INLINED = 'jit', 'pjit', 'closed_call', 'core_call', 'remat2', 'checkpoint'
_ELEMENTWISE = ARITHMETIC | {
  'convert_element_type',
  'integer_pow',
  'max',
  'min',
  'rsqrt',
  'sqrt',
  'square',
}


@dataclasses.dataclass(eq=False)
class Value:
  """A value of the program.

  `leaves` are the variables that a constant follows from, `varying` the axes
  along which it may vary, `uses` its readers, None for the caller.
  """

  aval: Any
  is_constant: bool
  label: str = ''
  owner: str = ''
  literal: Any = None
  source: 'Op | None' = None
  leaves: tuple['Value', ...] = ()
  varying: frozenset[int] = frozenset()
  uses: list['Op | None'] = dataclasses.field(default_factory=list)

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.aval.shape)

  @property
  def main(self) -> 'Value | None':
    """The largest of the leaves."""
    return max(self.leaves, key=lambda leaf: leaf.aval.size, default=None)


@dataclasses.dataclass(eq=False)
class Op:
  """An operation of the program."""

  eqn: core.JaxprEqn
  inputs: list[Value]
  outputs: list[Value] = dataclasses.field(default_factory=list)

  @property
  def name(self) -> str:
    return self.eqn.primitive.name

  @property
  def title(self) -> str:
    """Its name for people: that of the function, if it is one."""
    inner = next(core.jaxprs_in_params(self.eqn.params), None)
    return inner.debug_info.func_name if inner else self.name

  @property
  def is_constant(self) -> bool:
    return all(value.is_constant for value in self.inputs)

  def moving(self) -> list[Value]:
    return [value for value in self.inputs if not value.is_constant]

  def bind(self, args: list[Any]) -> list[Any]:
    eqn = self.eqn
    with eqn.ctx.manager:
      out = eqn.primitive.bind(
        *args, **eqn.primitive.get_bind_params(eqn.params)
      )
    return list(out) if eqn.primitive.multiple_results else [out]


@dataclasses.dataclass(eq=False)
class Graph:
  """The traced program: variables and inputs in, operations in order, out."""

  variables: list[Value]
  inputs: list[Value]
  outputs: list[Value]
  ops: list[Op]
  held: list[tuple[Value, Any]]  # arrays that the program holds itself
  tree: Any


def trace(call: Call, variables: Any, x: Any) -> Graph:
  """Traces the model into a graph, calls inlined."""
  closed, shapes = jax.make_jaxpr(call, return_shape=True)(variables, x)
  paths, _ = tree_flatten_with_path(variables)
  has_collections = isinstance(variables, Mapping) and 'params' in variables
  leaves = []
  for (path, _), var in zip(paths, closed.jaxpr.invars, strict=False):
    label, owner = names(path, has_collections)
    leaves.append(_leaf(var.aval, label, owner))
  inputs = [Value(v.aval, False) for v in closed.jaxpr.invars[len(leaves) :]]
  graph = Graph(leaves, inputs, [], [], [], jax.tree.structure(shapes))
  graph.outputs = _inline(graph, closed, leaves + inputs)
  for value in graph.outputs:
    value.uses.append(None)
  return graph


def bodies(op: Op) -> Iterator[Graph]:
  """The programs inside an operation, which take its last inputs."""
  for jaxpr in core.jaxprs_in_params(op.eqn.params):
    first = len(op.inputs) - len(jaxpr.invars)
    inputs = [dataclasses.replace(v, uses=[]) for v in op.inputs[first:]]
    if first < 0:  # a kernel takes references to its outputs too
      inputs = [Value(v.aval, False) for v in jaxpr.invars]
    graph = Graph([], [], [], [], [], None)
    make: Any = core.ClosedJaxpr  # type: ignore[attr-defined,unused-ignore]
    closed = make(jaxpr, jaxpr.constvars)  # arrays are not needed
    _inline(graph, closed, inputs)
    yield graph


def names(path: Any, has_collections: bool) -> tuple[str, str]:
  """The name of a leaf, and of the module that owns it."""
  if len(path) > 1 and path[-1] == GetAttrKey('value'):
    path = path[:-1]  # of an nnx.Variable
  owner = path[1:] if has_collections and len(path) > 1 else path
  label, own = (keystr(p, simple=True, separator='/') for p in (path, owner))
  return label, own.rpartition('/')[0] or own


def _leaf(aval: Any, label: str, owner: str) -> Value:
  value = Value(aval, True, label, owner)
  value.leaves, value.varying = (value,), _wide_axes(value)
  return value


def _inline(graph: Graph, closed: Any, args: list[Value]) -> list[Value]:
  """Appends the operations of a jaxpr to the graph; returns its outputs."""
  jaxpr = getattr(closed, 'jaxpr', closed)
  env: dict[Any, Value] = dict(zip(jaxpr.invars, args, strict=True))
  held = getattr(closed, 'consts', ())
  for var, array in zip(jaxpr.constvars, held, strict=True):
    name = f'constant:{len(graph.held)}'
    env[var] = _leaf(var.aval, name, name)
    graph.held.append((env[var], array))

  def read(atom: Any) -> Value:
    if isinstance(atom, core.Literal):
      return Value(atom.aval, True, literal=atom.val)
    return env[atom]

  for eqn in jaxpr.eqns:
    inputs = [read(atom) for atom in eqn.invars]
    if eqn.primitive.name in _INLINED:
      inner = eqn.params.get('jaxpr', eqn.params.get('call_jaxpr'))
      outputs = _inline(graph, inner, inputs)
    else:
      outputs = _append(graph, eqn, inputs)
    env.update(zip(eqn.outvars, outputs, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _append(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
  op = Op(eqn, inputs)
  leaves = tuple(dict.fromkeys(leaf for v in inputs for leaf in v.leaves))
  for var in eqn.outvars:
    value = Value(var.aval, op.is_constant, source=op)
    if op.is_constant:
      value.leaves, value.varying = leaves, _varying(op, value)
    op.outputs.append(value)
  for value in inputs:
    value.uses.append(op)
  graph.ops.append(op)
  return op.outputs


def _varying(op: Op, value: Value) -> frozenset[int]:
  """The axes along which a constant may vary."""
  wide = _wide_axes(value)
  if op.name == 'broadcast_in_dim':
    placed = op.eqn.params['broadcast_dimensions']
    return wide & {placed[axis] for axis in op.inputs[0].varying}
  if op.name in _ELEMENTWISE:
    return frozenset().union(*(v.varying for v in op.inputs))
  return wide


def _wide_axes(value: Value) -> frozenset[int]:
  return frozenset(i for i, size in enumerate(value.shape) if size != 1)


def read(env: Mapping[Value, Any], value: Value) -> Any:
  """What a value is where the program runs: its literal, or from `env`."""
  return env[value] if value.literal is None else value.literal


def struct(leaf: Any) -> jax.ShapeDtypeStruct:
  """Shape and dtype of an array or a number."""
  aval = jax.typeof(leaf)
  return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
