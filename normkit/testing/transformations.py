"""A norm under the transformations of JAX, and how often it is traced."""

from collections.abc import Callable
import copy
import functools
from typing import Any

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
  start,
  times,
)
from normkit.testing._compare import assert_close


def check_transformations(
  transform: Norm,
  x: ArrayLike,
  *,
  where: ArrayLike | None = None,
  rtol: float | None = None,
  atol: float | None = None,
) -> None:
  """Checks for the same values eagerly and under jit, vmap and pmap.

  Under `jax.jit` the transform is closed over, and passed as a static argument.
  `jax.pmap` is left out where there is one device.

  Args:
    transform, x, where, rtol, atol: as `check_norm` takes them.

  Raises:
    AssertionError: if one of them raises, or differs from the eager values.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> from normkit import testing
    >>> testing.check_transformations(nk.RMSNorm(), jnp.ones((4, 6)))
  """
  x = jnp.asarray(x)
  params, state = start(transform, x)
  xs = np.stack([x, times(-1, x)])
  static = jax.jit(call, static_argnums=(0, 1))
  for train in (True, False):
    apply = applied(transform, train)
    ways: dict[str, Apply] = {
      'jit': _each(jax.jit(apply)),
      'jit with the transform as a static argument': _each(
        functools.partial(static, transform, train)
      ),
      'vmap': jax.jit(_mapped(jax.vmap, apply)),
    }
    if jax.local_device_count() >= len(xs):
      ways['pmap'] = _mapped(jax.pmap, apply)
    eager = _each(apply)(params, state, xs, where)
    for name, way in ways.items():
      with doing(transform, f'{name} with train={train}'):
        assert_close(way(params, state, xs, where), eager, rtol, atol)


def check_traces(
  transform: Norm, x: ArrayLike, *, where: ArrayLike | None = None
) -> None:
  """Checks that a second call is not traced again, nor one of an equal copy.

  Args:
    transform, x, where: as `check_norm` takes them.

  Raises:
    AssertionError: if `jax.jit` traces more than once: the second call gets the
      state of the first, the third a copy of the transform.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> from normkit import testing
    >>> testing.check_traces(nk.BatchNorm(), jnp.ones((4, 6)))
  """
  x = jnp.asarray(x)
  params, first = start(transform, x)
  traces = []

  def traced(transform: Norm, train: bool, *args: Any) -> dict[str, Any]:
    traces.append(transform)
    return call(transform, train, *args)

  function = jax.jit(traced, static_argnums=(0, 1))
  calls = {
    'the first call': transform,
    'a second call, with the state of the first': transform,
    'a call with an equal copy as static argument': copy.copy(transform),
  }
  for train in (True, False):
    traces.clear()
    state = first
    for name, same in calls.items():
      with doing(transform, f'{name}, with train={train}'):
        out = function.eval_shape(same, train, params, state, x, where)
        state = out['state']
        if len(traces) > 1:
          raise AssertionError('jax.jit traced it again.')


def _each(apply: Apply) -> Apply:
  """Maps `apply` over the first axis of x, in a Python loop."""

  def loop(params: Any, state: Any, xs: Array, where: Any) -> Any:
    outs = [apply(params, state, jax.device_put(x), where) for x in xs]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *outs)

  return loop


def _mapped(transformation: Callable[..., Any], apply: Apply) -> Apply:
  """Maps `apply` over the first axis of x with `jax.vmap` or `jax.pmap`."""

  def mapped(params: Any, state: Any, xs: Array, where: Any) -> Any:
    return transformation(lambda x: apply(params, state, x, where))(xs)

  return mapped
