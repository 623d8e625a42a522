"""Which layer of another framework is which layer here, by how it is used."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
import importlib
from typing import Any, NamedTuple

import numpy as np

from normkit.tools import _flow, _frameworks
from normkit.tools._evidence import Matching, matching
from normkit.tools._frameworks import Source
from normkit.tools._layouts import TRANSPOSED
from normkit.tools._names import Rules, rules, without_prefix
from normkit.tools._program import struct
from normkit.tools._solve import Contradiction
from normkit.tools._template import Template, matches, template_of
from normkit.tools._units import Unit, named, units_here, units_there

_READERS = {'torch': _frameworks.read_torch, 'keras': _frameworks.read_keras}
_TOLD = 12  # of each side, in an error


class Pair(NamedTuple):
  """A layer there, or an array, and the one here.

  Attributes:
    there: its name there.
    here: its path here.
    why: what decided it: 'given' by names; 'shape', the only one of it;
      'module', what holds the same; 'numbers' in the names there, in the order
      of use; 'flow', how both programs use it; 'name', alike on both sides;
      'definition', the order of the state dict.

  Examples:
    >>> from normkit.tools import matching
    >>> matching.Pair('fc', 'Dense_0', 'shape').here
    'Dense_0'
  """

  there: str
  here: str
  why: str


class Matches(Mapping[str, str]):
  """Names of one side by those of the other, for `names` of the converters.

  `str` is a table of the pairs, in the order in which they are used here.

  Attributes:
    pairs: every pair, and what decided it.

  Examples:
    >>> from normkit.tools import matching
    >>> names = matching.Matches([matching.Pair('fc', 'Dense_0', 'shape')])
    >>> print(names)
    there  here     by
    fc     Dense_0  shape
    >>> names['fc']
    'Dense_0'
  """

  def __init__(self, pairs: Sequence[Pair]) -> None:
    self.pairs = tuple(pairs)
    self._names = {pair.there: pair.here for pair in pairs}

  def __getitem__(self, name: str) -> str:
    return self._names[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)

  def __str__(self) -> str:
    rows = [('there', 'here', 'by'), *self.pairs]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return '\n'.join(
      f'{there:{widths[0]}}  {here:{widths[1]}}  {why}'
      for there, here, why in rows
    )

  def __repr__(self) -> str:
    return f'Matches({list(self.pairs)!r})'


def match(
  there: Any,
  variables: Any,
  call: Callable[[Any, Any], Any],
  x: Any,
  *,
  names: Mapping[str, str] | None = None,
  inputs: Any = None,
  framework: str = 'torch',
  transposed: Sequence[str] = TRANSPOSED,
  inputs_first: Sequence[str] = (),
  ignore: Sequence[str] = (),
) -> Matches:
  """Finds which layer there is which layer here, by how the model uses them.

  The model here is traced: which arrays it uses, and what flows into each use.
  Of the other side a state dict tells less than its module. From a state dict
  are taken the shapes; modules that hold the same on both sides; that what is
  numbered in a module is used one after the other, where the model here can be
  so; names that are alike; and, where the arrays are not sorted by name as in
  safetensors, the order of definition. From a module of PyTorch the flow of
  its own program is taken in place of numbers and definition: it runs once, in
  evaluation, on a copy.

  What the evidence leaves open is refused by name, as query, key and value that
  are called `Dense_0` to `Dense_2` here, and so is what contradicts. The pairs
  say what decided each: read those decided by modules, numbers or definition,
  which are habits of the people that write models, or compare the outputs.

  Args:
    there: a state dict, as `from_torch` takes it, or a `torch.nn.Module`; with
      `framework='keras'` weights as `from_keras` takes them.
    variables: the model to fill, as the converters take it.
    call: the model in evaluation, `call(variables, x)`.
    x: an input, or a `jax.ShapeDtypeStruct`.
    names: what is known: names or their beginnings, to paths. What is under a
      beginning is matched with what is under its path.
    inputs: for a module, the tensor, or the tuple of them, that it takes. None:
      x, its last axis second where it has more than three.
    framework: 'torch' or 'keras'.
    transposed: as in `from_torch`.
    inputs_first: as in `from_torch`.
    ignore: patterns of arrays there that have no peer here.

  Returns:
    A mapping for `names` of the converters, and of `to_torch`; `print` it.

  Raises:
    TypeError: if an argument is of another kind.
    ValueError: if shapes of one side are missing on the other, if what is
      named is not there, or if layers cannot be told apart.

  Examples:
    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from flax import linen as nn
    >>> from normkit.tools import convert
    >>> model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(4)])
    >>> x = jnp.ones((1, 4))
    >>> empty = jax.eval_shape(model.init, jax.random.key(0), x)
    >>> state = {
    ...   f'fc{i}.{leaf}': np.ones(shape)
    ...   for i in (1, 2)
    ...   for leaf, shape in [('weight', (4, 4)), ('bias', (4,))]
    ... }
    >>> names = convert.match(state, empty, model.apply, x)
    >>> print(names)
    there  here      by
    fc1    layers_0  numbers
    fc2    layers_2  numbers
    >>> variables = convert.from_torch(state, empty, names=names)
  """
  if not callable(call):
    raise TypeError(
      f'call must be a function of (variables, x), got {call!r:.60}.'
    )
  if framework not in _READERS:
    raise ValueError(
      f'framework must be one of {[*_READERS]}, got {framework!r}.'
    )
  is_torch = framework == 'torch'
  separator = '.' if is_torch else '/'
  known = rules(names, separator, '/')
  template = template_of(variables)
  is_module = hasattr(there, 'named_parameters')
  state = there.state_dict() if is_module else there
  if is_torch:
    state = _frameworks.unwrapped(state)
  kept = {k: v for k, v in state.items() if not matches(str(k), ignore)}
  sources = _READERS[framework](kept)
  if is_torch:
    sources = without_prefix(sources, names, template)
  ours = units_there(sources, separator, is_torch)
  theirs = units_here(template, is_torch, transposed, inputs_first)
  _check_marks(ours, theirs)
  left = _allowed(ours, theirs, known)
  numbers = _numbers(theirs, '/')
  flow = _flow.of_flax(call, variables, x, numbers, len(theirs))
  flow_there = None
  if is_module:
    flow_there = _run(
      there, _inputs(x) if inputs is None else inputs, sources, ours
    )
  try:
    found = matching(ours, theirs, flow, left, flow_there, _is_defined(sources))
  except Contradiction as error:
    raise ValueError(
      'nothing was matched: what is known of the names there, and of the flow '
      f'here, contradicts itself at {ours[error.args[0]].name!r}. Give names= '
      'for some.'
    ) from error
  if open_ := found.undecided():
    is_file = is_torch and not is_module
    more = ', or the PyTorch module in place of its state' if is_file else ''
    raise ValueError(f'{_ambiguous(open_, ours, theirs)}{more}.')
  return _matches(found, flow, template, separator, known)


def _run(
  module: Any, inputs: Any, sources: Sequence[Source], units: Sequence[Unit]
) -> _flow.Flow:
  """The flow of a module that runs on inputs."""
  numbers = _numbers(units, '.')
  unit_of = {
    source.key: numbers['.'.join(filter(None, (source.layer, source.leaf)))]
    for source in sources
    if source.leaf != 'count'
  }
  given = inputs if isinstance(inputs, tuple) else (inputs,)
  return _flow.of_torch(module, given, unit_of, len(units))


def _check_marks(ours: Sequence[Unit], theirs: Sequence[Unit]) -> None:
  """Raises unless each mark is as often there as here."""
  there, here = (Counter(u.mark for u in units) for units in (ours, theirs))
  lines = []
  for mark in dict.fromkeys([*there, *here]):
    if there[mark] != here[mark]:
      names = [
        ', '.join([u.name for u in units if u.mark == mark][:_TOLD]) or 'none'
        for units in (ours, theirs)
      ]
      lines.append(
        f'  {_shape(mark)}: {there[mark]} there ({names[0]}), '
        f'{here[mark]} here ({names[1]})'
      )
  if lines:
    told = '\n'.join(lines)
    raise ValueError(
      f'layers of one side have no peer on the other:\n{told}\n'
      'ignore= leaves arrays there out; see that the model here is built with '
      'the same options.'
    )


def _shape(mark: tuple[Any, ...]) -> str:
  """A mark for people."""
  kind, shape, *more = mark
  arrays = more[0] if more else 1
  kind = {'qkv': 'query, key and value'}.get(kind, kind)
  return f'{kind} {shape}' + (f' of {arrays} arrays' if arrays > 1 else '')


def _numbers(units: Sequence[Unit], separator: str) -> dict[str, int]:
  """The unit of each array, by the array's name."""
  return {
    separator.join(filter(None, array)): i
    for i, unit in enumerate(units)
    for array in unit.arrays
  }


