"""Inspecting the norms of a model: what goes wrong with running statistics.

A batch norm fails quietly: the loss in training is fine, and evaluation, which
uses the running statistics, is not. One pass over some batches tells how far
the two are apart in each layer, which channels are dead or explode, how much of
the gradient a layer gets, and what is most likely the mistake.
"""

from collections.abc import Mapping
import math
from typing import Any

from flax import errors, nnx
import jax
import numpy as np

from normkit import _types
from normkit.tools import _advice, _layers, _stateless
from normkit.tools._advice import (  # noqa: F401, limits to be read here
  EXPLODING,
  INVARIANT,
  SATURATED,
  SMALL,
  Flags,
  Floats,
)
from normkit.tools._frameworks import EPSILONS
from normkit.tools._gradients import (
  Loss,
  Tree,
  gradient_of,
  natural,
  shares_of,
  values_of,
  weights_of,
  wide,
)
from normkit.tools._inspection import Finding, Inspection, Layer, Weight
from normkit.tools._layers import Batches, Model, Path, Run, Stats
from normkit.tools._seen import WATCH
from normkit.tools._stateless import Norm

__all__ = ['Finding', 'Inspection', 'Layer', 'Norm', 'Weight', 'inspect']


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
  """Looks at the norms of a model while it runs.

  The running statistics of each layer are held against the mean and variance of
  all elements that it sees in the batches. Run the model in training mode, so
  that a layer whose statistics are wrong does not disturb those after it. Some
  batches like those of training are enough, as large as in training.

  What advice may say, by code: 'mutable' (updated statistics do not come back),
  'evaluation' (all layers ran in evaluation mode), 'unseen' (a layer did not
  run), 'not_updated' (statistics are still the initial ones), 'nonfinite',
  'gap' (evaluation differs from training), 'momentum' (too high for the steps,
  or PyTorch's), 'one_element' (a batch of one), 'devices' (statistics differ
  between devices), 'epsilon' (another framework's), and 'dead', 'exploding',
  'scale', 'saturated' channels.

  Of layer, RMS, group and instance norms of Flax and normkit: 'axis'
  (statistics over the first axis, or channels that seem to lie elsewhere),
  'doubled' (a norm of a norm), 'epsilon' (too small for the dtype),
  'one_element', and 'dead' features, whose output does not vary.

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
    The inspection: `layers`, `norms`, `weights`, `advice`, `table()`,
    `figure()`.

  Raises:
    TypeError: if an argument is not what it should be.
    ValueError: if there is no batch, no norm, or an argument is out of range.

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
  state, gradients, mutable, norms = _run(call, variables, batches, loss)
  values = values_of(variables)
  shares = shares_of(gradients)
  layers = tuple(
    _layer(path, stats, values, shares)
    for path, stats in sorted(
      _layers.found(state).items(), key=lambda item: natural(item[0])
    )
  )
  found: list[tuple[str, str, dict[str, Any]]] = []
  if not mutable:
    found.append(('', 'mutable', {}))
  if any(n.seen for n in layers) and all(n.evaluated for n in layers if n.seen):
    found.append(('', 'evaluation', {}))
  found += [
    (_layers.name(path), 'devices', {})
    for path, stats in _layers.found(variables).items()
    if any(_differs(stats[name], stacked) for name in ('mean', 'var'))
  ]
  for layer in layers:
    problems = _advice.problems(layer, steps, framework)
    found += [
      (layer.name, code, details)
      for code, details in problems
      if mutable or code != 'unseen'
    ]
  for norm in norms:
    told = _stateless.problems(norm)
    found += [(norm.name, code, details) for code, details in told]
  return Inspection(
    layers,
    tuple(weights_of(values, gradients, shares, learning_rate)),
    [Finding(*_advice.finding(*problem)) for problem in found],
    norms,
  )


class _NotMutableError(Exception):
  """Updated statistics do not come back."""


def _run(
  call: Run, variables: Model, batches: Batches, loss: Loss | None
) -> tuple[Model, Tree, bool, tuple[Norm, ...]]:
  """What was gathered, summed gradients, whether updates came, other norms."""
  has_stats = bool(_layers.found(variables))
  state = _stateless.prepared(variables)
  state = _layers.start(state, WATCH) if has_stats else state
  gradients: Tree = {}
  empty = mutable = True
  with _stateless.watching() as norms:
    for batch in _layers.read(batches):
      empty = False
      try:
        state = _after(call, state, batch, has_stats)
        if not isinstance(state, nnx.Module):
          jax.block_until_ready(state)  # all norms have told
      except (_NotMutableError, errors.ModifyScopeVariableError):
        mutable = False
        break
      _stateless.forget()
      if loss is not None:
        new = gradient_of(loss, variables, batch)
        gradients = {p: gradients.get(p, 0) + g for p, g in new.items()}
  if empty:
    raise ValueError('batches is empty. Give at least one batch.')
  if not has_stats and not norms:
    _layers.layers(variables)  # raises
  return state, gradients if mutable else {}, mutable, tuple(norms.values())


def _after(call: Run, state: Model, batch: Any, has_stats: bool) -> Model:
  """The state after a batch."""
  if has_stats:
    return _layers.update(_mutable(call), state, batch, WATCH)
  try:
    given = nnx.clone(state) if isinstance(state, nnx.Module) else state
    jax.block_until_ready(call(given, batch))
  except errors.FlaxError as error:
    raise ValueError(
      'variables hold no layer with running statistics, and call does not run '
      f'with them: {error}'
    ) from error
  return state


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


def _layer(
  path: Path, stats: Stats, values: Tree, shares: Mapping[Path, float]
) -> Layer:
  """The row of a layer."""
  old = {n: wide(value) for n, value in _layers.own(stats, WATCH).items()}
  seen = {n: wide(value) for n, value in _layers.seen(stats, WATCH).items()}
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
    evaluated=ran and bool(seen['evaluated'].min() == 1),
  )


def _differs(values: Any, stacked: bool) -> bool:
  """Whether what should be the same on all devices is not."""
  copies: dict[str, list[Floats]] = {}
  if stacked:
    copies[''] = list(wide(values))
  else:
    for shard in getattr(values, 'addressable_shards', ()):
      copies.setdefault(str(shard.index), []).append(wide(shard.data))
  return any(
    not np.allclose(part, parts[0], rtol=1e-3, atol=1e-5, equal_nan=True)
    for parts in copies.values()
    for part in parts
  )


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
