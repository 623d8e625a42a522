"""Inspecting the norms of a model: what goes wrong with running statistics.

A batch norm fails quietly: the loss in training is fine, and evaluation, which
uses the running statistics, is not. One pass over some batches tells how far
the two are apart in each layer, which channels are dead or explode, how much of
the gradient a layer gets, and what is most likely the mistake.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import math
import re
from typing import Any, NamedTuple, TypeAlias

from flax import errors, nnx, traverse_util
from flax.core import meta
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from normkit import _types
from normkit._types import Array
from normkit.centred import Centred
from normkit.pooling import merge, pool_sum
from normkit.tools import _advice, _layers, _views
from normkit.tools._frameworks import EPSILONS
from normkit.tools._layers import (
  Batches,
  Call,
  Model,
  Path,
  Run,
  Stats,
  Watch,
)

Loss: TypeAlias = Callable[[Model, Any], Any]
Tree: TypeAlias = dict[Path, Any]
Floats: TypeAlias = npt.NDArray[np.float64]
Flags: TypeAlias = npt.NDArray[np.bool_]

# Where a channel counts as such.
EXPLODING = 1e4, 100  # a deviation, and how often the median of the layer
SATURATED = 3.0  # tanh(3) is 0.995
SMALL = 1e-2  # of the layer's root mean square scale
INVARIANT = 3e-3  # cosine between a weight and its gradient


_QUIET = np.errstate(all='ignore')  # of infinities, which are reported


class Finding(NamedTuple):
  """One piece of advice.

  Attributes:
    level: 'error', or 'warning'.
    layer: the path of the layer, or '' for the whole model.
    code: what it is, in a word, such as 'gap'.
    message: what was found and what mends it.

  Examples:
    >>> from normkit.tools.inspect import Finding
    >>> print(Finding('warning', 'bn', 'gap', 'bn is off: recalibrate'))
    warning: bn is off: recalibrate
  """

  level: str
  layer: str
  code: str
  message: str

  def __str__(self) -> str:
    return f'{self.level}: {self.message}'


class Layer(NamedTuple):
  """What was seen of a layer with running statistics.

  Arrays have the shape of its statistics, NaN where nothing was seen.

  Attributes:
    name: its path, 'encoder/BatchNorm_0'.
    mean: the running mean.
    var: the running variance.
    batch_mean: the mean of all elements of all batches.
    batch_var: their variance.
    scale: the scale, or None.
    positive: the share of outputs above zero.
    saturated: the share of outputs further than 3 from zero.
    elements: the fewest elements of a channel in one call.
    examples: the fewest examples in one call.
    epsilon: the layer's epsilon.
    momentum: the share of the old value that is kept; NaN if it is None.
    debias: whether the layer forgets its initial statistics.
    updated: whether its statistics are other than the initial ones.
    gradient: the share of scale and bias in the squared norm of the loss's
      gradient; NaN without a loss.

  Examples:
    >>> import jax.numpy as jnp
    >>> from normkit.tools.inspect import inspect
    >>> stats = {'mean': jnp.zeros(3), 'var': jnp.ones(3)}
    >>> variables = {'batch_stats': {'norm': stats}}
    >>> found = inspect(lambda variables, x: (x, variables), variables, [0])
    >>> found.layers[0].name, found.layers[0].seen
    ('norm', False)
  """

  name: str
  mean: Floats
  var: Floats
  batch_mean: Floats
  batch_var: Floats
  scale: Floats | None
  positive: Floats
  saturated: Floats
  elements: float
  examples: float
  epsilon: float
  momentum: float
  debias: bool
  updated: bool
  gradient: float

  @property
  def seen(self) -> bool:
    """Whether `call` ran the layer."""
    return not math.isnan(self.elements)

  @property
  @_QUIET
  def shift(self) -> Floats:
    """How far the running means are off, in deviations of the batches."""
    deviation = np.sqrt(self.batch_var + self.epsilon)
    return np.abs(self.mean - self.batch_mean) / deviation

  @property
  @_QUIET
  def apart(self) -> Floats:
    """As `shift`, in the larger of the running and the batches' deviation.

    A channel that seldom varies does not stand out because the batches at hand
    lack what it saw.
    """
    largest = np.sqrt(np.maximum(self.var, self.batch_var) + self.epsilon)
    apart: Floats = np.abs(self.mean - self.batch_mean) / largest
    return apart

  @property
  @_QUIET
  def stretch(self) -> Floats:
    """Running deviations against those of the batches: log2 of the ratio."""
    running = np.maximum(self.var, 0) + self.epsilon
    stretch: Floats = np.log2(running / (self.batch_var + self.epsilon)) / 2
    return stretch

  @property
  def finite(self) -> Flags:
    """Channels whose statistics, and inputs where seen, are finite."""
    good = np.isfinite(self.mean) & np.isfinite(self.var) & (self.var >= 0)
    inputs = np.isfinite(self.batch_mean) & np.isfinite(self.batch_var)
    seen: Flags = ~np.isnan(self.positive)
    return good & (inputs | ~seen)

  @property
  def dead(self) -> Flags:
    """Channels without a positive output, or whose inputs do not vary."""
    negative: Flags = self.positive == 0
    constant: Flags = self.batch_var < 1e-3 * self.epsilon
    return (negative | constant) & self.finite

  @property
  @_QUIET
  def exploding(self) -> Flags:
    """Channels of a deviation above 10^4, or 100 times the layer's median."""
    largest, times = EXPLODING
    deviation = np.sqrt(self.batch_var)
    known = deviation[~np.isnan(deviation)]
    typical = float(np.median(known)) if known.size else 0.0
    limit = min(largest, times * typical or largest)
    over: Flags = deviation > limit
    return over

  @property
  def small(self) -> Flags:
    """Channels with a scale under a hundredth of the layer's."""
    if self.scale is None:
      return np.zeros(self.mean.shape, bool)
    return np.abs(self.scale) <= SMALL * _advice.rms(self.scale)


