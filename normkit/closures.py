"""Functions made anew at each call, which `jax.jit` knows again."""

from collections.abc import Callable
import functools
import types
from typing import Any

import jax
from jax import core

from normkit import platforms
from normkit._types import has_hash, ruled


def traced_once(run: Callable[..., Any], *given: Any) -> Any:
  """`run(*given)` by `jax.jit`, traced once for all functions that are alike.

  A model has many norms of one shape, and traces the first alone; called
  outside of `jit`, a norm is one program instead of one for each operation.

  Args:
    run: a function that closes over no array. Where it closes over what has no
      hash, such as a list, it is called as it is.
    *given: arrays and trees of them.

  Returns:
    What `run` returns.
  """
  alike = Closure(run)
  if not has_hash(alike):
    return run(*given)
  return ruled(_norm, alike, platforms.context(), *given)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _norm(run: Callable[..., Any], context: Any, *given: Any) -> Any:
  """`context` keeps apart what the environment's variable prefers.

  Programs and profiles show its name.
  """
  del context
  return run(*given)


def run_traced(traced: jax.stages.Traced, *given: Any) -> Any:
  """Runs what `jax.jit` has traced: half the work of tracing it again."""
  program = traced.jaxpr
  leaves = jax.tree.leaves(given)
  results = core.eval_jaxpr(program.jaxpr, program.consts, *leaves)
  return jax.tree.unflatten(jax.tree.structure(traced.out_info), results)


class Closure:
  """A function that equals those of the same code that close over equals."""

  def __init__(self, run: Callable[..., Any]) -> None:
    self._run, self._key = run, _key(run)

  def __call__(self, *args: Any) -> Any:
    """What the function gives."""
    return self._run(*args)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Closure) and self._key == other._key

  def __hash__(self) -> int:
    return hash(self._key)


def _key(value: Any) -> Any:
  if not isinstance(value, types.FunctionType):
    return value
  cells = [_key(c.cell_contents) for c in value.__closure__ or ()]
  return value.__code__, id(value.__globals__), value.__defaults__, *cells
