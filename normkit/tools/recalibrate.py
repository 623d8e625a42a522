"""Recalibrating running statistics: precise batch norm.

Running statistics are moving averages that trail the parameters, and are wrong
for parameters that no step of training made, such as averages of weights. Here
they are replaced by the moments of what each layer sees, over any number of
batches: Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 3.
"""

import importlib.util
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from normkit import _types
from normkit._types import Array
from normkit.centred import Centred
from normkit.moments import flatten
from normkit.pooling import merge
from normkit.tools import _layers
from normkit.tools._layers import (
  Batches,
  Call,
  Model,
  Path,
  Run,
  Stats,
  Watch,
)


def recalibrate(
  call: Run,
  variables: Model,
  batches: Batches,
  *,
  layerwise: bool = False,
  progress: bool = False,
) -> Model:
  """Replaces running statistics by the moments of what the layers see.

  The mean and variance of each layer become those of all elements of all
  batches at once, exact for batches of unequal size, for masks, and over the
  devices of the layer's `axis_name`. Parameters and all else stay as they are.

  In one pass, `call` runs the model in training mode, so that each layer gets
  inputs that were normalized by their batch; a layer that evaluates while
  others train is frozen, and is left as it is. Layer by layer, it runs it in
  evaluation mode, once over all batches for each layer in the longest chain:
  after the first pass the first layers are right, after the second those that
  they feed, and so on, until a pass changes nothing. The statistics are then
  those of the model as it is evaluated.

  To stop and go on later, use `start`, `update` and `finish`, whose state can
  be saved like any variables, or give such a state here as `variables`.

  Args:
    call: for linen, `call(variables, batch)` returns `(outputs, updates)`, as
      `Module.apply(..., mutable=['batch_stats'])` does, in evaluation too; for
      nnx, `call(model, batch)` calls the model. Compile it yourself, with
      `jax.jit` or `nnx.jit`, or run it on several devices.
    variables: linen variables or an `nnx.Module`, of which copies are run; or
      the state that `start` or `update` returned.
    batches: whatever `call` takes, in any iterable, or a function that returns
      one. Layer by layer they are read several times, and must be the same.
    layerwise: whether to go layer by layer.
    progress: whether to show a progress bar, with rich.

  Returns:
    New variables, or a new module. The variance is biased, or unbiased where
    the layer has `unbiased=True`; `count`, where a layer has one, is the number
    of calls in which a feature had elements; batch renorm's, by which it looks
    up its schedule, stays. A feature that was masked out of all batches keeps
    its statistics.

  Raises:
    TypeError: if an argument is not what it should be.
    ValueError: if there is no batch, no layer with running statistics, a layer
      that `call` does not run, a mean or variance that is not finite, or if
      `call` runs the model in the other mode.
    ImportError: if `progress` is asked for and rich is not there.

  References:
    Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 3.
    After weight averaging: Izmailov, Podoprikhin, Garipov, Vetrov and Wilson,
    "Averaging Weights Leads to Wider Optima and Better Generalization" (2018),
    section 3.2.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> from normkit.tools.recalibrate import recalibrate
    >>> norm = normkit.linen.BatchNorm(use_running_average=False)
    >>> batches = [jnp.array([[1.], [2.]]), jnp.array([[6.]])]
    >>> variables = norm.init(jax.random.key(0), batches[0])
    >>> def call(variables, x):
    ...   return norm.apply(variables, x, mutable=['batch_stats'])
    >>> variables = recalibrate(call, variables, batches)
    >>> variables['batch_stats']['mean'].tolist()
    [3.0]
  """
  _check(call, batches, layerwise, progress)
  begun = _is_begun(variables)
  if not layerwise:
    state = variables if begun else start(variables)
    return finish(_run(call, state, batches, progress, 'recalibrate'))
  if begun:
    raise ValueError(
      'variables is a state that was begun, and layerwise=True begins anew '
      'with each pass. Give the variables, or use layerwise=False.'
    )
  limit = _depth_limit(variables)
  for number in range(1, limit + 1):
    told = f'recalibrate, pass {number}'
    state = _run(call, start(variables), batches, progress, told)
    _check_evaluates(state)
    before, variables = variables, _settled(state)
    if number == limit or _same(before, variables):
      break
  return _finished(state)


def start(variables: Model) -> Model:
  """Begins to recalibrate: returns a state that has seen nothing.

  Args:
    variables: linen variables or an `nnx.Module`.

  Returns:
    A state for `update`: a copy with further leaves beside the statistics,
    which saves, restores and shards like the variables themselves.

  Raises:
    TypeError: if `variables` is neither.
    ValueError: if no layer has running statistics.

  Examples:
    >>> import jax.numpy as jnp
    >>> from normkit.tools import recalibrate
    >>> stats = {'mean': jnp.zeros(3), 'var': jnp.ones(3)}
    >>> state = recalibrate.start({'batch_stats': {'BatchNorm_0': stats}})
    >>> state['batch_stats']['BatchNorm_0']['recalibrate_calls'].tolist()
    [0, 0, 0]
  """
  return _layers.start(variables, _WATCH)