class Weight(NamedTuple):
  """A weight before a norm, whose own size the loss does not see.

  Attributes:
    name: its path, 'Conv_0/kernel'.
    norm: its Euclidean norm.
    gradient: its share in the squared norm of the loss's gradient.
    rate: the learning rate over its squared norm; NaN without a learning rate.

  Examples:
    >>> from normkit.tools.inspect import Weight
    >>> Weight('Conv_0/kernel', norm=2.0, gradient=0.3, rate=0.1 / 2.0**2).rate
    0.025
  """

  name: str
  norm: float
  gradient: float
  rate: float


@dataclasses.dataclass(frozen=True, eq=False)
class Inspection:
  """What `inspect` found; `str` makes it plain text.

  Attributes:
    layers: the layers with running statistics, by name.
    weights: the weights before norms, found where a loss is given.
    advice: what seems wrong, and what mends it; empty if nothing does.

  Examples:
    >>> from normkit.tools.inspect import Inspection
    >>> print(Inspection(layers=(), weights=(), advice=[]))
    layer  elements  mean off  at most  deviation off  dead  exploding  ...
    nothing seems wrong
  """

  layers: tuple[Layer, ...]
  weights: tuple[Weight, ...]
  advice: list[Finding]

  def __str__(self) -> str:
    return _views.text(self)

  def table(self) -> Any:
    """The findings as a `rich.table.Table`, for the terminal.

    Returns:
      The table of layers, with the advice below; `rich.print` shows it.

    Examples:
      >>> from normkit.tools.inspect import Inspection
      >>> Inspection(layers=(), weights=(), advice=[]).table().row_count
      0
    """
    return _views.table(self)

  def figure(self) -> Any:
    """Four plots of each layer's channels, as a `matplotlib.figure.Figure`.

    Returns:
      The figure, which belongs to no window: `figure.savefig('norms.png')`.

    Examples:
      >>> from normkit.tools.inspect import Inspection
      >>> len(Inspection(layers=(), weights=(), advice=[]).figure().axes)
      4
    """
    return _views.figure(self.layers)


