"""Which form of a norm is traced: for which platform, by which kernel."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import importlib
import os
from typing import Any

import jax

from normkit import _primitives, _types
from normkit._types import Array, Implementation

VARIABLE = 'NORMKIT_IMPLEMENTATION'
PLATFORMS = 'cpu', 'cuda', 'rocm', 'tpu'
# The platform that was named, and the implementation that is preferred. JAX
# looks here before it runs again what it has traced.
_context = jax.make_user_context((None, None))


@contextlib.contextmanager
def implementation(name: Implementation) -> Iterator[None]:
  """Prefers a kernel for every norm that runs inside, as it is.

  For models that one did not write: whatever has no `implementation` of its own
  runs by this kernel, forward and backward, where the kernel takes the case and
  the program is for its platform; the rest by XLA. The argument of a call wins.
  The environment variable `NORMKIT_IMPLEMENTATION` is the same for a process,
  and this is stronger.

  Wrap what runs, as with `jax.default_matmul_precision`: what `jax.jit` has
  traced outside is traced anew inside, and the other way round. What is
  compiled inside, by `jax.jit(f).lower(x).compile()`, stays as it is. As JAX's
  own contexts it is the thread's: do not hold it over an `await`.

  Args:
    name: 'triton', 'mosaic_gpu', 'mosaic_tpu' or 'xla'.

  Raises:
    ValueError: if the implementation is none of these.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit as nk
    >>> x = jnp.ones((4, 6))
    >>> with nk.implementation('triton'):
    ...   y = jax.jit(nk.layer_norm)(x)  # on a CPU it is XLA's
    >>> y.shape
    (4, 6)
  """
  if name is None:
    raise ValueError('name: None prefers nothing; give the name of a kernel.')
  _types.check_implementation(name)
  with _context((named(), name)):
    yield


def preferred() -> Implementation | None:
  """What is preferred where a call names nothing."""
  name: Implementation | None = _context.value[1]
  if name is None and (given := os.environ.get(VARIABLE)):
    name = _types.check_implementation(given, VARIABLE)
  return name


@contextlib.contextmanager
def for_platform(name: str) -> Iterator[None]:
  """Traces norms in the form of one platform, and no other.

  A norm may have one form for a CPU and another for a GPU or TPU: the same
  values to rounding, at other costs. What `jax.jit` traces holds all of them,
  and the compiler takes the one of its platform. A tool that reads the traced
  program itself, such as jax2onnx, wants one; and no kernel, unless it is
  named. Forms for programs of one device are not among them. Do not hold it
  over an `await`.

  Args:
    name: 'cpu', 'cuda', 'rocm' or 'tpu'.

  Raises:
    ValueError: if the platform is none of these.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit as nk
    >>> with nk.for_platform('cpu'):
    ...   program = jax.make_jaxpr(lambda x: nk.layer_norm(x))(jnp.ones((4, 6)))
    >>> 'normkit_form' in str(program)
    False
  """
  if name not in PLATFORMS:
    known = ', '.join(map(repr, PLATFORMS))
    raise ValueError(f'name: {name!r} is no platform; give one of {known}.')
  with _context((name, _context.value[1])):
    yield


def named() -> str | None:
  """The platform that was named."""
  name: str | None = _context.value[0]
  return name


def implied(name: Implementation | None) -> Implementation | None:
  """The implementation; XLA's where it is preferred, or a platform named."""
  if name is not None:
    return name
  other = preferred()
  return 'xla' if other == 'xla' or (named() and other is None) else None


def context() -> tuple[str | None, Implementation | None]:
  """What a form depends on beside its arguments: a key of what was traced."""
  return named(), preferred()


@contextlib.contextmanager
def within(found: tuple[str | None, Implementation | None]) -> Iterator[None]:
  """In what `context` said before: for rules that JAX traces later."""
  with _context(found):
    yield


def dependent(
  forms: Mapping[str, Callable[..., Any]],
  operands: Sequence[Array],
  result: Any,
  linear: Sequence[Array] = (),
  sizes: Mapping[str, _primitives.Sizes] = _primitives.ANY_SIZE,
) -> Any:
  """`forms.choose`, or the form of the platform that was named.

  Forms for smaller arrays are left out, since `vmap` only adds elements. Under
  `jax.experimental.jet`, which knows no primitive but JAX's, the default runs.
  """
  arrays = *operands, *linear
  limits = {
    n: _primitives.Sizes(range(s.elements.stop)) for n, s in sizes.items()
  }
  forms = {
    name: form
    for name, form in forms.items()
    if _primitives.fits(limits.get(name), arrays)
  }
  is_settled = len(forms) == 1 or _types.in_jet(arrays)
  name = 'default' if is_settled else named()
  if name is not None:
    is_meant = name in forms and _primitives.fits(sizes.get(name), arrays)
    return forms[name if is_meant else 'default'](*arrays)
  module = importlib.import_module('normkit.forms')  # jax.extend takes 20 ms
  return module.choose(forms, operands, result, linear, sizes)