def update(call: Run, state: Model, batch: Any) -> Model:
  """Runs the model on a batch and adds what its layers see to the state.

  Args:
    call: as `recalibrate` takes it.
    state: what `start` or `update` returned.
    batch: whatever `call` takes.

  Returns:
    The new state.

  Raises:
    TypeError: if `call` does not return what it should.
    ValueError: if `state` does not come from `start`.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> from normkit.tools import recalibrate
    >>> norm = normkit.linen.BatchNorm(use_running_average=False)
    >>> x = jnp.array([[1.], [2.]])
    >>> def call(variables, x):
    ...   return norm.apply(variables, x, mutable=['batch_stats'])
    >>> state = recalibrate.start(norm.init(jax.random.key(0), x))
    >>> state = recalibrate.update(call, state, x)
    >>> recalibrate.finish(state)['batch_stats']['mean'].tolist()
    [1.5]
  """
  _check_begun(state)
  return _layers.update(call, state, batch, _WATCH)


def finish(state: Model) -> Model:
  """Ends what `start` began: the statistics become those that were seen.

  Args:
    state: what `update` returned; it can still go on.

  Returns:
    New variables, or a new module, of the structure that `start` was given.

  Raises:
    ValueError: if `state` does not come from `start`, if a layer has seen
      nothing, if no layer was in training mode, or if a mean or variance is not
      finite.

  Examples:
    >>> import jax.numpy as jnp, normkit.nnx
    >>> from flax import nnx
    >>> from normkit.tools import recalibrate
    >>> norm = normkit.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
    >>> state = recalibrate.start(norm)
    >>> for x in jnp.array([[[1.], [2.]], [[3.], [6.]]]):
    ...   state = recalibrate.update(lambda norm, x: norm(x), state, x)
    >>> recalibrate.finish(state).var[...].tolist()
    [3.5]
  """
  _check_begun(state)
  return _finished(_without_frozen(state))


def _finished(state: Model) -> Model:
  """The model with what was seen as its statistics, which must be finite."""
  settled = _settled(state)
  for path, stats in _layers.layers(state).items():
    if not _layers.seen(stats, _WATCH):
      continue
    if not _statistics(stats).are_finite:
      raise ValueError(
        f'the layer {_layers.name(path)!r} saw inputs whose mean or variance '
        'is not finite. Nothing was changed: look for the batch, or for the '
        'parameters, that hold NaN or infinity, or overflow.'
      )
  return settled


# The number of elements in two integers, of which the lower stays below this:
# a float would lose small batches once there are 2^24 elements.
_LIMB = 2**24


def _init(mean: Array) -> Stats:
  dtype = _types.statistics_dtype(mean.dtype)
  whole = jnp.zeros(mean.shape, jnp.int32)
  return {
    'pivot': jnp.zeros(mean.shape, dtype),
    'offset': jnp.zeros(mean.shape, dtype),
    'var': jnp.zeros(mean.shape, _types.real_dtype(dtype)),
    'low': whole,
    'high': whole,
    'calls': whole,
    'evaluated': whole,
    'ddof': whole,  # 1 where the layer stores the unbiased variance
    'scheduled': whole,  # 1 where its count tells how far a schedule is
  }


def _update(seen: Stats, call: Call) -> Stats:
  """Merges the moments of a layer's input with those before."""
  new = call.moments()
  if jnp.iscomplexobj(new.pivot) and not jnp.iscomplexobj(seen['pivot']):
    raise TypeError(
      'a layer got complex inputs, and its running mean is real. Initialize it '
      'with complex inputs.'
    )
  stacked = (jnp.stack(pair) for pair in zip(_centred(seen), new, strict=True))
  merged = merge(Centred(*stacked), 0)
  low = seen['low'] + new.count.astype(jnp.int32)
  held = new.count > 0
  return {
    'pivot': merged.pivot[0],
    'offset': merged.offset[0],
    'var': merged.var[0],
    'low': low % _LIMB,
    'high': seen['high'] + low // _LIMB,
    'calls': seen['calls'] + held,
    'evaluated': seen['evaluated'] + (held & call.evaluates),
    'ddof': jnp.full_like(low, getattr(call.layer, 'unbiased', False)),
    'scheduled': jnp.full_like(low, hasattr(call.layer, 'r_max')),
  }


_WATCH = Watch('recalibrate', _init, _update)


def _centred(seen: Stats) -> Centred:
  var = seen['var']
  count = seen['high'].astype(var.dtype) * _LIMB + seen['low']
  return Centred(seen['pivot'], seen['offset'], var, count)