def _inputs(x: Any) -> Any:
  """A tensor like x, channels first."""
  torch: Any = importlib.import_module('torch')
  like = struct(x)
  shape = like.shape
  if len(shape) > 3:
    shape = (shape[0], shape[-1], *shape[1:-1])
  if np.issubdtype(like.dtype, np.integer):
    return torch.zeros(shape, dtype=torch.int64)
  return torch.randn(shape, generator=torch.Generator())


def _allowed(
  ours: Sequence[Unit], theirs: Sequence[Unit], known: Rules
) -> np.ndarray:
  """Which pairs have one shape, and are as they are named."""
  numbers: dict[Any, int] = {}
  marks = [
    np.array([numbers.setdefault(u.mark, len(numbers)) for u in units])
    for units in (ours, theirs)
  ]
  left: np.ndarray = marks[0][:, None] == marks[1]
  calls = [_calls(unit, known.old) for unit in ours]
  paths = [_calls(unit, known.new) for unit in theirs]
  for name, target in known.table.items():
    alone = Rules({name: target}, known.old, known.new)
    if not any(alone.beginning(call) for each in calls for call in each):
      raise ValueError(f'names: nothing there is called {name!r}.')
  for i, unit in enumerate(ours):
    for name in calls[i]:
      if (found := known.beginning(name)) is None:
        continue
      target, rest = found
      left[i] &= [_is_at(each, target, bool(rest)) for each in paths]
      if not left[i].any():
        raise ValueError(
          f'names give {name!r} to {target!r}, where nothing here has its '
          f'shape, {_shape(unit.mark)}.'
        )
  return left


