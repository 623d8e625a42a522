"""What advice the inspection of a layer gives, and from where on."""

from collections.abc import Iterator, Mapping
import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from normkit.tools._frameworks import EPSILONS

Floats: TypeAlias = npt.NDArray[np.float64]
Flags: TypeAlias = npt.NDArray[np.bool_]
Layer: TypeAlias = Any  # of normkit.tools._inspection, which is above

# Where a channel, or a weight, counts as such.
EXPLODING = 1e4, 100  # a deviation, and how often the median of the layer
SATURATED = 3.0  # tanh(3) is 0.995
SMALL = 1e-2  # of the layer's root mean square scale
INVARIANT = 3e-3  # cosine between a weight and its gradient

# Where advice begins.
FAR = 0.5  # deviations off, or twofold differences of deviations
FAR_CHANNEL = 1.0  # deviations that the mean of one channel is off, and
NOISE = 6.0  # standard errors of a batch's mean, at one value an example
INITIAL_SHARE = 0.05  # of the initial statistics in the running ones
MANY = 0.25  # of the channels, or of the outputs

_ERRORS = {'mutable', 'not_updated', 'nonfinite', 'one_element', 'devices'}
_MESSAGES = {
  'mutable': 'updated statistics do not come back from call: say mutable=['
  "'batch_stats'] in apply, return (outputs, updates), and in training put "
  "updates['batch_stats'] into the variables at each step",
  'evaluation': 'call ran all layers in evaluation mode, with their running '
  'statistics: what was seen of a layer comes from those before it as they are '
  'evaluated. Run the model in training mode, train=True',
  'unseen': '{layer} is not run by call, or is no batch norm of Flax or '
  'normkit',
  'not_updated': '{layer} has its initial statistics, mean 0 and variance 1, '
  "but its inputs have others: was mutable=['batch_stats'] forgotten, were "
  'updates dropped, or was training in evaluation mode? Recalibrate',
  'nonfinite': '{layer} has a mean or variance that is no finite number, '
  'running or of the batches, in channels {channels}: look for NaN or infinity '
  'in the data and the parameters, recalibrate, and use skip_nonfinite=True',
  'gap': 'evaluation differs from training in {layer}: running means are '
  '{shift:.2g} deviations off, deviations by a factor of {factor:.2g}: '
  'recalibrate',
  'gap/channel': 'evaluation differs from training in {layer}: the running '
  'means of channels {channels} are up to {shift:.2g} deviations off: '
  'recalibrate',
  'momentum': '{layer} has momentum={momentum:g}, of whose initial statistics '
  '{share:.0%} are left after {steps} steps: use debias=True, or a momentum of '
  '{better:.2g}, or recalibrate',
  'momentum/torch': '{layer} has momentum={momentum:g}, the share of the old '
  'value that is kept: PyTorch means the share of the new, so write '
  'momentum={better:g}',
  'one_element': '{layer} sees one element of a channel at once, so that it '
  'gives its bias alone in training: use larger batches, pool over devices by '
  'axis_name, or use a norm without statistics of the batch',
  'one_element/example': '{layer} sees one example at once, so that it '
  'normalizes each by itself in training: use larger batches, pool over '
  'devices by axis_name, or use a norm without statistics of the batch',
  'one_element/set': '{layer} normalizes one element by itself, so that it '
  'gives its bias alone: look at its axes and groups, and at the shape before '
  'it',
  'axis': '{layer} takes statistics over the first axis of its input, '
  '{shape}: if that is the batch, examples change with those beside them; name '
  'the axes of one example',
  'axis/channels': '{layer} has an input of {shape}, which looks as if the '
  'channels were first, and takes the last axis for them: move them to the end',
  'doubled': '{layer} normalizes what {after} has normalized: leave one out',
  'epsilon/dtype': '{layer} has epsilon={epsilon:g}, too small for {dtype}: '
  'where an input does not vary, 1 / sqrt(epsilon) is more than that holds, '
  'and gradients are infinite; give a larger one',
  'dead/feature': '{layer} has {share:.0%} features whose output does not '
  'vary, {channels}: look at its scale, and at weight decay on it; see '
  'normkit.masks',
  'devices': '{layer} has different statistics on different devices: give it '
  'the axis_name of the devices, and recalibrate over all of them',
  'epsilon': '{layer} has epsilon={epsilon:g}, and weights of {framework} come '
  'with {usual:g} unless it was told another: build it with epsilon={usual:g}',
  'dead': '{layer} has {share:.0%} dead channels, {channels}: no output is '
  'above zero, or the input does not vary; a lower learning rate, or pruning',
  'exploding': '{layer} has exploding inputs in channels {channels}: look at '
  'the weights before it, and at their learning rate and decay',
  'scale': '{layer} has {share:.0%} channels with a scale near zero, '
  '{channels}: is weight decay on the scale? See normkit.masks',
  'saturated': '{layer} gives {share:.0%} outputs further than 3 from zero, '
  'where tanh and sigmoid are flat: look at its scale and bias',
}