def inspect(
  call: Run,
  variables: Model,
  batches: Batches,
  *,
  loss: Loss | None = None,
  learning_rate: float | None = None,
  steps: int | None = None,
  framework: str | None = None,
  stacked: bool = False,
) -> Inspection:
  """Looks at the layers with running statistics while a model runs.

  The running statistics of each layer are held against the mean and variance of
  all elements that it sees in the batches. Run the model in training mode, so
  that a layer whose statistics are wrong does not disturb those after it. Some
  batches like those of training are enough, as large as in training.

  What advice may say, by code: 'mutable' (updated statistics do not come back),
  'unseen' (a layer did not run), 'not_updated' (statistics are still the
  initial ones), 'nonfinite', 'gap' (evaluation differs from training),
  'momentum' (too high for the steps, or PyTorch's), 'one_element' (a batch of
  one), 'devices' (statistics differ between devices), 'epsilon' (another
  framework's), and 'dead', 'exploding', 'scale', 'saturated' channels.

  Weights before norms are found by their gradients: the loss in training mode
  does not change with the size of such a weight, so that each output's column
  of the gradient is at a right angle to that of the weight. How fast it turns
  goes with the learning rate over its squared norm.

  Args:
    call: for linen, `call(variables, batch)` returns `(outputs, updates)`, as
      `Module.apply(..., mutable=['batch_stats'])` does; for nnx, `call(model,
      batch)` calls the model. Compile it yourself.
    variables: linen variables or an `nnx.Module`, of which copies are run.
    batches: whatever `call` takes, in any iterable, or a function that returns
      one.
    loss: `loss(variables, batch)`, or of a model, a number: for shares of its
      gradient and for the weights before norms. Of the same mode as `call`.
    learning_rate: of plain SGD, for effective rates; needs `loss`.
    steps: how many steps the run has or had, to judge the momentum by.
    framework: where the weights come from, to judge epsilon by: 'equinox',
      'flax', 'haiku', 'keras' or 'torch'.
    stacked: whether variables have a leading axis of devices, as for `pmap`.

  Returns:
    The inspection: `layers`, `weights`, `advice`, `table()`, `figure()`.

  Raises:
    TypeError: if an argument is not what it should be.
    ValueError: if there is no batch, no layer with running statistics, or an
      argument is out of range.

  References:
    Effective learning rates: van Laarhoven, "L2 Regularization versus Batch and
    Weight Normalization" (2017), section 3; Hoffer, Banner, Golan and Soudry,
    "Norm matters: efficient and accurate normalization schemes in deep
    networks" (2018), section 3.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> from normkit.tools.inspect import inspect
    >>> norm = normkit.linen.BatchNorm(use_running_average=False)
    >>> x = jnp.array([[1.], [2.], [6.]])
    >>> variables = norm.init(jax.random.key(0), x)
    >>> def call(variables, x):
    ...   return norm.apply(variables, x, mutable=['batch_stats'])
    >>> found = inspect(call, variables, [x])
    >>> found.layers[0].batch_mean.tolist()
    [3.0]
    >>> found.advice[0].code
    'not_updated'
  """
  _check(call, batches, loss, learning_rate, steps, framework, stacked)
  state, gradients, mutable = _run(call, variables, batches, loss)
  values = _values(variables)
  shares = _shares(gradients)
  layers = tuple(
    _layer(path, stats, values, shares)
    for path, stats in sorted(
      _layers.layers(state).items(), key=lambda item: _natural(item[0])
    )
  )
  found: list[tuple[str, str, dict[str, Any]]] = []
  if not mutable:
    found.append(('', 'mutable', {}))
  found += [
    (_layers.name(path), 'devices', {})
    for path, stats in _layers.layers(variables).items()
    if any(_differs(stats[name], stacked) for name in ('mean', 'var'))
  ]
  for layer in layers:
    problems = _advice.problems(layer, steps, framework)
    found += [
      (layer.name, code, details)
      for code, details in problems
      if mutable or code != 'unseen'
    ]
  return Inspection(
    layers,
    tuple(_weights(values, gradients, shares, learning_rate)),
    [Finding(*_advice.finding(*problem)) for problem in found],
  )


def _init(mean: Array) -> Stats:
  dtype = _types.statistics_dtype(mean.dtype)
  real = jnp.zeros(mean.shape, _types.real_dtype(dtype))
  moments = dict.fromkeys(('pivot', 'offset'), jnp.zeros(mean.shape, dtype))
  sums = dict.fromkeys(('var', 'count', 'positive', 'saturated'), real)
  fewest = dict.fromkeys(('elements', 'examples'), real + jnp.inf)
  told = dict.fromkeys(('epsilon', 'momentum', 'debias', 'scale_offset'), real)
  return {**moments, **sums, **fewest, **told}