def _moments(stats: Stats) -> tuple[Array, Array, Array]:
  """Mean and variance that a layer saw, and which features saw enough."""
  seen = _layers.seen(stats, _WATCH)
  mean, var, count = flatten(_centred(seen))
  free = count - seen['ddof']
  return mean, var * (count / jnp.maximum(free, 1)), free > 0


def _settled(state: Model) -> Model:
  """The model with what was seen as its statistics, where it is finite."""
  return _layers.replace(
    state,
    {
      p: _replaced(p, s) if _layers.seen(s, _WATCH) else s
      for p, s in _layers.layers(state).items()
    },
  )


def _replaced(path: Path, stats: Stats) -> Stats:
  found: _Found = _statistics(stats)
  if not found.saw_any:
    raise ValueError(
      f'the layer {_layers.name(path)!r} saw nothing: call does not run it, '
      'it is no batch norm of Flax or normkit, or all was masked. Nothing was '
      'changed: run all layers, or take this one out of the variables.'
    )
  return _layers.own(stats, _WATCH) | found.new


class _Found(NamedTuple):
  new: Stats
  saw_any: Array
  are_finite: Array


@jax.jit  # one program for layers of equal shapes
def _statistics(stats: Stats) -> _Found:
  mean, var, held = _moments(stats)
  seen = _layers.seen(stats, _WATCH)
  old = _layers.own(stats, _WATCH)
  new = {'mean': mean, 'var': var}
  if 'count' in old:
    new['count'] = jnp.where(seen['scheduled'] > 0, old['count'], seen['calls'])
  is_finite = jnp.isfinite(mean) & jnp.isfinite(var)
  held &= is_finite
  new = {
    name: jnp.where(held, value, old[name]).astype(old[name].dtype)
    for name, value in new.items()
  }
  return _Found(new, seen['calls'].any(), is_finite.all())


def _run(
  call: Run, state: Model, batches: Batches, progress: bool, told: str
) -> Model:
  """One pass over the batches."""
  source = _layers.read(batches)
  if progress:
    from rich.progress import track  # noqa: PLC0415, optional

    source = track(source, told)
  before = state
  for batch in source:
    state = update(call, state, batch)
  if state is before and not _has_seen(state):
    raise ValueError('batches is empty. Give at least one batch.')
  return state


def _is_begun(variables: Model) -> bool:
  found = _layers.layers(variables).values()
  return any(_layers.seen(stats, _WATCH) for stats in found)


def _has_seen(state: Model) -> bool:
  found = _layers.layers(state).values()
  return any(_layers.seen(s, _WATCH)['calls'].any() for s in found)


def _depth_limit(variables: Model) -> int:
  """No chain is longer: layers, times those that `scan` or `vmap` stack."""
  found = _layers.layers(variables).values()
  return sum(math.prod(stats['mean'].shape[:-1]) for stats in found)


def _same(one: Model, other: Model) -> bool:
  same = jax.tree.map(
    jnp.array_equal, _layers.layers(one), _layers.layers(other)
  )
  return all(jax.tree.leaves(same))


def _check(call: Any, batches: Any, layerwise: bool, progress: bool) -> None:
  _layers.check_call(call)
  repeats = _types.check_flag(layerwise, 'layerwise')
  _layers.check_batches(batches, repeats=repeats)
  if _types.check_flag(progress, 'progress') and not importlib.util.find_spec(
    'rich'
  ):
    raise ImportError('progress=True needs rich: pip install rich.')


def _without_frozen(state: Model) -> Model:
  """The state without what layers saw that evaluated while others trained."""
  layers = _layers.layers(state)
  frozen = {
    path: _layers.own(stats, _WATCH)
    for path, stats in layers.items()
    if _evaluated(stats) and _layers.seen(stats, _WATCH)['calls'].any()
  }
  if len(frozen) == len(layers):
    raise ValueError(
      f'the layer {_layers.name(next(iter(frozen)))!r} normalized with its '
      'running statistics, as all did. Nothing was changed: run the model in '
      'training mode, train=True, or use layerwise=True.'
    )
  return _layers.replace(state, frozen)


def _evaluated(stats: Stats) -> bool:
  seen = _layers.seen(stats, _WATCH)
  return bool((seen['evaluated'] == seen['calls']).all())


def _check_evaluates(state: Model) -> None:
  for path, stats in _layers.layers(state).items():
    if not _evaluated(stats):
      raise ValueError(
        f'the layer {_layers.name(path)!r} normalized with the statistics of '
        'its batch, and layerwise=True is for evaluation mode. Nothing was '
        'changed: run the model with train=False, or use layerwise=False.'
      )


def _check_begun(state: Model) -> None:
  if not _is_begun(state):
    raise ValueError(
      'state has seen nothing and cannot: it does not come from start. Give '
      'what start(variables) returns.'
    )
