"""Layers of a program, and the chains of sums and products beside them."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import math
from typing import NamedTuple, TypeAlias

from jax import lax
import jax.numpy as jnp

from normkit._types import Array
from normkit.tools._program import ARITHMETIC, RESHAPES, Graph, Op, Value

# From axes of one array to those of another.
Axes: TypeAlias = Mapping[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
  """An operation that is linear in a constant kernel.

  `outs` leads from axes of the kernel to those of the output, `ins` from axes
  of the input to those of the kernel. `pads` tells whether zeros are put
  between or around the inputs.
  """

  op: Op
  kernel: Value
  moving: Value
  outs: dict[int, int]
  ins: dict[int, int]
  groups: int = 1
  pads: bool = False

  def on_inputs(self, values: Array) -> Array:
    """One number for each input feature, placed to multiply the kernel."""
    rank = len(self.kernel.shape)
    if self.groups == 1:
      return spread(values, self.ins, rank)
    ((axis, inner),) = self.ins.items()
    (outer,) = self.outs
    features = self.moving.shape[axis]
    values = jnp.broadcast_to(jnp.ravel(values), (features,))
    values = values.reshape(self.groups, features // self.groups)
    share = self.kernel.shape[outer] // self.groups
    return spread(jnp.repeat(values, share, 0), {0: outer, 1: inner}, rank)

  def on_outputs(self, values: Array) -> Array:
    """One number for each output feature, placed to multiply the kernel."""
    axes = {out: axis for axis, out in self.outs.items()}
    return spread(values, axes, len(self.kernel.shape))


class Step(NamedTuple):
  """A sum or product of a chain; `axes` lead to those of the chain's base."""

  name: str
  constant: Value | None
  axes: dict[int, int]
  is_reversed: bool  # constant - value


@dataclasses.dataclass(eq=False)
class Chain:
  """A run of operations from `base` to `end`, whose axes come from `axes`.

  `layer` is the one before it, if that can take all of its constants.
  """

  layer: Layer | None
  base: Value
  end: Value
  axes: list[int | None]
  ops: list[Op] = dataclasses.field(default_factory=list)
  steps: dict[Op, Step] = dataclasses.field(default_factory=dict)

  def owners(self) -> list[str]:
    """Whose variables it multiplies by, its norms: empty if it has none."""
    found: list[str] = []
    held: list[str] = []  # whose variance is the last that was divided by
    for step in self.steps.values():
      if step.name not in _SCALES or not step.constant:
        continue
      rooted, plain = _owners(step.constant)
      if plain:
        held = [n for n in (*held, *rooted) if not _is_state(n, plain)]
      found += [*held, *plain] if plain else []
      held = [] if plain else [*held, *rooted]
    return list(dict.fromkeys([*found, *held]))

  def shifts(self) -> bool:
    return any(step.name in {'add', 'sub'} for step in self.steps.values())

  def reaches(self, layer: Layer) -> bool:
    """Whether its constants vary along features of the layer alone."""
    read = {self.axes[axis] for axis in layer.ins}
    return all(set(s.axes.values()) <= read for s in self.steps.values())

  def affine(self, get: Callable[[Value], Array]) -> tuple[Array, Array]:
    """Scale and shift of the chain, in the axes of its base."""
    rank = len(self.base.shape)
    constants = [s.constant for s in self.steps.values() if s.constant]
    values = [self.base, self.end, *constants]
    dtype = jnp.result_type(jnp.float32, *(v.aval.dtype for v in values))
    scale = jnp.ones((1,) * rank, dtype)
    shift = jnp.zeros((1,) * rank, dtype)
    for name, constant, axes, is_reversed in self.steps.values():
      if name == 'neg' or is_reversed:
        scale, shift = -scale, -shift
      if constant is None:
        continue
      c = spread(get(constant).astype(dtype), axes, rank)
      match name:
        case 'mul':
          scale, shift = scale * c, shift * c
        case 'div':
          scale, shift = scale / c, shift / c
        case 'sub' if not is_reversed:
          shift = shift - c
        case _:
          shift = shift + c
    return scale, shift


_SCALES = frozenset({'mul', 'div'})


def as_layer(op: Op) -> Layer | None:
  """The operation as a layer, if it is one with a constant kernel."""
  if len(op.moving()) != 1 or op.name not in LAYERS:
    return None
  which = int(op.inputs[1].is_constant)
  kernel, moving = op.inputs[which], op.inputs[1 - which]
  if not jnp.issubdtype(kernel.aval.dtype, jnp.inexact):
    return None
  return LAYERS[op.name](op, which, kernel, moving)


def _convolution(
  op: Op, which: int, kernel: Value, moving: Value
) -> Layer | None:
  params = op.eqn.params
  if which != 1 or params['batch_group_count'] != 1:
    return None
  lhs, rhs, out = params['dimension_numbers']
  pads = any(n > 0 for pair in params['padding'] for n in pair)
  pads = pads or any(n > 1 for n in params['lhs_dilation'])
  groups = params['feature_group_count']
  outs, ins = {rhs[0]: out[1]}, {lhs[1]: rhs[1]}
  return Layer(op, kernel, moving, outs, ins, groups, pads)


def _product(op: Op, which: int, kernel: Value, moving: Value) -> Layer | None:
  contracted, batch = op.eqn.params['dimension_numbers']
  summed, shared = contracted[which], batch[which]
  rank = len(kernel.shape)
  free = [a for a in range(rank) if a not in (*summed, *shared)]
  others = len(moving.shape) - len(summed) if which else len(shared)
  outs = {axis: i for i, axis in enumerate(shared)}
  outs |= {axis: others + i for i, axis in enumerate(free)}
  reads = (*contracted[1 - which], *batch[1 - which])
  ins = dict(zip(reads, (*summed, *shared), strict=True))
  return Layer(op, kernel, moving, outs, ins)


