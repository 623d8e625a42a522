"""Forms that depend on the platform that a program is compiled for."""

from collections.abc import Callable, Iterator
import contextlib
import contextvars
from typing import Any

from jax import lax

PLATFORMS = 'cpu', 'cuda', 'rocm', 'tpu'
_named: contextvars.ContextVar[str | None] = contextvars.ContextVar(
  'platform', default=None
)


@contextlib.contextmanager
def for_platform(name: str) -> Iterator[None]:
  """Traces norms in the form of one platform, and no other.

  A norm may have one form for a CPU and another for a GPU or TPU: the same
  values to rounding, at other costs. `jax.jit` traces all of them, and the
  compiler takes the one of its platform. A tool that reads the traced program
  itself, such as jax2onnx, wants one; and no kernel, unless it is named.

  Wrap what traces, not what runs: your `jax.jit` keeps what it has traced, and
  does not look here before it uses that again.

  Args:
    name: 'cpu', 'cuda', 'rocm' or 'tpu'.

  Raises:
    ValueError: if the platform is none of these.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit as nk
    >>> with nk.for_platform('cpu'):
    ...   program = jax.make_jaxpr(nk.layer_norm)(jnp.ones((4, 6)))
    >>> 'platform_index' in str(program)
    False
  """
  if name not in PLATFORMS:
    known = ', '.join(map(repr, PLATFORMS))
    raise ValueError(f'name: {name!r} is no platform; give one of {known}.')
  token = _named.set(name)
  try:
    yield
  finally:
    _named.reset(token)


def named() -> str | None:
  """The platform that was named; a key of whatever keeps what was traced."""
  return _named.get()


def implied(implementation: str | None) -> str | None:
  """The implementation; XLA's where only a platform was named."""
  return implementation or ('xla' if named() else None)


def dependent(
  *operands: Any, default: Callable[..., Any], **forms: Callable[..., Any]
) -> Any:
  """`lax.platform_dependent`, or the form of the platform that was named."""
  name = named()
  if name is not None:
    return forms.get(name, default)(*operands)
  return lax.platform_dependent(*operands, default=default, **forms)
