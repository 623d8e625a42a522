"""Float64 references of the wider family, from the papers' formulas.

Gradients are central differences of the reference itself, in float64.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import numpy as np
from reference import numbered, wide

STEP = 1e-6


def mean_of(values, sets, where=None):
  """The mean of each set at every element of it, and its size."""
  where = np.broadcast_to(True if where is None else where, values.shape)
  mean, count = np.zeros_like(values), np.zeros(values.shape)
  for n in np.unique(sets):
    of = sets == n
    count[of] = np.sum(of & where)
    if np.any(of & where):
      mean[of] = np.mean(values[of & where])
  return mean, count


def moments_of(x, sets, where=None):
  mean, count = mean_of(x, sets, where)
  var, _ = mean_of(np.abs(x - mean) ** 2, sets, where)
  return mean, var, count


def channels(x):
  return numbered(x.shape, (x.ndim - 1,))


@dataclasses.dataclass(frozen=True)
class Family:
  """A norm by its formula: `formula(params, state, x, train, where)`.

  Attributes:
    formula: gives y and the new state.
    state: of a parameter's shape, the state at first; None for none.
    is_real: complex inputs are refused.
    is_masked: with every element masked zeros come out, then the bias.
    is_derivative: the gradient is what finite differences find.
  """

  formula: Callable[..., tuple[Any, Any]]
  state: Callable[..., Any] | None = None
  is_real: bool = True
  is_masked: bool = True
  gradient_error: float = 1e-7
  is_derivative: bool = True

  def __call__(self, params, state, x, train, where=None):
    params = type(params)(*(None if p is None else wide(p) for p in params))
    where = None if where is None else np.asarray(where)
    with np.errstate(invalid='ignore', divide='ignore'):
      return self.formula(params, state, wide(x), train, where)

  def gradients(self, params, x, dy, where=None):
    """Of x, as JAX has them for complex numbers, and of each parameter."""
    x, dy = wide(x), wide(dy)
    params = [None if p is None else wide(p) for p in params]

    def loss(x, *changed):
      state = self.state(x) if self.state else None
      y, _ = self.formula(self.params(*changed), state, x, True, where)
      return np.sum(dy * y).real

    def along(index, direction):
      args = [x, *params]
      result = np.zeros(args[index].shape)
      for at in np.ndindex(result.shape):
        ends = []
        for sign in (1, -1):
          moved = args[index].copy()
          moved[at] += sign * direction * STEP
          ends.append(loss(*args[:index], moved, *args[index + 1 :]))
        result[at] = (ends[0] - ends[1]) / (2 * STEP)
      return result

    where = None if where is None else np.asarray(where)
    dx = along(0, 1)
    if np.iscomplexobj(x):
      dx = dx - 1j * along(0, 1j)
    return dx, *(
      0 if p is None else along(i + 1, 1) for i, p in enumerate(params)
    )

  def params(self, *values):
    return Values(*values)


class Values(tuple):
  """Parameters in the order of a transform's tuple."""

  def __new__(cls, *values):
    return super().__new__(cls, values)


def affine(y, scale, bias):
  y = y if scale is None else y * scale
  return y if bias is None else y + bias


def filter_response(epsilon=1e-6, is_real=True):
  """Singh and Krishnan 2020, equations 1 to 3."""

  def formula(params, state, x, train, where):
    scale, bias, threshold = params
    sets = numbered(x.shape, (0, x.ndim - 1))
    square, count = mean_of(np.abs(x) ** 2, sets, where)
    y = np.where(count > 0, x / np.sqrt(square + epsilon), 0)
    y = affine(y, scale, bias)
    return y if threshold is None else np.maximum(y, threshold), state

  return Family(formula, is_real=is_real)


def global_response(epsilon=1e-6, channels=(-1,)):
  """Woo and others 2023, algorithm 1, channels without elements left out."""

  def formula(params, state, x, train, where):
    valid = np.broadcast_to(True if where is None else where, x.shape)
    axes = tuple(a % x.ndim for a in channels)
    places = tuple(a for a in range(1, x.ndim) if a not in axes)
    known = np.where(valid, x, 0)
    length = np.sqrt(np.sum(np.abs(known) ** 2, places, keepdims=True))
    held = valid.any(places, keepdims=True)
    number = np.maximum(held.sum(axes, keepdims=True), 1)
    mean = length.sum(axes, keepdims=True) / number
    response = length / (mean + epsilon)
    shape = [n if a in axes else 1 for a, n in enumerate(x.shape)]
    params = (None if p is None else p.reshape(shape) for p in params)
    return x + affine(x * response, *params), state

  return Family(formula, is_real=False, is_masked=False)


