"""Float64 references in NumPy, straight from the papers' formulas.

A norm is told by its sets: which elements share a mean and a variance. Wu and
He, "Group Normalization" (2018), section 3.1, tell batch, layer, instance and
group norm so. Statistics take two passes. Nothing of normkit is used here.
"""

from collections.abc import Callable
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Reference:
  """A norm by its sets: `y, state = reference(params, state, x, train, where)`.

  Attributes:
    sets: from x's shape to an array of that shape, with a number for each set.
    features: from x's rank to the axes of scale and bias.
    epsilon: added to the variance.
    center: subtract the mean.
  """

  sets: Callable[[tuple[int, ...]], np.ndarray]
  features: Callable[[int], tuple[int, ...]]
  epsilon: float
  center: bool = True
  is_real = False  # complex inputs are taken
  is_masked = True  # with every element masked, zeros come out, then the bias
  gradient_error = 0.0  # of `gradients`, which are exact
  is_derivative = True  # finite differences find the same

  def __call__(self, params, state, x, train, where=None):
    x = wide(x)
    normalized = self.normalized(x, *self.moments(x, where))
    return self.affine(params, normalized), state

  def total(self, values, where=True):
    """The sum of each set, at every element of it."""
    number = self.sets(values.shape)
    sums = np.zeros_like(values)
    for n in np.unique(number):
      sums[number == n] = np.sum(values, where=(number == n) & where)
    return sums

  def moments(self, x, where=None):
    """Mean, variance and size of each set, at every element of it."""
    where = True if where is None else np.asarray(where)
    count = self.total(np.ones(x.shape), where)
    size = np.maximum(count, 1)
    mean = self.total(x, where) / size if self.center else np.zeros_like(x)
    var = self.total(np.abs(x - mean) ** 2, where) / size
    return mean, var, count

  def normalized(self, x, mean, var, count):
    """(x - mean) / sqrt(var + epsilon), zero in a set without elements."""
    return np.where(count > 0, (x - mean) / np.sqrt(var + self.epsilon), 0)

  def affine(self, params, normalized):
    scale = self.expand(params.scale, 1, normalized.ndim)
    return normalized * scale + self.expand(params.bias, 0, normalized.ndim)

  def expand(self, value, default, ndim):
    """One number a feature, in the rank of x."""
    if value is None:
      return default
    return np.expand_dims(wide(value), others(self.features(ndim), ndim))

  def gradients(self, params, x, dy, where=None):
    """The cotangents of x, scale and bias in training, given that of y.

    With n the normalized x, g = dy * scale, N the size of the set of j, sums
    over that set, and [j] one where j counts and zero where it is masked,

      dx_j = (g_j - [j] / N * (sum g + conj(n_j) * Re(sum g * n)))
             / sqrt(var + epsilon),

    without `sum g` in a norm that does not centre.
    """
    x, dy = wide(x), wide(dy)
    mean, var, count = self.moments(x, where)
    n = self.normalized(x, mean, var, count)
    g = dy * self.expand(params.scale, 1, x.ndim)
    through = np.conj(n) * self.total(g * n).real
    if self.center:
      through = through + self.total(g)
    where = True if where is None else np.asarray(where)
    share = where / np.maximum(count, 1)
    dx = np.where(
      count > 0, (g - share * through) / np.sqrt(var + self.epsilon), 0
    )
    axes = others(self.features(x.ndim), x.ndim)
    return dx, np.sum(dy * n, axes).real, np.sum(dy, axes).real


@dataclasses.dataclass(frozen=True)
class BatchReference(Reference):
  """Batch norm: running statistics beside, one number a feature."""

  momentum: float | None = 0.99
  debias: bool = False
  unbiased: bool = False

  def __call__(self, params, state, x, train, where=None):
    x = wide(x)
    if train:
      y, _ = super().__call__(params, state, x, train, where)
      return y, self.updated(state, x, where)
    mean, var = (self.expand(s, None, x.ndim) for s in state[:2])
    normalized = self.normalized(x, mean, var, np.ones(x.shape))
    return self.affine(params, normalized), state

  def batch(self, x, where=None):
    """Mean, stored variance and size of the whole batch for each feature."""
    features = self.features(x.ndim)
    whole = dataclasses.replace(self, sets=lambda s: numbered(s, features))
    first = tuple(slice(None) if a in features else 0 for a in range(x.ndim))
    mean, var, count = (m[first] for m in whole.moments(wide(x), where))
    if self.unbiased:
      var = var * count / np.maximum(count - 1, 1)
    return mean, var, count

  def updated(self, state, x, where):
    """The running statistics, moved for the features that the batch held."""
    mean, var, count = self.batch(x, where)
    held = count > (1 if self.unbiased else 0)
    updates = np.asarray(state.count) + held
    share = self.share(updates)

    def average(old, new):
      return np.where(held, (1 - share) * wide(old) + share * new, wide(old))

    return type(state)(
      average(state.mean, mean), average(state.var, var), updates
    )

  def share(self, updates):
    """The share of the newest among so many updates."""
    if self.momentum is not None and not self.debias:
      return 1 - self.momentum
    keep = 1 if self.momentum is None else self.momentum
    updates = np.maximum(updates, 1)
    weights = np.cumsum(keep ** np.arange(updates.max()))
    return 1 / weights[updates - 1]