def _update(seen: Stats, call: Call) -> Stats:
  """Merges the moments of a layer's input, and counts its outputs."""
  new, layer = call.moments(), call.layer
  before = Centred(*(seen[name] for name in Centred._fields))
  stacked = (jnp.stack(pair) for pair in zip(before, new, strict=True))
  merged = merge(Centred(*stacked), 0)
  y = jnp.real(call.y)
  elements = jnp.where(new.count > 0, new.count, jnp.inf)
  examples = jnp.where(new.count > 0, _examples(call), jnp.inf)
  options = {
    'epsilon': getattr(layer, 'epsilon', math.nan),
    'momentum': _momentum(layer),
    'debias': float(getattr(layer, 'debias', False)),
    'scale_offset': getattr(layer, 'scale_offset', 0.0),
  }
  return {
    **{name: s[0] for name, s in merged._asdict().items()},
    **{n: jnp.full_like(seen[n], value) for n, value in options.items()},
    'positive': seen['positive'] + _number_of(y > 0, call),
    'saturated': seen['saturated'] + _number_of(jnp.abs(y) > SATURATED, call),
    'elements': jnp.minimum(seen['elements'], elements),
    'examples': jnp.minimum(seen['examples'], examples),
  }


_WATCH = Watch('inspect', _init, _update)


def _number_of(chosen: Array, call: Call) -> Array:
  """How many outputs of each channel are chosen, over all devices."""
  where = call.where()
  chosen = chosen if where is None else chosen & where
  layer = call.layer
  number = jnp.sum(chosen, call.reduced(), dtype=jnp.float32)
  number = pool_sum(number, layer.axis_name, layer.axis_index_groups)
  return number.reshape(call.shape)


def _momentum(layer: Any) -> float:
  momentum = getattr(layer, 'momentum', None)
  return math.nan if momentum is None else momentum


def _examples(call: Call) -> int:
  """How many examples one call normalizes together: sizes of the first axis."""
  layer = call.layer
  examples = math.prod(call.x.shape[axis] for axis in call.reduced()[:1])
  if layer.axis_index_groups is not None:
    return examples * len(layer.axis_index_groups[0])
  if layer.axis_name is not None:
    return examples * lax.axis_size(layer.axis_name)
  return examples


class _NotMutableError(Exception):
  """Updated statistics do not come back."""


def _run(
  call: Run, variables: Model, batches: Batches, loss: Loss | None
) -> tuple[Model, Tree, bool]:
  """What the watch gathered, the summed gradients, whether updates came."""
  state = _layers.start(variables, _WATCH)
  gradients: Tree = {}
  empty = True
  for batch in _layers.read(batches):
    empty = False
    try:
      state = _layers.update(_mutable(call), state, batch, _WATCH)
    except (_NotMutableError, errors.ModifyScopeVariableError):
      return state, {}, False
    if loss is not None:
      new = _gradient(loss, variables, batch)
      gradients = {p: gradients.get(p, 0) + g for p, g in new.items()}
  if empty:
    raise ValueError('batches is empty. Give at least one batch.')
  return state, gradients, True


def _mutable(call: Run) -> Run:
  """The call, which raises if updated statistics do not come back."""

  def checked(variables: Model, batch: Any) -> Any:
    result = call(variables, batch)
    match result:
      case (_, {'batch_stats': _}):
        return result
    if isinstance(variables, nnx.Module):
      return result
    raise _NotMutableError

  return checked


def _gradient(loss: Loss, model: Model, batch: Any) -> Tree:
  """The gradient of the loss, by the paths of the parameters."""

  def checked(model: Model) -> Any:
    value = loss(model, batch)
    if jnp.shape(value):
      raise ValueError(
        'loss must return one number, got an array of shape '
        f'{jnp.shape(value)}. Take the mean.'
      )
    return value

  if isinstance(model, nnx.Module):
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  else:
    params = model['params']
  gradient = jax.grad(lambda p: checked(_layers.with_params(model, p)))
  return _flat(gradient(params))


