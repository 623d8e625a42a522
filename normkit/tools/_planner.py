"""Which norm goes into which layer, or why into none."""

from collections.abc import Callable, Mapping
import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from normkit.tools._chains import (
  Chain,
  Layer,
  as_layer,
  chains,
  without_place,
)
from normkit.tools._plan import Fold, Plan, Row, label
from normkit.tools._program import Call, Graph, Op, Value, struct, trace
from normkit.tools._statistics import BATCH, own_statistics

Planner: TypeAlias = Callable[[Any, tuple[jax.ShapeDtypeStruct, ...]], Plan]
_OVERFLOWS = 'is too large for the dtype of the kernel that it would go into'


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
  folds: dict[Op, Fold] = {}
  rows = own_statistics(graph)
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
    if overflows.intersection(label(layers[op].kernel) for op in takers):
      reason, takers = _OVERFLOWS, []
    for op in takers:
      fold = folds.setdefault(op, Fold(layers[op]))
      setattr(fold, 'after' if layer else 'before', chain)
    into = ' + '.join(_owner(layers[op].kernel) for op in takers)
    for name in names:
      if takers or not own.intersection((name, without_place(name))):
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
    if row.reason == BATCH and not folds:
      raise ValueError(
        f'nothing can be folded: {row.norm} {BATCH}. In evaluation batch norm '
        'takes its running statistics (use_running_average=True, train=False).'
      )


def _owner(value: Value) -> str:
  return value.main.owner if value.main else 'constant'