def batch_norm(axis=-1, epsilon=1e-5, virtual_batch_size=None, **average):
  """Ioffe and Szegedy 2015: a set for each feature.

  With virtual batches (Hoffer, Hubara and Soudry 2017), one for each of them.
  """

  def features(ndim):
    return positive(axis, ndim)

  def sets(shape):
    kept = features(len(shape))
    if virtual_batch_size is None:
      return numbered(shape, kept)
    first = others(kept, len(shape))[0]
    return numbered(shape, (first, *kept), {first: virtual_batch_size})

  return BatchReference(sets, features, epsilon, **average)


def layer_norm(axis=-1, epsilon=1e-6, center=True, feature_axis=None):
  """Ba, Kiros and Hinton 2016: a set for each index of the axes left."""

  def features(ndim):
    return positive(axis if feature_axis is None else feature_axis, ndim)

  def sets(shape):
    ndim = len(shape)
    return numbered(shape, others(positive(axis, ndim), ndim))

  return Reference(sets, features, epsilon, center)


def rms_norm(axis=-1, epsilon=1e-6, feature_axis=None):
  """Zhang and Sennrich 2019: the sets of layer norm, not centred."""
  return layer_norm(axis, epsilon, False, feature_axis)


def group_norm(num_groups, axis=-1, batch_axis=0, epsilon=1e-6):
  """Wu and He 2018: a set for each example and group of channels."""

  def features(ndim):
    return positive(axis, ndim)

  def sets(shape):
    (channel,) = features(len(shape))
    kept = (*positive(batch_axis, len(shape)), channel)
    return numbered(shape, kept, {channel: shape[channel] // num_groups})

  return Reference(sets, features, epsilon)


def instance_norm(axis=-1, batch_axis=0, epsilon=1e-6):
  """Ulyanov, Vedaldi and Lempitsky 2016: one for each example and channel."""

  def features(ndim):
    return positive(axis, ndim)

  def sets(shape):
    ndim = len(shape)
    return numbered(shape, positive(batch_axis, ndim) + features(ndim))

  return Reference(sets, features, epsilon)


def numbered(shape, axes, divide=None):
  """The same number where indices along `axes`, perhaps divided, agree."""
  number = np.zeros(shape, int)
  for a in axes:
    index = np.indices(shape)[a] // (divide or {}).get(a, 1)
    number = number * shape[a] + index
  return number


def positive(axis, ndim):
  """Axes as sorted, non-negative integers."""
  axes = (axis,) if isinstance(axis, int) else axis
  return tuple(sorted(a % ndim for a in axes))


def others(axes, ndim):
  return tuple(a for a in range(ndim) if a not in axes)


def wide(x):
  """An array as float64 or complex128."""
  return np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)


def weight_norm_reference(v, g=1.0, feature_axes=-1, epsilon=1e-12):
  """Salimans and Kingma 2016, equation 2."""
  axes = [] if feature_axes is None else np.atleast_1d(feature_axes)
  others = tuple(set(range(v.ndim)) - {a % v.ndim for a in axes})
  length = np.sqrt(
    np.sum(np.abs(wide(v)) ** 2, axis=others, keepdims=True) + epsilon
  )
  return wide(v) / length * (np.expand_dims(g, others) if np.ndim(g) else g)


def weight_standardize_reference(
  v, gain=1.0, feature_axes=-1, scaled=False, epsilon=None
):
  """Qiao and others 2019, equations 2 to 4; scaled, Brock and others 2021.

  Filter by filter: each index of the feature axes has its own.
  """
  axes = [] if feature_axes is None else np.atleast_1d(feature_axes)
  axes = [a % v.ndim for a in axes]
  v, w = wide(v), np.zeros(v.shape, wide(v).dtype)
  if epsilon is None:
    epsilon = 1e-4 if scaled else 1e-10
  number = numbered(v.shape, axes)
  for n in np.unique(number):
    d = v[number == n]
    d = d - np.sum(d) / d.size
    power = np.sum(np.abs(d) ** 2)  # of the N elements: N times the variance
    root = max(power, epsilon) if scaled else power / d.size + epsilon
    w[number == n] = d / np.sqrt(root) if root else 0
  if np.ndim(gain):
    gain = np.expand_dims(wide(gain), others(axes, v.ndim))
  return w * gain


def spectral_norm_reference(w, u, n_steps=1, epsilon=1e-12):
  """Miyato and others 2018, algorithm 1: y, u, v and sigma."""
  matrix, u = wide(w).reshape(-1, w.shape[-1]), wide(u)[0]
  for _ in range(n_steps):
    v = matrix @ u
    v = v / np.sqrt(np.sum(v**2) + epsilon)
    u = v @ matrix
    u = u / np.sqrt(np.sum(u**2) + epsilon)
  sigma = v @ matrix @ u
  return wide(w) / sigma, u[None], v[:, None], sigma