def _calls(unit: Unit, separator: str) -> list[str]:
  """All that a unit is called: an array that is alone may be meant too."""
  arrays = unit.arrays if len(unit.arrays) == 1 else ()
  names = [separator.join(filter(None, array)) for array in arrays]
  return [*dict.fromkeys([*(unit.roles or [unit.name]), *names])]


def _is_at(paths: Sequence[str], target: str, is_inside: bool) -> bool:
  """Whether one of the paths is a target, or is in it."""
  if not is_inside:
    return target in paths
  return (
    any(f'{path}/'.startswith(f'{target}/') for path in paths) or not target
  )


def _is_defined(sources: Sequence[Source]) -> bool:
  """Whether the arrays lie in another order than that of their names."""
  keys: dict[Any, list[str]] = {}
  for source in sources:
    if source.leaf != 'count':
      keys.setdefault(source.value.dtype, []).append(source.key)
  return any(names != sorted(names) for names in keys.values())


def _ambiguous(
  groups: Sequence[tuple[list[int], list[int]]],
  ours: Sequence[Unit],
  theirs: Sequence[Unit],
) -> str:
  lines = []
  for there, here in groups[:_TOLD]:
    first = [repr(ours[i].name) for i in there[:_TOLD]]
    second = [repr(theirs[j].name) for j in here[:_TOLD]]
    lines.append(f'  {", ".join(first)} may each be any of {", ".join(second)}')
  if len(groups) > _TOLD:
    lines.append(f'  and {len(groups) - _TOLD} groups more')
  told = '\n'.join(lines)
  return (
    f'nothing tells these apart, and nothing was matched:\n{told}\n'
    'Give names= for them'
  )


def _matches(
  found: Matching,
  flow: _flow.Flow,
  template: Template,
  separator: str,
  known: Rules,
) -> Matches:
  peers = {int(j): i for i, j in enumerate(found.left.argmax(1))}
  pairs = []
  for j in flow.order:
    i = peers[j]
    unit, why = found.there[i], found.why[i]
    given = map(known.beginning, _calls(unit, separator))
    if why == 'shape' and any(given):
      why = 'given'
    names = named(unit, found.here[j], template, separator)
    for name, path in names.items() if unit.roles else ():
      if known.exactly(name) not in (None, path):
        raise ValueError(
          f'names give {name!r} to {known.exactly(name)!r}, but query, key and '
          f'value go by what they are called: it is {path!r}.'
        )
    pairs += [Pair(*name, why) for name in names.items()]
  return Matches(pairs)