def dyt():
  """Zhu and others 2025, equation 4."""

  def formula(params, state, x, train, where):
    alpha, scale, bias = params
    return affine(np.tanh(alpha * x), scale, bias), state

  return Family(formula, is_masked=False)


def derf():
  """Chen and others 2025, equation 10."""

  def formula(params, state, x, train, where):
    alpha, shift, scale, bias = params
    y = np.vectorize(math.erf)(alpha * x + shift)
    return affine(y, scale, bias), state

  return Family(formula, is_masked=False)


def scale_norm(epsilon=1e-12, axis=-1):
  """Nguyen and Salazar 2019, equation 4."""

  def formula(params, state, x, train, where):
    valid = np.broadcast_to(True if where is None else where, x.shape)
    square = np.sum(np.abs(x) ** 2, axis, where=valid, keepdims=True)
    held = valid.any(axis, keepdims=True)
    y = np.where(held, x / np.sqrt(square + epsilon), 0)
    return affine(y, params[0], params[1]), state

  return Family(formula, is_real=False)


def silu(x):
  return x / (1 + np.exp(-x))


def gated(x, gate, scale, last=True, group_size=None, epsilon=1e-6, where=None):
  """Dao and Gu 2024, section 7.2: Mamba 2's, or the gate last."""
  factor = np.ones_like(x) if gate is None else silu(gate)
  z = x if last else x * factor
  size = group_size or x.shape[-1]
  sets = numbered(x.shape, range(x.ndim), {x.ndim - 1: size})
  square, count = mean_of(z**2, sets, where)
  y = affine(np.where(count > 0, z / np.sqrt(square + epsilon), 0), scale, None)
  return y * factor if last else y


def gated_rms_norm(has_gate=True, **options):
  """The same where x is the gate too, or without one."""

  def formula(params, state, x, train, where):
    gate = x if has_gate else None
    return gated(x, gate, params[0], where=where, **options), state

  return Family(formula)


