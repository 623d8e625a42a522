"""A whole norm: every check of this package at once."""

from collections.abc import Callable

from normkit._types import Array, ArrayLike
from normkit.norm import Norm
from normkit.testing._calls import Gated
from normkit.testing.forms import check_init, check_shapes, check_state
from normkit.testing.gradients import check_gradients
from normkit.testing.transformations import check_traces, check_transformations
from normkit.testing.values import (
  Reference,
  check_mask,
  check_normalized,
  check_values,
)


def check_norm(
  transform: Norm,
  x: ArrayLike,
  reference: Reference | None = None,
  *,
  where: ArrayLike | None = None,
  gate: Callable[[Array], Array] | None = None,
  normalizes: bool = True,
  rtol: float | None = None,
  atol: float | None = None,
) -> None:
  """Runs every check of this module on a transform.

  Parameters are those of `init`, moved a little, so that a scale of one and a
  bias of zero hide nothing. Mapped axes are not bound: leave `axis_name` out.

  Args:
    transform: the transform; hashable, equal to its copies.
    x: array that `transform.init` takes, with a standard deviation near one.
    reference: what the transform should compute, as `check_values` takes it.
      None leaves that check out.
    where: boolean mask that broadcasts to the shape of x. None masks nothing,
      and lets `check_mask` make a mask of its own.
    gate: for a norm whose `apply` takes a gate after x: an elementwise function
      that makes it of x, such as `jnp.sin`, here and in the reference. It
      hashes.
    normalizes: whether to run `check_normalized`. False for what lets its
      output grow with x, as global response norm does.
    rtol: relative tolerance between values; None chooses by the dtype of y.
    atol: absolute tolerance between values; None chooses by the dtype of y.

  Raises:
    AssertionError: if a check fails; the message names it.

  Examples:
    >>> import jax, normkit as nk
    >>> from normkit import testing
    >>> x = jax.random.normal(jax.random.key(0), (4, 6))
    >>> testing.check_norm(nk.LayerNorm(), x)
    >>> testing.check_norm(nk.GatedRMSNorm(), x, gate=jax.numpy.sin)
  """
  if gate is not None:
    transform = Gated(transform, gate)
  tolerance = {'rtol': rtol, 'atol': atol}
  check_init(transform, x)
  check_shapes(transform, x, where=where)
  check_state(transform, x, where=where, **tolerance)
  check_transformations(transform, x, where=where, **tolerance)
  check_traces(transform, x, where=where)
  check_gradients(transform, x, where=where, **tolerance)
  if normalizes:
    check_normalized(transform, x, where=where)
  check_mask(transform, x, where=where, **tolerance)
  if reference is not None:
    check_values(transform, x, reference, where=where, **tolerance)
