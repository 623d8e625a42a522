"""Activations in the primitives that kernels lower, on the oldest JAX too.

All of these are elementwise. Mosaic GPU has neither rules of derivatives
(`jax.custom_jvp`) nor the sums that differentiation makes.
"""

from collections.abc import Callable, Iterator
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from normkit._types import Array, Implementation, has_hash

Activation = Callable[[Array], Array]
CALLS = 'jit', 'pjit', 'closed_call', 'core_call', 'custom_jvp_call'


def _power(x: Array, y: int) -> Array:
  found = x if abs(y) == 1 else lax.integer_pow(x, abs(y))
  return 1 / found if y < 0 else found


# What differentiation makes, and what Mosaic GPU lowers in part.
OTHERS: dict[str, Callable[..., Array]] = {
  'add_any': lax.add,
  'one_minus_square': lambda x: 1 - x * x,
  'stop_gradient': lambda x: x,
  'integer_pow': _power,
}
LOWERED = {
  *OTHERS,
  *('abs', 'add', 'and', 'div', 'max', 'min', 'mul', 'neg', 'sub'),
  *('exp', 'exp2', 'log', 'logistic', 'rsqrt', 'square', 'tanh'),
  *('eq', 'ge', 'gt', 'le', 'lt', 'ne', 'select_n'),
  *('broadcast_in_dim', 'convert_element_type'),
}
BOTH = 'or', 'not', 'sqrt', 'log1p', 'pow', 'sin', 'cos', 'clamp', 'floor'
MORE: dict[Implementation, set[str]] = {
  'triton': {*BOTH, 'is_finite', 'sign', 'expm1'},
  'mosaic_tpu': {*BOTH, 'is_finite', 'round'},
}


def is_lowered(run: Activation, by: Implementation = 'mosaic_gpu') -> bool:
  """Whether a kernel can compute it and its derivative.

  It has a hash, then, and closes over no array.
  """
  return has_hash(run) and _is_lowered(run, by)


@functools.lru_cache(256)
def _is_lowered(run: Activation, by: Implementation) -> bool:
  tile = jax.ShapeDtypeStruct((8, 128), jnp.float32)
  lowered = LOWERED | MORE.get(by, set())
  try:
    each = [
      jax.make_jaxpr(f)(tile) for f in (run, functools.partial(_slope, run))
    ]
  except Exception:  # of a function that is for other shapes
    return False
  return all(
    not closed.consts and {*_primitives(closed.jaxpr)} <= lowered
    for closed in each
  )


def _primitives(jaxpr: Any) -> Iterator[str]:
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in CALLS:
      yield from _primitives(_inner(eqn).jaxpr)
    else:
      yield eqn.primitive.name


def value(run: Activation, y: Array) -> Array:
  """Of y, a tile in a kernel."""
  return _run(run, y)


def slope(run: Activation, y: Array) -> Array:
  """The derivative there."""
  return _run(functools.partial(_slope, run), y)


def with_slope(run: Activation, y: Array) -> list[Array]:
  """Both."""
  return _run_all(functools.partial(_with_slope, run), y)


def _with_slope(run: Activation, y: Array) -> tuple[Array, Array]:
  found: tuple[Array, Array] = jax.jvp(run, (y,), (jnp.ones_like(y),))
  return found


def _slope(run: Activation, y: Array) -> Array:
  return _with_slope(run, y)[1]


def _run(run: Activation, y: Array) -> Array:
  (found,) = _run_all(run, y)
  return found


def _run_all(run: Callable[[Array], Any], y: Array) -> list[Array]:
  closed = jax.make_jaxpr(run)(jax.ShapeDtypeStruct(y.shape, y.dtype))
  return [jnp.broadcast_to(found, y.shape) for found in _evaluate(closed, y)]


def _evaluate(closed: Any, *given: Any) -> list[Any]:
  """Equation by equation, calls unfolded."""
  jaxpr = closed.jaxpr
  known = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  known |= dict(zip(jaxpr.invars, given, strict=True))

  def read(atom: Any) -> Any:
    return atom.val if hasattr(atom, 'val') else known[atom]

  for eqn in jaxpr.eqns:
    values = map(read, eqn.invars)
    if eqn.primitive.name in CALLS:
      found = _evaluate(_inner(eqn), *values)
    elif other := OTHERS.get(eqn.primitive.name):
      found = [other(*values, **eqn.params)]
    else:
      found = eqn.primitive.bind(*values, **eqn.params)
      found = found if eqn.primitive.multiple_results else [found]
    known |= dict(zip(eqn.outvars, found, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _inner(eqn: Any) -> Any:
  params = eqn.params
  return params['call_jaxpr' if 'call_jaxpr' in params else 'jaxpr']
