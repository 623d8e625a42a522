"""Assertions about outputs and states, of norms or of whole models."""

from typing import Any

import numpy as np

from normkit import _types
from normkit._types import ArrayLike, Axes
from normkit.testing._compare import assert_equal, wide


def assert_normalized(
  y: ArrayLike,
  axis: Axes,
  *,
  where: ArrayLike | None = None,
  mean: float | None = 0.0,
  var: float = 1.0,
  atol: float = 1e-3,
) -> None:
  """Asserts that y has a mean and a variance over some axes.

  Args:
    y: array of any shape, real or complex.
    axis: the axes over which y is normalized, an integer or several.
    where: boolean mask that broadcasts to the shape of y; sets without an
      element are passed over. None counts all.
    mean: the mean of each set. None asserts nothing about it and takes the
      variance about zero, as RMS norm does.
    var: the biased variance of each set.
    atol: how far both may be off.

  Raises:
    AssertionError: if a set has another mean or variance, or none has an
      element.

  Examples:
    >>> import jax.numpy as jnp
    >>> from normkit import testing
    >>> testing.assert_normalized(jnp.array([[-1.0, 1.0], [1.0, -1.0]]), -1)
  """
  values = wide(y)
  counted = np.broadcast_to(True if where is None else where, values.shape)
  axes = _types.check_axes(axis, values.ndim)
  count = counted.sum(axes, keepdims=True)
  if not count.any():
    raise AssertionError(
      f'y of shape {values.shape} has no element to normalize over '
      f'axis={axis}, masks aside.'
    )

  def average(values: Any) -> Any:
    total = values.sum(axes, keepdims=True, where=counted)
    return total / np.maximum(count, 1)

  center = average(values) if mean is not None else np.zeros(count.shape)
  spread = average(np.abs(values - center) ** 2)
  for name, found, expected in (
    ('mean', center, mean),
    ('variance', spread, var),
  ):
    if expected is None:
      continue
    error = np.where(count > 0, np.abs(found - expected), 0)
    if not np.all(error <= atol):
      worst = np.unravel_index(np.argmax(error), error.shape)
      raise AssertionError(
        f'y of shape {values.shape} is not normalized over axis={axis}: its '
        f'{name} is {found[worst]:.6g} at index {tuple(map(int, worst))}, not '
        f'{expected} to within {atol}.'
      )


def assert_state_unchanged(before: Any, after: Any) -> None:
  """Asserts that two states are the same to the last bit.

  Args:
    before: any pytree of arrays, such as a norm's state or a model's variables.
    after: what it became.

  Raises:
    AssertionError: if the structure, a shape, a dtype or a value differs; the
      message names the leaf.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> from normkit import testing
    >>> bn, x = nk.BatchNorm(), jnp.ones((4, 6))
    >>> params, before = bn.init(x)
    >>> _, after = bn.apply(params, before, x, train=False)
    >>> testing.assert_state_unchanged(before, after)
  """
  try:
    assert_equal(after, before)
  except AssertionError as error:
    raise AssertionError(f'the state changed: {error}') from error
