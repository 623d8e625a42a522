"""In which order a program uses its arrays, and what flows into each use.

Of a Flax model the traced program tells, of a PyTorch module the graph of its
gradients.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import copy
import functools
import importlib
import operator
from typing import Any, NamedTuple

from flax import nnx
import numpy as np

from normkit.tools._program import trace


class Flow(NamedTuple):
  """How units are used, by their numbers.

  Attributes:
    order: where each is used first; the units that are not used come last.
    before: (n, n), whether what came of one flows into the first use of the
      other.
  """

  order: list[int]
  before: np.ndarray


def of_flax(
  call: Callable[[Any, Any], Any],
  variables: Any,
  x: Any,
  unit_of: Mapping[str, int],
  count: int,
) -> Flow:
  """The flow of a model; `unit_of` has the paths of its arrays."""
  is_module = isinstance(variables, nnx.Module)
  if is_module:
    graph, variables = nnx.split(variables)
    model = call
    call = lambda state, x: model(nnx.merge(graph, state), x)  # noqa: E731
  program = trace(call, variables, x)
  unit_at = {}
  for leaf in program.variables:
    label = leaf.label if is_module else leaf.label.partition('/')[2]
    unit_at[leaf] = unit_of.get(label)
  flows: dict[Any, int] = {}
  uses: dict[int, int] = {}
  for op in program.ops:
    if op.is_constant:
      continue
    used = {unit_at.get(v) for value in op.inputs for v in value.leaves}
    units = sorted(unit for unit in used if unit is not None)
    into = _union(flows.get(value, 0) for value in op.inputs)
    out = _use(uses, units, into)
    flows.update(dict.fromkeys(op.outputs, out))
  return _flow(uses, count)


def of_torch(
  module: Any, inputs: tuple[Any, ...], unit_of: Mapping[str, int], count: int
) -> Flow:
  """The flow of a module in evaluation; `unit_of` has its state's names.

  A copy of it runs on the inputs.
  """
  torch: Any = importlib.import_module('torch')
  module = copy.deepcopy(module).eval()
  unit_at: dict[int, int | None] = {}
  for name, parameter in module.named_parameters(remove_duplicate=False):
    if parameter.is_floating_point():
      parameter.requires_grad_()
      unit_at.setdefault(id(parameter), unit_of.get(name))
  given = [
    x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs
  ]
  with torch.enable_grad():
    outputs = [*_tensors(module(*given), torch)]
  flows: dict[Any, int] = {}
  held: dict[Any, set[int]] = {}
  uses: dict[int, int] = {}
  for node in _nodes([y.grad_fn for y in outputs if y.grad_fn is not None]):
    if hasattr(node, 'variable'):
      unit = unit_at.get(id(node.variable))
      if any(node.variable is x for x in given):
        flows[node] = 0
      else:
        held[node] = set() if unit is None else {unit}
      continue
    above = [part for part, _ in node.next_functions if part is not None]
    own: set[int] = set().union(*(held.get(part, ()) for part in above))
    moves = any(part in flows for part in above)
    if moves or type(node).__name__.startswith('Embedding'):
      into = _union(flows.get(part, 0) for part in above)
      flows[node] = _use(uses, sorted(own), into)
    else:
      held[node] = own
  return _flow(uses, count)


def _use(uses: dict[int, int], units: list[int], into: int) -> int:
  """Notes what flows into units; returns what flows on."""
  for unit in units:
    uses.setdefault(unit, into)
  return into | _union(1 << unit for unit in units)


def _union(masks: Iterable[int]) -> int:
  return functools.reduce(operator.or_, masks, 0)


def _flow(uses: Mapping[int, int], count: int) -> Flow:
  before = np.zeros((count, count), bool)
  for unit, into in uses.items():
    before[:, unit] = [into >> i & 1 for i in range(count)]
  before &= ~np.eye(count, dtype=bool)
  unused = [unit for unit in range(count) if unit not in uses]
  return Flow([*uses, *unused], before)


def _nodes(roots: list[Any]) -> list[Any]:
  """The nodes of the graph of gradients, each after those that it takes."""
  found, left = set(roots), [*roots]
  while left:
    for node, _ in left.pop().next_functions:
      if node is not None and node not in found:
        found.add(node)
        left.append(node)

  def place(node: Any) -> int:
    return -1 if hasattr(node, 'variable') else int(node._sequence_nr())

  return sorted(found, key=place)


def _tensors(tree: Any, torch: Any) -> Iterator[Any]:
  """The tensors in what a module returns."""
  if isinstance(tree, torch.Tensor):
    yield tree
  elif isinstance(tree, Mapping):
    for value in tree.values():
      yield from _tensors(value, torch)
  elif isinstance(tree, list | tuple):
    for value in tree:
      yield from _tensors(value, torch)
