"""Values of a norm: those of a reference, whatever masked elements hold."""

from collections.abc import Callable
import functools
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from normkit._types import Array, ArrayLike
from normkit.norm import Norm
from normkit.testing._calls import (
  Apply,
  applied,
  call,
  doing,
  loss_of,
  start,
  times,
)
from normkit.testing._compare import (
  assert_close,
  assert_equal,
  assert_finite,
  wide,
)

Reference: TypeAlias = Callable[..., tuple[Any, Any]]


def check_mask(
  transform: Norm,
  x: ArrayLike,
  *,
  where: ArrayLike | None = None,
  rtol: float | None = None,
  atol: float | None = None,
) -> None:
  """Checks that masked values reach nothing but their own outputs.

  Every second masked value is changed, to NaN and infinity too: no other
  output, no state and no gradient changes, and where the cotangent of a masked
  output is zero, so is the gradient.

  Args:
    transform, x, rtol, atol: as `check_norm` takes them.
    where: boolean mask that broadcasts to the shape of x and leaves some out.
      None makes one.

  Raises:
    AssertionError: if a masked value leaks.
    ValueError: if `where` masks nothing.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> from normkit import testing
    >>> testing.check_mask(nk.LayerNorm(), jnp.ones((4, 6)))
  """
  x = jnp.asarray(x)
  params, state = start(transform, x)
  if where is None:
    where = np.random.default_rng(0).random(x.shape) < 0.7
  masked = np.flatnonzero(~np.broadcast_to(where, x.shape))
  if not masked.size:
    raise ValueError(
      f'where of shape {np.shape(where)} masks nothing: there is nothing to '
      'check. Leave some elements out, or give None for a mask made here.'
    )
  changed = np.zeros(x.shape, bool)
  changed.flat[masked[::2]] = True

  def visible(apply: Apply, params: Any, x: Array) -> tuple[Array, Any]:
    out = apply(params, state, x, where)
    out['y'] = jnp.where(changed, 0, out['y'])
    return loss_of(out), out

  for train in (True, False):
    loss = functools.partial(visible, applied(transform, train))
    function = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    results = []
    for value in (0.0, -3.0, math.nan, math.inf):
      what = f'with {value} in masked elements and train={train}'
      with doing(transform, what):
        given = np.where(changed, np.asarray(value, x.dtype), x)
        (dparams, dx), out = function(params, given)
        out |= {'gradient of params': dparams, 'gradient of x': dx}
        assert_finite(out)
        results.append(out)
        assert_close(out, results[0], rtol, atol)
        leak = np.where(changed, dx, np.zeros_like(dx))
        name = 'gradient of masked x'
        assert_equal({name: leak}, {name: np.zeros_like(leak)})


def check_normalized(
  transform: Norm, x: ArrayLike, *, where: ArrayLike | None = None
) -> None:
  """Checks that y does not grow with x, whatever axes it is normalized over.

  Args:
    transform, x, where: as `check_norm` takes them.

  Raises:
    AssertionError: if in training y of an x sixteen times as large is not of
      about the same size, to a factor of two.

  Examples:
    >>> import jax, normkit as nk
    >>> from normkit import testing
    >>> x = jax.random.normal(jax.random.key(0), (4, 6))
    >>> testing.check_normalized(nk.LayerNorm(), x)
  """
  x = jnp.asarray(x)
  params, state = start(transform, x)
  counted = np.broadcast_to(True if where is None else where, x.shape)

  def size(factor: float) -> float:
    larger = times(factor, x)
    y = call(transform, True, params, state, larger, where)['y']
    return float(np.sqrt(np.mean(np.abs(wide(y)[counted]) ** 2)))

  with doing(transform, 'outputs of 16 x and of 256 x with train=True'):
    small, large = size(16.0), size(256.0)
    if not small / 2 <= large <= 2 * small:
      raise AssertionError(
        f'the second are {large / max(small, 1e-30):.3g} times as large, so y '
        'is not normalized over any axis. Divide by a statistic of x that '
        'grows as x does.'
      )


def check_values(
  transform: Norm,
  x: ArrayLike,
  reference: Reference,
  *,
  where: ArrayLike | None = None,
  rtol: float | None = None,
  atol: float | None = None,
) -> None:
  """Checks y and the state against a reference, over two steps and in eval.

  Args:
    transform, x, where, rtol, atol: as `check_norm` takes them.
    reference: called as `reference(params, state, x, train, where)`, returns
      `(y, state)` in any precision, with the structure of the transform's.

  Raises:
    AssertionError: if a value differs.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> from normkit import testing
    >>> def reference(params, state, x, train, where):
    ...   y = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
    ...   return y * params.scale[None], state
    >>> testing.check_values(nk.RMSNorm(), jnp.ones((4, 6)), reference)
  """
  x = jnp.asarray(x)
  params, state = start(transform, x)
  steps = (x, True), (times(-1, x), True), (x, False)
  for number, (step, train) in enumerate(steps):
    with doing(transform, f'step {number} with train={train}'):
      y, expected = reference(params, state, step, train, where)
      out = call(transform, train, params, state, step, where)
      assert_close(out, {'y': y, 'state': expected}, rtol, atol)
      state = out['state']