def problems(
  layer: Layer, steps: int | None, framework: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
  """What is wrong with a layer: codes of messages and what they name."""
  if not layer.seen:
    yield 'unseen', {}
  if not layer.finite.all():
    yield 'nonfinite', {'channels': _channels(~layer.finite)}
  shift, stretch = rms(layer.shift), rms(layer.stretch)
  if not layer.updated:
    if layer.seen and max(shift, stretch) > FAR / 5:
      yield 'not_updated', {}
  elif max(shift, stretch) > FAR:
    yield 'gap', {'shift': shift, 'factor': 2**stretch}
  elif (far := _far(layer)).any():
    details = {'shift': largest(layer.apart), 'channels': _channels(far)}
    yield 'gap/channel', details
  yield from _momentum_problems(layer, steps)
  if framework is not None:
    usual = EPSILONS[framework]
    if abs(layer.epsilon - usual) > 1e-3 * usual:
      details = {'framework': framework, 'usual': usual}
      yield 'epsilon', details | {'epsilon': layer.epsilon}
  if layer.examples <= 1:
    yield 'one_element' if layer.elements <= 1 else 'one_element/example', {}
  else:
    yield from _channel_problems(layer)


def _momentum_problems(
  layer: Layer, steps: int | None
) -> Iterator[tuple[str, dict[str, Any]]]:
  momentum = layer.momentum
  if momentum < 0.5:
    yield 'momentum/torch', {'momentum': momentum, 'better': 1 - momentum}
  elif steps is not None and not layer.debias:
    share = momentum**steps
    if share > INITIAL_SHARE:
      details = {'momentum': momentum, 'share': share, 'steps': steps}
      yield 'momentum', details | {'better': INITIAL_SHARE ** (1 / steps)}


def _channel_problems(layer: Layer) -> Iterator[tuple[str, dict[str, Any]]]:
  limits = {'dead': MANY, 'exploding': 0, 'small': MANY}
  for name, limit in limits.items():
    channels: Flags = getattr(layer, name)
    share = float(channels.mean())
    if share > limit:
      code = 'scale' if name == 'small' else name
      yield code, {'share': share, 'channels': _channels(channels)}
  share = mean(layer.saturated)
  if share > MANY:
    yield 'saturated', {'share': share}


def feature_problem(dead: Flags) -> dict[str, Any] | None:
  """What to tell of features that do not vary, if they are many."""
  share = float(dead.mean())
  if share <= MANY:
    return None
  return {'share': share, 'channels': _channels(dead)}


def finding(
  layer: str, key: str, details: Mapping[str, Any]
) -> tuple[str, str, str, str]:
  """Level, layer, code and message."""
  code = key.partition('/')[0]
  level = 'error' if code in _ERRORS else 'warning'
  message = _MESSAGES[key].format(layer=layer or 'the norm', **details)
  return level, layer, code, message


def mean(values: Floats) -> float:
  """The mean over the channels that were seen."""
  values = values[~np.isnan(values)]
  return float(values.mean()) if values.size else math.nan


def rms(values: Floats) -> float:
  """The root mean square over the channels that were seen."""
  return math.sqrt(mean(np.abs(values) ** 2))


def largest(values: Floats) -> float:
  """The largest of the channels that were seen."""
  values = values[~np.isnan(values)]
  return float(values.max()) if values.size else math.nan


def _far(layer: Layer) -> Flags:
  """Channels whose running mean is further off than sampling would put it."""
  if not layer.seen:
    return np.zeros(layer.mean.shape, bool)
  far: Flags = layer.apart > FAR_CHANNEL + NOISE / math.sqrt(layer.examples)
  return far


def _channels(chosen: Flags) -> str:
  """Where an array is true: '1, 5, 7 and 3 more'."""
  found = np.argwhere(chosen).tolist()
  told = [str(i[0]) if len(i) == 1 else str(tuple(i)) for i in found[:8]]
  more = f' and {len(found) - 8} more' if len(found) > 8 else ''
  return ', '.join(told) + more
