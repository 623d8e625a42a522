"""What an inspection finds: layers, weights before norms, advice."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from normkit.tools import _views
from normkit.tools._advice import EXPLODING, SMALL, Flags, Floats, rms
from normkit.tools._stateless import Norm

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
    evaluated: whether it ran in evaluation mode, each time.

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
  evaluated: bool

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
    """Channels without a positive output, or whose inputs do not vary.

    Where all scales are zero, as the last ones of residual blocks begin, no
    channel is judged by its outputs.
    """
    begins = self.scale is not None and not self.scale.any()
    negative: Flags = (self.positive == 0) & (not begins)
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
    """Channels with a scale under a hundredth of the layer's, if not all 0."""
    if self.scale is None or not self.scale.any():
      return np.zeros(self.mean.shape, bool)
    return np.abs(self.scale) <= SMALL * rms(self.scale)


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
    norms: layer, RMS, group and instance norms, in the order of the program.

  Examples:
    >>> from normkit.tools.inspect import Inspection
    >>> print(Inspection(layers=(), weights=(), advice=[]))
    layer  elements  mean off  at most  deviation off  dead  exploding  ...
    nothing seems wrong
  """

  layers: tuple[Layer, ...]
  weights: tuple[Weight, ...]
  advice: list[Finding]
  norms: tuple[Norm, ...] = ()

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