def _values(model: Model) -> Tree:
  """The parameters by their paths."""
  if isinstance(model, nnx.Module):
    return _flat(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
  return _flat(model.get('params', {}))


def _flat(tree: Any) -> Tree:
  flat = _layers.flat_tree(meta.unbox(tree)).items()
  return {p: _wide(v) for p, v in flat if v is not traverse_util.empty_node}


def _wide(value: Any) -> Floats:
  array = np.asarray(value)
  return array.astype(np.promote_types(array.dtype, np.float64))


def _shares(gradients: Tree) -> dict[Path, float]:
  """The share of each parameter in the squared norm of the gradient."""
  squares = {p: float(np.sum(np.abs(g) ** 2)) for p, g in gradients.items()}
  total = sum(squares.values())
  return {p: s / total if total else math.nan for p, s in squares.items()}


def _layer(
  path: Path, stats: Stats, values: Tree, shares: Mapping[Path, float]
) -> Layer:
  """The row of a layer."""
  old = {n: _wide(value) for n, value in _layers.own(stats, _WATCH).items()}
  seen = {n: _wide(value) for n, value in _layers.seen(stats, _WATCH).items()}
  count = np.where(seen['count'] > 0, seen['count'], np.nan)
  held = count > 0
  mean = seen['pivot'] + seen['offset']
  scale = values.get((*path, 'scale'))
  own = [
    shares[key] for key in ((*path, 'scale'), (*path, 'bias')) if key in shares
  ]
  ran = bool(held.any())
  return Layer(
    name=_layers.name(path),
    mean=old['mean'],
    var=old['var'],
    batch_mean=np.where(held, mean, np.nan),
    batch_var=np.where(held, seen['var'], np.nan),
    scale=None if scale is None else scale + seen['scale_offset'].max(),
    positive=seen['positive'] / count,
    saturated=seen['saturated'] / count,
    elements=float(seen['elements'].min()) if ran else math.nan,
    examples=float(seen['examples'].min()) if ran else math.nan,
    epsilon=float(seen['epsilon'].max()) if ran else math.nan,
    momentum=float(seen['momentum'].max()) if ran else math.nan,
    debias=bool(seen['debias'].any()),
    updated=bool(old['mean'].any() or (old['var'] != 1).any()),
    gradient=sum(own) if own else math.nan,
  )


def _weights(
  values: Tree,
  gradients: Tree,
  shares: Mapping[Path, float],
  learning_rate: float | None,
) -> Iterator[Weight]:
  """The weights at right angles to their gradients, output by output."""
  for path in sorted(gradients, key=_natural):
    value, gradient = values[path], gradients[path]
    if value.ndim < 2 or not gradient.any():
      continue
    w, g = (a.reshape(-1, a.shape[-1]) for a in (value, gradient))
    lengths = np.linalg.norm(w, axis=0) * np.linalg.norm(g, axis=0)
    along = np.linalg.norm(np.sum(w * g, axis=0))
    if along <= INVARIANT * np.linalg.norm(lengths):
      norm = float(np.linalg.norm(w))
      rate = math.nan if learning_rate is None else learning_rate / norm**2
      yield Weight(_layers.name(path), norm, shares[path], rate)


def _differs(values: Any, stacked: bool) -> bool:
  """Whether what should be the same on all devices is not."""
  copies: dict[str, list[Floats]] = {}
  if stacked:
    copies[''] = list(_wide(values))
  else:
    for shard in getattr(values, 'addressable_shards', ()):
      copies.setdefault(str(shard.index), []).append(_wide(shard.data))
  return any(
    not np.allclose(part, parts[0], rtol=1e-3, atol=1e-5, equal_nan=True)
    for parts in copies.values()
    for part in parts
  )


def _natural(path: Path) -> list[tuple[bool, int, str]]:
  """A key that sorts BatchNorm_2 before BatchNorm_10."""
  parts = re.split(r'(\d+)', _layers.name(path))
  return [
    (part.isdecimal(), int(part) if part.isdecimal() else 0, part)
    for part in parts
  ]


def _check(
  call: Any,
  batches: Any,
  loss: Any,
  learning_rate: Any,
  steps: Any,
  framework: Any,
  stacked: Any,
) -> None:
  _layers.check_call(call)
  if loss is not None:
    _layers.check_call(loss, 'loss')
  _layers.check_batches(batches)
  if learning_rate is not None:
    if not _types.check_real(learning_rate, 'learning_rate') > 0:
      raise ValueError(
        f'learning_rate must be above zero, got {learning_rate!r}. Give that '
        'of the optimizer, at the step that you ask about.'
      )
    if loss is None:
      raise ValueError(
        'learning_rate was given without loss, whose gradient tells which '
        'weights it is for. Give loss=.'
      )
  if steps is not None and not (_types.is_integer(steps) and steps > 0):
    raise ValueError(
      f'steps must be a whole number above zero, got {steps!r}. Give the '
      'number of updates in the run.'
    )
  if framework is not None and framework not in EPSILONS:
    raise ValueError(
      f'framework must be one of {sorted(EPSILONS)}, got {framework!r}. Give '
      'the one that the weights come from, or leave it out.'
    )
  if _types.check_flag(stacked, 'stacked') and loss is not None:
    raise ValueError(
      'stacked=True and loss were given: the gradient would be of all devices '
      'at once. Give the variables of one device with loss.'
    )
