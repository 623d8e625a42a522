"""Norms in float64: what a device's numbers are held to."""

from typing import Any

import numpy as np

from benchmarks import speed


def error(actual: Any, wanted: np.ndarray) -> float:
  difference = np.abs(np.asarray(actual, np.float64) - wanted)
  return float(difference.max() / max(np.abs(wanted).max(), 1))


def exact(case: Any, arrays: speed.Arrays) -> list[np.ndarray]:
  """y and the gradients of sum(y * dy), of a `device.Case`."""
  x, scale, bias, dy = (np.asarray(a, np.float64) for a in arrays)
  if case.gate:
    return _gated(case, x, scale, bias, dy)
  if case.more in ('residual', 'silu'):
    return _added(case, speed.Arrays(2 * x, scale, bias, dy))
  groups = case.groups or 1
  sets = len(x) if case.groups else x.size // x.shape[-1]
  split = sets, -1, groups, x.shape[-1] // groups

  def mean(values):
    parts = values.reshape(split).mean((1, 3), keepdims=True)
    return np.broadcast_to(parts, values.reshape(split).shape).reshape(x.shape)

  x = x - mean(x) if case.center else x
  root = 1 / np.sqrt(mean(x * x) + speed.EPSILON)
  normalized, h = x * root, dy * scale
  dx = h - normalized * mean(h * normalized)
  dx = (dx - mean(h) if case.center else dx) * root
  whole = (1,) * (x.ndim - scale.ndim) + scale.shape
  rows = tuple(a for a, n in enumerate(whole[:-1]) if n == 1)
  y = normalized * scale
  dscale, dbias = (
    a.sum(rows).reshape(scale.shape) for a in (dy * normalized, dy)
  )
  dbias = dbias if case.center else 0 * bias
  y = y + bias if case.center else y
  return [y, dx, dscale, dbias]


def _silu(x: Any) -> tuple[Any, Any]:
  """It, and its derivative."""
  share = 1 / (1 + np.exp(-x))
  return x * share, share * (1 + x * (1 - share))


def _added(case: Any, arrays: speed.Arrays) -> list[Any]:
  """Of x as its own residual; the sum is given."""
  inner, slope = case._replace(more=None), 1.0
  y = exact(inner, arrays)[0]
  if case.more == 'silu':
    y, slope = _silu(y)
  _, dx, *rest = exact(inner, arrays._replace(dy=arrays.dy * slope))
  return [y, 2 * dx, *rest]


def _gated(case: Any, x: Any, scale: Any, gate: Any, dy: Any) -> list[Any]:
  """By SiLU; the gradient of the gate is in the place of that of the bias."""
  inner, bias = case._replace(gate=None), 0 * scale
  factor, slope = _silu(gate)
  if case.gate == 'last':
    given = speed.Arrays(x, scale, bias, dy * factor)
    y, dx, dscale, _ = exact(inner, given)
    return [y * factor, dx, dscale, dy * y * slope]
  y, dz, dscale, _ = exact(inner, speed.Arrays(x * factor, scale, bias, dy))
  return [y, dz * factor, dscale, dz * x * slope]