def evonorm_s0(num_groups, epsilon=1e-5):
  """Liu and others 2020, table 2, EvoNorm-S0."""

  def formula(params, state, x, train, where):
    v, scale, bias = params
    divide = {x.ndim - 1: x.shape[-1] // num_groups}
    sets = numbered(x.shape, (0, x.ndim - 1), divide)
    _, var, count = moments_of(x, sets, where)
    y = x / (1 + np.exp(-v * x))
    y = np.where(count > 0, y / np.sqrt(var + epsilon), 0)
    return affine(y, scale, bias), state

  return Family(formula)


def moved(state, mean, var, count, share):
  held = count > 0
  pairs = (state.mean, mean), (state.var, var)
  return type(state)(
    *(
      np.where(held, (1 - share) * wide(a) + share * b, wide(a))
      for a, b in pairs
    ),
    np.asarray(state.count) + held,
  )


def one_a_channel(*values):
  return [v.reshape(-1, v.shape[-1])[0] for v in values]


def evonorm_b0(momentum=0.99, epsilon=1e-5):
  """Liu and others 2020, table 2, EvoNorm-B0."""

  def formula(params, state, x, train, where):
    v, scale, bias = params
    mean, var, count = moments_of(x, channels(x), where)
    if train:
      now = one_a_channel(mean, var, count)
      state = moved(state, *now, 1 - momentum) if state else None
    else:
      var, count = wide(state.var), np.ones(1)
    _, own, _ = moments_of(x, numbered(x.shape, (0, x.ndim - 1)), where)
    least = np.maximum(np.sqrt(var + epsilon), v * x + np.sqrt(own + epsilon))
    return affine(np.where(count > 0, x / least, 0), scale, bias), state

  return Family(formula)


@dataclasses.dataclass(frozen=True)
class Renorm(Family):
  """Batch renorm, whose gradients take r and d for constants."""

  corrections: Callable[..., Any] = tuple
  is_derivative: bool = False

  def gradients(self, params, x, dy, where=None):
    held = self.corrections(wide(x), None, where)
    formula = functools.partial(self.formula, held=held)
    return Family(formula).gradients(params, x, dy, where)


def batch_renorm(r_max, d_max, momentum=0.99, epsilon=1e-5):
  """Ioffe 2017, algorithm 1."""

  def corrections(x, state, where):
    mean, var, _ = moments_of(x, channels(x), where)
    old_mean, old_var = (0.0, 1.0) if state is None else map(wide, state[:2])
    std = np.sqrt(old_var + epsilon)
    r = np.clip(np.sqrt(var + epsilon) / std, 1 / r_max, r_max)
    return r, np.clip((mean - old_mean) / std, -d_max, d_max)

  def formula(params, state, x, train, where, held=None):
    if not train:
      y = (x - wide(state.mean)) / np.sqrt(wide(state.var) + epsilon)
      return affine(y, *params), state
    r, d = held or corrections(x, state, where)
    mean, var, count = moments_of(x, channels(x), where)
    y = (x - mean) / np.sqrt(var + epsilon) * r + d
    if state is not None:
      now = one_a_channel(mean, var, count)
      state = moved(state, *now, 1 - momentum)
    return affine(np.where(count > 0, y, 0), *params), state

  if (r_max, d_max) == (1, 0):
    return Family(formula)
  return Renorm(formula, corrections=corrections)


def streaming(momentum=0.99, epsilon=1e-5):
  """Running moments of weighted elements, this batch's among them."""

  def formula(params, state, x, train, where):
    batch, var, count = moments_of(x, channels(x), where)
    mean, spread = (0.0, 1.0) if state is None else map(wide, state[:2])
    held = np.ones(1)
    if train:
      share = np.where(count > 0, 1 - momentum, 0)
      together = (1 - share) * mean + share * batch
      square = (1 - share) * (spread + np.abs(mean) ** 2) + share * (
        var + np.abs(batch) ** 2
      )
      mean, spread, held = together, square - np.abs(together) ** 2, count
      if state is not None:
        new = one_a_channel(mean, spread, count > 0)
        state = type(state)(*new[:2], np.asarray(state.count) + new[2])
    y = np.where(held > 0, (x - mean) / np.sqrt(spread + epsilon), 0)
    return affine(y, *params), state

  return Family(formula, is_real=False)


def whitening(group_size, n_steps=5, momentum=0.9, epsilon=1e-5):
  """Huang and others 2019, algorithm 1."""

  def formula(params, state, x, train, where):
    mean, _, count = moments_of(x, channels(x), where)
    mean, count = one_a_channel(mean, count)
    groups = x.shape[-1] // group_size
    if train:
      matrices = newton(x, mean, count, where)
      if state is not None:
        state = updated(state, mean, matrices, count)
    else:
      mean, matrices = wide(state.mean), wide(state.whitening)
    d = x - mean if where is None else np.where(where, x - mean, 0)
    parts = d.reshape(*x.shape[:-1], groups, group_size)
    y = np.stack(
      [parts[..., g, :] @ matrices[g].T for g in range(groups)], -2
    ).reshape(x.shape)
    return affine(y, *params), state

  def newton(x, mean, count, where):
    d = x - mean if where is None else np.where(where, x - mean, 0)
    d = d.reshape(-1, x.shape[-1]) / np.sqrt(np.maximum(count, 1))
    matrices = []
    for first in range(0, x.shape[-1], group_size):
      part = d[:, first : first + group_size]
      covariance = part.T @ part + epsilon * np.eye(group_size)
      p = np.eye(group_size)
      for _ in range(n_steps):
        p = (3 * p - p @ p @ p @ covariance / np.trace(covariance)) / 2
      matrices.append(p / np.sqrt(np.trace(covariance)))
    return np.stack(matrices)

  def updated(state, mean, matrices, count):
    held = count > 0
    whole = held.reshape(-1, group_size).all(1)[:, None, None]
    average = [
      np.where(h, momentum * wide(old) + (1 - momentum) * new, wide(old))
      for old, new, h in zip(
        state[:2], (mean, matrices), (held, whole), strict=True
      )
    ]
    return type(state)(*average, np.asarray(state.count) + held.any())

  return Family(formula)
