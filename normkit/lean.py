"""A function of x widened once: one rounding of its gradient, x alone kept.

Statistics and output of a norm both depend on x. Where each widens it for
itself, each rounds its part of the gradient, and the parts, which may cancel,
meet in half precision. Here x is widened for all, so that they meet in float32
or wider, and what is kept for the backward is x as it was given.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from normkit import _rules, platforms
from normkit._primitives import Sizes
from normkit._types import Array, DType, is_known, ruled
from normkit.centred import STATISTICS
from normkit.closures import run_traced, traced_once

# Into what is being traced; newer JAX means by True: when it is lowered.
INLINE: Any = jax.Inline.JAX_EARLY if hasattr(jax, 'Inline') else True
# Up to so many elements x is widened apart on a CPU; of more, what that takes
# in memory costs more than it saves.
SMALL = 2**15
COLLECTIVES = (
  'psum',
  'psum_invariant',
  'all_gather',
  'all_gather_invariant',
  'all_to_all',
  'pmax',
  'ppermute',
  'reduce_scatter',
)


def lean(run: Callable[..., Any], dtype: DType, x: Array, *given: Any) -> Any:
  """`run(x.astype(dtype), *given)`, of which x, `given` and sums are kept.

  Args:
    run: a function of arrays and trees of them; it closes over no array, and
      is traced once for all that are alike (see `traced_once`).
    dtype: of x inside of `run`.
    x: an array.
    *given: what else `run` takes.

  Returns:
    What `run` returns.
  """

  def whole(x: Array, *given: Any) -> Any:
    return _lean(run, dtype, x, *given)

  return traced_once(whole, x, *given)


def _lean(run: Callable[..., Any], dtype: DType, x: Array, *given: Any) -> Any:
  size = x.size  # x itself, held by a rule, would be a leaked tracer
  leaves, tree = jax.tree.flatten((x, given))

  @functools.partial(jax.jit, inline=INLINE)
  def whole(*leaves: Array) -> Any:
    x, given = jax.tree.unflatten(tree, leaves)
    return run(_widened(x, dtype), *given)

  def derive(primals: Any, tangents: Any) -> Any:
    moved = _rules.moved(tangents)
    if not moved:
      results = evaluate(*primals)
      return results, jax.tree.map(jnp.zeros_like, results)
    again = functools.partial(run_traced, whole.trace(*primals))

    def along(primals: Any, given: Any) -> Any:
      return _rules.along(again, primals, moved, given)

    kept = functools.partial(is_kept, size)
    along = jax.checkpoint(along, prevent_cse=False, policy=kept)
    return along(primals, [tangents[i] for i in moved])

  evaluate = jax.custom_jvp(whole)
  evaluate.defjvp(derive, symbolic_zeros=True)
  return ruled(evaluate, *leaves)


def _widened(x: Array, dtype: DType) -> Array:
  """x in `dtype`; on a CPU by an operation of its own where x is small.

  Else each of XLA's loops widens x again, and is made for several threads,
  whose start takes longer: layer norm's step of 2 x 1,536 in bfloat16 takes
  1.15 of Flax's time so, and .70 apart.
  """

  def wide(x: Array) -> Array:
    return x.astype(dtype)

  if x.dtype.itemsize > 2 or platforms.named():
    return wide(x)
  forms = {'default': wide, 'cpu': lambda x: lax.optimization_barrier(wide(x))}
  kind = jax.typeof(x).update(dtype=dtype, weak_type=False)
  sizes = {'cpu': Sizes(range(SMALL + 1))}
  y: Array = platforms.dependent(forms, (), kind, (x,), sizes)
  return y


def is_kept(size: int, primitive: Any, *avals: Any, **params: Any) -> bool:
  """A policy for `jax.checkpoint`: what was summed over x, of `size` elements.

  Sums, what devices exchange, products of what is smaller than x, and what a
  rule of its own makes of x that is: statistics.
  """
  if any(jnp.issubdtype(a.dtype, jnp.complexfloating) for a in avals):
    return False  # JAX marks what is kept, and cannot mark complex numbers
  if primitive.name == 'custom_jvp_call':
    return all(_is_less(a.size, size) for a in params['call_jaxpr'].out_avals)
  if primitive.name == 'dot_general':
    return all(_is_less(a.size, size) for a in avals)
  is_sum = primitive.name in ('reduce_sum', *COLLECTIVES)
  return is_sum or params.get('name') == STATISTICS


def _is_less(one: Any, other: Any) -> bool:
  """Of sizes that are symbols, whether it is another one."""
  are_known = is_known(one) and is_known(other)
  return bool(one < other if are_known else one != other)
