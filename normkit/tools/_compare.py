"""A model of PyTorch and its twin in Flax, compared layer by layer."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
from typing import Any

from flax import linen, nnx
import numpy as np

from normkit.tools import _causes, _frameworks, _layouts, _runs, _torch
from normkit.tools._comparison import Cause, Compared, Comparison
from normkit.tools._frameworks import Source
from normkit.tools._names import Names, renamer_of, without_prefix
from normkit.tools._pairs import Pair, outputs, paired
from normkit.tools._stacked import unstacked
from normkit.tools._template import (
  Layout,
  Rename,
  Template,
  check_added,
  placed,
  targets,
  template_of,
  with_added,
  without,
)

_TOLERANCES = {'bfloat16': 3e-2, 'float16': 5e-3}  # by the dtype there


def compare(
  module: Any,
  model: Any,
  variables: Any,
  x: Any,
  *,
  there: Any = None,
  tolerance: float | None = None,
  names: Names = None,
  flatten: _layouts.Shapes | None = None,
  transposed: Sequence[str] = _layouts.TRANSPOSED,
  inputs_first: Sequence[str] = (),
  scanned: Any = (),
  ignore: Sequence[str] = (),
  add_to_scale: Mapping[str, float] | None = None,
) -> Comparison:
  """Runs a PyTorch model and its Flax twin, and compares each layer.

  Each model runs once, in evaluation. Layers are paired as `from_torch` pairs
  their weights, by the same arguments, and what each gives is compared, with
  channels first there and last here, heads apart or flat. Where a layer is the
  first to part, it is said why it may: its weights or statistics are others,
  its epsilon, padding, strides or dilation; the activation before it, or how a
  pool before it pads; its dtype. Options are compared of all layers, also where
  no number tells, as of the momentum.

  Not compared is what has no weights, but by what it gives to the next layer;
  and the layers inside of PyTorch's `MultiheadAttention`, which is compared
  whole. Products run at the highest precision here. Layers under `nn.vmap` are
  not paired.

  Args:
    module: a `torch.nn.Module`. Its weights and its mode stay as they are.
    model: the twin: a linen or an nnx module that takes x alone, or a function
      `call(variables, x)`, such as
      `lambda v, x: net.apply(v, x, train=False)`.
    variables: the variables of linen, or the nnx module that a function is
      given; None where `model` is an nnx module. Of it a copy runs, after
      `eval()`.
    x: the input here, as the twin takes it.
    there: the input there: an array, a sequence of them, or by name. None: x,
      with the last axis second where it has four axes or more.
    tolerance: the largest error of layers that agree; None: 1e-5, and by the
      dtype of the output there 5e-3 for float16 and .03 for bfloat16.
    names: as in `from_torch`.
    flatten: as in `from_torch`.
    transposed: as in `from_torch`.
    inputs_first: as in `from_torch`.
    scanned: as in `from_torch`.
    ignore: as in `from_torch`.
    add_to_scale: as in `from_torch`.

  Returns:
    A `Comparison`; print it.

  Raises:
    TypeError: if `module` is no module of PyTorch, or `model` is none of those
      above.
    ValueError: if no layer of both ran, or as `from_torch` raises it.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from normkit.tools import convert
    >>> def check():
    ...   import torch
    ...   there, here = torch.nn.Linear(2, 3), nn.Dense(3)
    ...   x = jnp.ones((1, 2))
    ...   empty = jax.eval_shape(here.init, jax.random.key(0), x)
    ...   variables = convert.from_torch(there.state_dict(), empty)
    ...   return convert.compare(there, here, variables, x).agrees
    >>> try:
    ...   print(check())
    ... except ModuleNotFoundError:  # without PyTorch
    ...   print(True)
    True
  """
  if not hasattr(module, 'named_modules'):
    raise TypeError(
      f'module must be a torch.nn.Module, got {type(module).__name__}. The '
      'weights of a file cannot run: give the model that they are loaded into.'
    )
  call, held = _call(model, variables)
  template = unstacked(template_of(held), scanned)
  shapes = _layouts.check_flatten(flatten, template)
  layout = _layouts.channels_first(
    shapes, template.is_transposed(transposed), inputs_first
  )
  added = check_added(add_to_scale, template)
  state = without(module.state_dict(), ignore)
  sources = without_prefix(_frameworks.read_torch(state), names, template)
  rename = renamer_of(template, sources, names, '.')
  other = _differing(sources, rename, template, layout, added)
  args, kwargs = _inputs(module, x if there is None else there, there is None)
  output, theirs = _runs.of_torch(module, args, kwargs)
  y, recorder = _runs.of_flax(call, held, x)
  calls = _stacked_calls(recorder.calls(), scanned)
  places = _places(sources, rename, template)
  pairs, unseen = _pairs(theirs, calls, places, shapes)
  if not pairs:
    raise ValueError(
      'no layer of both models ran. Their weights are paired as '
      f'{places!s:.300}, and the layers that ran here are {[*calls]!s:.300}. '
      'Mend names.'
    )
  pairs.append(outputs(y, output, len(theirs)))
  if tolerance is None:
    tolerance = _TOLERANCES.get(str(getattr(output, 'dtype', '')), 1e-5)
  rows = tuple(
    Compared(p.name, p.there, p.call, p.given_error, p.error) for p in pairs
  )
  causes = tuple(_all_causes(pairs, theirs, other, tolerance))
  return Comparison(rows, causes, tolerance, unseen)


def _call(model: Any, variables: Any) -> tuple[_runs.Run, Any]:
  """What runs the model here, and its variables."""
  if isinstance(model, nnx.Module):
    if variables is not None and variables is not model:
      raise TypeError(
        'variables must be None where model is an nnx.Module, which has its '
        f'own; got {type(variables).__name__}.'
      )
    return (lambda module, x: module(x)), model
  if isinstance(model, linen.Module):
    return model.apply, variables
  if callable(model):
    return model, variables
  raise TypeError(
    'model must be a linen or an nnx module, or a function call(variables, x); '
    f'got {type(model).__name__}.'
  )


def _inputs(module: Any, x: Any, is_ours: bool) -> tuple[Any, dict[str, Any]]:
  """The arguments there, as tensors where the module is."""
  place = next((p.device for p in module.parameters()), None)

  def tensor(value: Any) -> Any:
    if hasattr(value, 'detach'):
      return value.to(place)
    array = np.asarray(value)
    if is_ours and array.ndim > 3:
      array = np.moveaxis(array, -1, 1)
    if np.issubdtype(array.dtype, np.integer):
      array = array.astype(np.int64)
    return _torch.tensor('x', array).to(place)

  if isinstance(x, Mapping):
    return (), {name: tensor(value) for name, value in x.items()}
  if isinstance(x, list | tuple):
    return tuple(map(tensor, x)), {}
  return (tensor(x),), {}


def _places(
  sources: Sequence[Source], rename: Rename, template: Template
) -> dict[str, tuple[str, ...]]:
  """By the name of a layer there, the paths of what it is here."""
  places: dict[str, tuple[str, ...]] = {}
  parents = {
    layer[:end]
    for layer in template.layers
    for end, letter in enumerate(layer)
    if letter == '/' or not end
  }
  for source in sources:
    name, _, leaf = source.key.rpartition('.')
    found = targets(rename(source), template)
    here = tuple(layer for layer, _ in found if layer in template.layers)
    if leaf.startswith(('in_proj_', 'q_proj_')):  # of MultiheadAttention
      here = (here[0].rpartition('/')[0],) if here else ()
    elif parents.intersection(here):
      continue  # an array of its own beside its layers
    if here:
      places.setdefault(name, here)
  return places


def _stacked_calls(
  calls: dict[str, list[_runs.Seen]], scanned: Any
) -> dict[str, list[_runs.Seen]]:
  """The calls of layers, those of a scanned one by the names of each."""
  found = {}
  for name, seen in calls.items():
    path = next((p for p in scanned if f'{name}/'.startswith(f'{p}/')), None)
    if path is None:
      found[name] = seen
      continue
    rest = name[len(path) :]
    for i, one in enumerate(seen):
      found[f'{path}/{i}{rest}'] = [one]
  return found


def _pairs(
  theirs: Sequence[tuple[str, _runs.Seen]],
  ours: Mapping[str, Sequence[_runs.Seen]],
  places: Mapping[str, tuple[str, ...]],
  shapes: Mapping[str, Sequence[int]],
) -> tuple[list[Pair], tuple[str, ...]]:
  """The calls of layers side by side in the order there; what did not run."""
  calls: dict[str, list[_runs.Seen]] = {}
  for name, seen in theirs:
    calls.setdefault(name, []).append(seen)
  whole = {}
  unseen = []
  for name, here in places.items():
    if name not in calls or not all(path in ours for path in here):
      unseen.append(' + '.join(here))
      continue
    flat = shapes.get(here[0])
    parts = [ours[path] for path in here]
    whole[name] = [*paired(name, here, calls[name], parts, flat)]
  left = {name: iter(found) for name, found in whole.items()}
  pairs = []
  for place, (name, _) in enumerate(theirs):
    if pair := next(left.get(name, iter(())), None):
      pairs.append(dataclasses.replace(pair, place=place))
  return pairs, tuple(unseen)


def _differing(
  sources: Sequence[Source],
  rename: Rename,
  template: Template,
  layout: Layout,
  added: Mapping[str, float],
) -> dict[str, dict[str, bool]]:
  """By layer there, its arrays that are others here; whether as they began."""
  other: dict[str, dict[str, bool]] = {}
  for source in sources:
    for leaf, value in placed(source, rename(source), template, layout):
      if leaf not in template.leaves or leaf[1] == 'count':
        continue
      held = np.asarray(template.leaves[leaf])
      wanted = with_added(value, leaf, template, added)
      if np.array_equal(held, wanted.astype(held.dtype)):
        continue
      name = source.key.rpartition('.')[0]
      start = {'mean': 0, 'var': 1}.get(leaf[1], math.nan)
      other.setdefault(name, {})['/'.join(leaf)] = bool((held == start).all())
  return other


def _all_causes(
  pairs: Sequence[Pair],
  theirs: Sequence[tuple[str, _runs.Seen]],
  other: Mapping[str, Mapping[str, bool]],
  tolerance: float,
) -> list[Cause]:
  """Why layers part, or may, with those of the first that parts first."""
  parted = next((p for p in pairs if p.error > tolerance), None)
  causes: list[Cause] = []
  for pair in pairs:
    told: list[_causes.Told] = []
    if pair.call == 0 and pair.source is not None:
      told += [
        *_of_weights(other.get(pair.there, {})),
        *_causes.of_options(pair),
      ]
    if pair is parted:
      before = pairs[: pairs.index(pair)]
      is_told = any(code != 'momentum' for code, _ in told)
      told += _of_first(pair, before, theirs, is_told, tolerance)
    found = [Cause(pair.name, pair.there, *cause) for cause in told]
    causes = [*found, *causes] if pair is parted else [*causes, *found]
  return causes


def _of_first(
  pair: Pair,
  before: Sequence[Pair],
  theirs: Sequence[tuple[str, _runs.Seen]],
  is_told: bool,
  tolerance: float,
) -> Iterator[_causes.Told]:
  """Why a layer parts, and those before it do not."""
  if pair.source is not None and not pair.given_error > tolerance:
    if not is_told:
      yield _causes.of_layer(pair)
    return
  start = before[-1].place + 1 if before else 0
  between = [seen for _, seen in theirs[start : pair.place] if seen.is_bare]
  told = [*_causes.of_input(pair, before, between, tolerance)]
  yield from told
  if not told:
    names = ', '.join(type(seen.module).__name__ for seen in between)
    last = f'after {before[-1].name}' if before else 'before it'
    yield (
      'between',
      f'its input parts already: {last}, code without weights computes '
      f'something else{names and f" than {names} there"}',
    )


def _of_weights(other: Mapping[str, bool]) -> Iterator[_causes.Told]:
  """What is said of a layer's arrays that are not those of the source."""
  if initial := [name for name, is_initial in other.items() if is_initial]:
    yield (
      'statistics',
      f'{_leaves(initial)} are as they began, and not as there: convert them',
    )
  if rest := [name for name in other if name not in initial]:
    yield (
      'weights',
      f'{_leaves(rest)} are not as there: convert them, by the same arguments',
    )


def _leaves(paths: Sequence[str]) -> str:
  return ', '.join(path.rpartition('/')[2] for path in paths)
