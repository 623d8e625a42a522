"""Calls of a transform: what they start from, and how their failures read."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from normkit._types import Array, ArrayLike
from normkit.norm import Norm

Apply: TypeAlias = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Gated:
  """A norm whose `apply` takes a gate after x, as one that makes it of x."""

  transform: Any
  gate: Callable[[Array], Array]

  @property
  def dtype(self) -> Any:
    """That of y; None keeps x's."""
    return getattr(self.transform, 'dtype', None)

  def init(self, x: Array | jax.ShapeDtypeStruct) -> tuple[Any, Any]:
    """As the norm's own."""
    params, state = self.transform.init(x)
    return params, state

  def apply(
    self, params: Any, state: Any, x: Array, **options: Any
  ) -> tuple[Array, Any]:
    """As the norm's own, given its gate."""
    finite = jnp.isfinite(x)
    gate = self.gate(jnp.where(finite, x, 0))
    gate = jnp.where(finite, gate, x)  # stray where x is
    y, state = self.transform.apply(params, state, x, gate, **options)
    return y, state


def start(transform: Norm, x: Array) -> tuple[Any, Any]:
  """Parameters, a little off those of `init`, and the state."""
  params, state = transform.init(x)

  def moved(p: Array) -> Array:
    a = np.asarray(p) + 0.1 * _waves(p)
    step: Array = jax.device_put(a.astype(p.dtype))
    return step

  return jax.tree.map(moved, params), state


def times(factor: ArrayLike, x: Array, plus: float = 0.0) -> Array:
  """factor * x + plus in x's dtype, by NumPy: JAX compiles nothing for it."""
  a, b = (np.asarray(v).astype(x.dtype) for v in (factor, plus))
  moved: Array = jax.device_put(a * np.asarray(x) + b)
  return moved


def call(
  transform: Norm,
  train: bool,
  params: Any,
  state: Any,
  x: Array,
  where: Any = None,
) -> dict[str, Any]:
  """What `transform.apply` returns, by name, as failures will tell it."""
  y, state = transform.apply(params, state, x, train=train, where=where)
  return {'y': y, 'state': state}


def applied(transform: Norm, train: bool) -> Apply:
  """A function of params, state, x and where."""
  return functools.partial(call, transform, train)


def loss_of(out: dict[str, Any]) -> Array:
  """A real number that depends on each value of y and of the state."""
  leaves = [
    a for a in jax.tree.leaves(out) if jnp.issubdtype(a.dtype, jnp.inexact)
  ]
  return jnp.stack([jnp.sum(_waves(a) * a).real for a in leaves]).sum()


def _waves(x: Array) -> np.ndarray[Any, Any]:
  """Fixed numbers of size one at most, of the shape and dtype of x.

  They are NumPy's, so that no program computes them.
  """
  steps = np.arange(1.0, x.size + 1).reshape(x.shape)
  waves = np.exp(1j * steps) if jnp.iscomplexobj(x) else np.cos(steps)
  given: np.ndarray[Any, Any] = waves.astype(x.dtype)
  return given


@contextlib.contextmanager
def doing(transform: Norm, what: str) -> Iterator[None]:
  """Turns whatever is raised into an AssertionError that says where."""
  try:
    yield
  except AssertionError as error:
    raise AssertionError(f'{_name(transform)}, {what}: {error}') from error
  except Exception as error:
    first = str(error).partition('\n')[0]
    raise AssertionError(
      f'{_name(transform)}, {what}, raised {type(error).__name__}: {first}'
    ) from error


def _name(transform: Norm) -> str:
  of = transform.transform if isinstance(transform, Gated) else transform
  return type(of).__name__