LAYERS = {'conv_general_dilated': _convolution, 'dot_general': _product}


def chains(graph: Graph, layers: Mapping[Op, Layer]) -> Iterator[Chain]:
  """The chains of the program, in order; none shares an operation."""
  seen: set[Op] = set()
  for op in graph.ops:
    moving = op.moving()
    if op in seen or len(moving) != 1:
      continue
    base = moving[0]
    layer = _layer_before(base, layers)
    chain = _walk(op, base, layer)
    if not chain.ops:
      chain = _walk(op, base, None)
    seen.update(chain.ops)
    if chain.steps:
      yield chain


def _layer_before(base: Value, layers: Mapping[Op, Layer]) -> Layer | None:
  """The layer whose output a value is, if nothing else reads that."""
  if base.source is None or len(base.uses) > 1:
    return None
  return layers.get(base.source)


def _walk(op: Op | None, base: Value, layer: Layer | None) -> Chain:
  """Follows a chain, as far as the layer before it can take its constants."""
  chain = Chain(layer, base, base, list(range(len(base.shape))))
  allowed = set(layer.outs.values() if layer else chain.axes)
  while op is not None:
    axes = _follow(op, chain.end, chain.axes)
    if axes is None or (layer and _turns_complex(op, layer)):
      break
    if op.name in ARITHMETIC:
      step = _step(op, chain.end, axes)
      if step is None or not set(step.axes.values()) <= allowed:
        break
      chain.steps[op] = step
    chain.ops.append(op)
    chain.end, chain.axes = op.outputs[0], axes
    op = chain.end.uses[0] if len(chain.end.uses) == 1 else None
  return chain


def _turns_complex(op: Op, layer: Layer) -> bool:
  """Whether the result is complex, and the kernel of the layer is not."""
  dtypes = op.outputs[0].aval.dtype, layer.kernel.aval.dtype
  out, kernel = (jnp.issubdtype(d, jnp.complexfloating) for d in dtypes)
  return out and not kernel


def _follow(
  op: Op, value: Value, axes: list[int | None]
) -> list[int | None] | None:
  """Where the axes come from after the operation; None ends the chain."""
  if len(op.outputs) != 1 or op.moving() != [value]:
    return None
  out = op.outputs[0]
  dtypes = value.aval.dtype, out.aval.dtype
  if not all(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes):
    return None
  if op.name in ARITHMETIC or op.name == 'convert_element_type':
    return axes if out.shape == value.shape else None
  if op.name == 'transpose':
    return [axes[axis] for axis in op.eqn.params['permutation']]
  if op.name in RESHAPES and out.aval.size == value.aval.size:
    before, after = value.shape, out.shape
    places = {
      (math.prod(before[:i]), n): axes[i] for i, n in enumerate(before) if n > 1
    }
    return [places.get((math.prod(after[:i]), n)) for i, n in enumerate(after)]
  return None


def _step(op: Op, value: Value, axes: list[int | None]) -> Step | None:
  if op.name == 'neg':
    return Step('neg', None, {}, False)
  index = op.inputs.index(value)
  constant = op.inputs[1 - index]
  if op.name == 'div' and index == 1:
    return None
  places = {axis: axes[axis] for axis in constant.varying}
  known = {a: place for a, place in places.items() if place is not None}
  if len(known) < len(places):
    return None
  return Step(op.name, constant, known, op.name == 'sub' and index == 1)


def spread(values: Array, axes: Axes, rank: int) -> Array:
  """Axes of `values` put where `axes` says, the others, of one number, away."""
  values = values[
    tuple(slice(None) if a in axes else 0 for a in range(values.ndim))
  ]
  kept = sorted(axes)
  order = sorted(kept, key=lambda axis: axes[axis])
  values = values.transpose([kept.index(axis) for axis in order])
  placed = set(axes.values())
  return lax.expand_dims(values, [a for a in range(rank) if a not in placed])


def _owners(constant: Value) -> tuple[list[str], list[str]]:
  """Whose variables a constant takes the root of, and whose it takes else."""
  rooted: list[str] = []
  plain: list[str] = []
  seen = set()
  found = [(constant, False)]
  while found:
    value, is_rooted = found.pop()
    if (value, is_rooted) in seen:
      continue
    seen.add((value, is_rooted))
    if value.source is None:
      owners = (leaf.owner for leaf in value.leaves)
      (rooted if is_rooted else plain).extend(owners)
      continue
    is_rooted |= value.source.name in ('rsqrt', 'sqrt')
    found += [(v, is_rooted) for v in value.source.inputs]
  return [n for n in rooted if n not in plain], plain


def _is_state(name: str, plain: list[str]) -> bool:
  """Whether the statistics lie in a tree beside that of the parameters.

  Haiku's have the name of the module in them, Equinox' numbers alone.
  """
  if all(part.isdecimal() for part in name.split('/')) and '/' in name:
    return not any(other.startswith(name[:2]) for other in plain)
  module, _, average = name.rpartition('/~/')
  return average == 'var_ema' and any(
    without_place(module) == without_place(other) for other in plain
  )


def without_place(name: str) -> str:
  """A name without that of a tuple's element before it, and Haiku's '~'."""
  first, _, rest = name.partition('/')
  return (rest if first.isdecimal() else name).replace('/~', '')
