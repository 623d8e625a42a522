"""Gradients of a norm, held against finite differences."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import test_util
import jax.numpy as jnp
import numpy as np

from normkit._types import Array, ArrayLike
from normkit.norm import Norm
from normkit.testing._calls import (
  Apply,
  applied,
  doing,
  loss_of,
  start,
  times,
)
from normkit.testing._compare import (
  assert_close,
  assert_finite,
  assert_forms,
  leaves,
)


def check_gradients(
  transform: Norm,
  x: ArrayLike,
  *,
  where: ArrayLike | None = None,
  rtol: float | None = None,
  atol: float | None = None,
) -> None:
  """Checks the gradients with respect to parameters and x.

  They are finite, none of a parameter is zero throughout, they are the same
  under `jax.checkpoint`, and agree with finite differences, forward and
  reverse; those are taken in float32 or wider, and left out for a transform
  whose output is narrower even so. The loss counts y and the new state.

  Args:
    transform, x, where: as `check_norm` takes them; parameters are
      floating-point or complex.
    rtol, atol: tolerances under checkpoint, as `check_norm` takes them.

  Raises:
    AssertionError: if a gradient is missing, not finite, or wrong, or if a
      parameter changes nothing.

  Examples:
    >>> import jax, normkit as nk
    >>> from normkit import testing
    >>> x = jax.random.normal(jax.random.key(0), (4, 6))
    >>> testing.check_gradients(nk.LayerNorm(), x)
  """
  x = jnp.asarray(x)
  params, state = start(transform, x)
  wide = _start_wide(transform, x)

  def loss(apply: Apply, params: Any, state: Any, x: Array) -> Array:
    return loss_of(apply(params, state, x, where))

  for train in (True, False):
    apply = applied(transform, train)
    function = functools.partial(loss, apply)
    gradients = jax.jit(jax.value_and_grad(function, (0, 2)))
    with doing(transform, f'gradients with train={train}'):
      found = _named(gradients(params, state, x)[1])
      assert_forms(found, _named((params, x)))
      assert_finite(found)
      _check_reached(found)
    with doing(transform, f'gradients under checkpoint with train={train}'):
      again = jax.jit(jax.grad(jax.checkpoint(function), (0, 2)))
      assert_close(_named(again(params, state, x)), found, rtol, atol)

    out = jax.eval_shape(apply, *wide, where)
    if jnp.finfo(out['y'].dtype).bits < 32:
      continue
    with doing(transform, f'derivatives with train={train}'):
      _check_differences(function, gradients, *wide)


def _check_differences(
  loss: Callable[..., Array],
  gradients: Callable[..., tuple[Array, Any]],
  params: Any,
  state: Any,
  x: Array,
) -> None:
  """Compares derivatives, forward and reverse, with finite differences."""

  def value(params: Any, x: Array) -> Array:
    return gradients(params, state, x)[0]

  def pull(params: Any, x: Array) -> tuple[Array, Callable[[Array], Any]]:
    value, found = gradients(params, state, x)
    return value, lambda dy: jax.tree.map(lambda g: times(dy, g), found)

  @jax.jit
  def push(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return jax.jvp(lambda p, x: loss(p, state, x), primals, tangents)

  step = float(jnp.finfo(x.dtype).eps) ** (1 / 3)
  limits = {'eps': step, 'atol': 400 * step**2, 'rtol': 400 * step**2}
  args = jax.device_get((params, x))  # NumPy takes the differences
  modes: dict[str, Any] = {
    'forward': lambda: test_util.check_jvp(value, push, args, **limits),
    'reverse': lambda: test_util.check_vjp(value, pull, args, **limits),
  }
  for mode, check in modes.items():
    try:
      check()
    except AssertionError as error:
      raise AssertionError(
        f'the derivative in {mode} mode is not that of the values, by finite '
        'differences. Look for a rule of its own, a stop_gradient, or rounding.'
      ) from error


def _named(found: tuple[Any, Any]) -> dict[str, Any]:
  return dict(zip(('gradient of params', 'gradient of x'), found, strict=True))


def _check_reached(found: dict[str, Any]) -> None:
  """Raises for a parameter whose gradient is zero throughout."""
  params = {'params': found['gradient of params']}
  for name, gradient in leaves(params).items():
    if not np.asarray(gradient).any():  # np.any(gradient) would compile
      raise AssertionError(
        f'{name} changes nothing: its gradient is zero. Use it in '
        'apply, or give None in its place.'
      )


def _start_wide(transform: Norm, x: Array) -> tuple[Any, Any, Array]:
  """Parameters, state and x in float32 or wider, for finite differences."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  params, state = start(transform, x)
  real = jnp.finfo(x.dtype).dtype
  params = jax.tree.map(
    lambda p: p.astype(jnp.promote_types(p.dtype, real)), params
  )
  return params, state, x
