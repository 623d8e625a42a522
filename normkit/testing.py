"""Checks for people who write a norm or a model of their own.

`check_norm` holds a transform to what `normkit.Norm` promises; it runs all the
checks below, which can also be called one by one. Every failure is an
AssertionError that says what was done and what came out different. The norms
of this package are held to the same checks.
"""

from collections.abc import Callable, Iterator
import contextlib
import copy
import functools
import math
from typing import Any, TypeAlias

import chex  # type: ignore[import-untyped]
import jax
from jax import test_util
import jax.numpy as jnp
import numpy as np

from normkit import _types
from normkit._types import Array, ArrayLike, Axes
from normkit.norm import Norm

Reference: TypeAlias = Callable[..., tuple[Any, Any]]
_Apply: TypeAlias = Callable[..., Any]


def check_norm(
  transform: Norm,
  x: ArrayLike,
  reference: Reference | None = None,
  *,
  where: ArrayLike | None = None,
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
    rtol: relative tolerance between values; None chooses by the dtype of y.
    atol: absolute tolerance between values; None chooses by the dtype of y.

  Raises:
    AssertionError: if a check fails; the message names it.

  Examples:
    >>> import jax, normkit as nk
    >>> from normkit import testing
    >>> x = jax.random.normal(jax.random.key(0), (4, 6))
    >>> testing.check_norm(nk.LayerNorm(), x)
  """
  tolerance = {'rtol': rtol, 'atol': atol}
  check_init(transform, x)
  check_shapes(transform, x, where=where)
  check_state(transform, x, where=where, **tolerance)
  check_transformations(transform, x, where=where, **tolerance)
  check_traces(transform, x, where=where)
  check_gradients(transform, x, where=where, **tolerance)
  check_mask(transform, x, where=where, **tolerance)
  if reference is not None:
    check_values(transform, x, reference, where=where, **tolerance)


def check_init(transform: Norm, x: ArrayLike) -> None:
  """Checks that `init` takes an array and its shape alike.

  Args:
    transform, x: as `check_norm` takes them.

  Raises:
    AssertionError: if parameters or state differ between the two.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> from normkit import testing
    >>> testing.check_init(nk.BatchNorm(), jnp.ones((4, 6)))
  """
  x = jnp.asarray(x)
  with _doing(transform, 'init of a jax.ShapeDtypeStruct and of an array'):
    from_shape = transform.init(jax.ShapeDtypeStruct(x.shape, x.dtype))
    _assert_equal(from_shape, transform.init(x))


def check_shapes(
  transform: Norm, x: ArrayLike, *, where: ArrayLike | None = None
) -> None:
  """Checks that y has the shape and dtype of x, finite, as `eval_shape` says.

  A transform with a field `dtype` that is not None gives y in that dtype.

  Args:
    transform, x, where: as `check_norm` takes them.

  Raises:
    AssertionError: if a shape or dtype is another, or a value is not finite.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> from normkit import testing
    >>> testing.check_shapes(nk.LayerNorm(), jnp.ones((4, 6), jnp.bfloat16))
  """
  x = jnp.asarray(x)
  params, state = _start(transform, x)
  dtype = getattr(transform, 'dtype', None)
  for train in (True, False):
    apply = _applied(transform, train)
    with _doing(transform, f'shapes with train={train}'):
      out = apply(params, state, x, where)
      chex.assert_shape(out['y'], x.shape)
      chex.assert_type(out['y'], x.dtype if dtype is None else dtype)
      chex.assert_tree_all_finite(out)
      chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(apply, params, state, x, where), out
      )


def check_state(
  transform: Norm,
  x: ArrayLike,
  *,
  where: ArrayLike | None = None,
  rtol: float | None = None,
  atol: float | None = None,
) -> None:
  """Checks the state: stable in form, carried by scan, left alone in eval.

  Args:
    transform, x, where, rtol, atol: as `check_norm` takes them.

  Raises:
    AssertionError: if a step changes the structure, a shape or a dtype of the
      state, if `train=False` changes it at all, or if steps under
      `jax.lax.scan` differ from steps one by one.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> from normkit import testing
    >>> testing.check_state(nk.BatchNorm(), jnp.ones((4, 6)))
  """
  x = jnp.asarray(x)
  params, first = _start(transform, x)
  with _doing(transform, 'state after train=False'):
    out = _applied(transform, train=False)(params, first, x, where)
    assert_state_unchanged(first, out['state'])
  xs, ys, state = jnp.stack([x, -x, 2 * x]), [], first
  apply = _applied(transform, train=True)
  with _doing(transform, 'state after train=True'):
    for step in xs:
      y, state = apply(params, state, step, where).values()
      ys.append(y)
      chex.assert_trees_all_equal_structs(first, state)
      chex.assert_trees_all_equal_shapes_and_dtypes(first, state)

  def body(state: Any, step: Array) -> tuple[Any, Array]:
    y, state = apply(params, state, step, where).values()
    return state, y

  with _doing(transform, 'three steps under jax.lax.scan'):
    last, scanned = jax.lax.scan(body, first, xs)
    expected = {'y': jnp.stack(ys), 'state': state}
    _assert_close({'y': scanned, 'state': last}, expected, rtol, atol)


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
  params, state = _start(transform, x)
  xs = jnp.stack([x, -x])
  static = jax.jit(_apply, static_argnums=(0, 1))
  for train in (True, False):
    apply = _applied(transform, train)
    ways: dict[str, _Apply] = {
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
      with _doing(transform, f'{name} with train={train}'):
        _assert_close(way(params, state, xs, where), eager, rtol, atol)


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
  params, first = _start(transform, x)
  traces = []

  def traced(transform: Norm, train: bool, *args: Any) -> dict[str, Any]:
    traces.append(transform)
    return _apply(transform, train, *args)

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
      with _doing(transform, f'{name}, with train={train}'):
        state = function(same, train, params, state, x, where)['state']
        if len(traces) > 1:
          raise AssertionError('jax.jit traced it again.')


def check_gradients(
  transform: Norm,
  x: ArrayLike,
  *,
  where: ArrayLike | None = None,
  rtol: float | None = None,
  atol: float | None = None,
) -> None:
  """Checks the gradients with respect to parameters and x.

  They are finite, the same under `jax.checkpoint`, and agree with finite
  differences, forward and reverse; those are taken in float32 or wider, and
  left out for a transform whose output is narrower even so. The loss counts y
  and the new state.

  Args:
    transform, x, where: as `check_norm` takes them; parameters are
      floating-point or complex.
    rtol, atol: tolerances under checkpoint, as `check_norm` takes them.

  Raises:
    AssertionError: if a gradient is missing, not finite, or wrong.

  Examples:
    >>> import jax, normkit as nk
    >>> from normkit import testing
    >>> x = jax.random.normal(jax.random.key(0), (4, 6))
    >>> testing.check_gradients(nk.LayerNorm(), x)
  """
  x = jnp.asarray(x)
  params, state = _start(transform, x)
  wide = _start_wide(transform, x)

  def loss(apply: _Apply, params: Any, state: Any, x: Array) -> Array:
    return _loss(apply(params, state, x, where))

  for train in (True, False):
    apply = _applied(transform, train)
    function = functools.partial(loss, apply)
    gradients = jax.jit(jax.value_and_grad(function, (0, 2)))
    with _doing(transform, f'gradients with train={train}'):
      _, found = gradients(params, state, x)
      chex.assert_trees_all_equal_shapes_and_dtypes(found, (params, x))
      chex.assert_tree_all_finite(found)
    with _doing(transform, f'gradients under checkpoint with train={train}'):
      again = jax.jit(jax.grad(jax.checkpoint(function), (0, 2)))
      _assert_close(again(params, state, x), found, rtol, atol)

    out = jax.eval_shape(apply, *wide, where)
    if jnp.finfo(out['y'].dtype).bits < 32:
      continue
    with _doing(transform, f'derivatives with train={train}'):
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
    return value, lambda dy: jax.tree.map(lambda g: dy * g, found)

  @jax.jit
  def push(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return jax.jvp(lambda p, x: loss(p, state, x), primals, tangents)

  step = float(jnp.finfo(x.dtype).eps) ** (1 / 3)
  limits = {'eps': step, 'atol': 400 * step**2, 'rtol': 400 * step**2}
  args = params, x
  test_util.check_jvp(value, push, args, err_msg='forward mode', **limits)
  test_util.check_vjp(value, pull, args, err_msg='reverse mode', **limits)


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
  params, state = _start(transform, x)
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

  def visible(apply: _Apply, params: Any, x: Array) -> tuple[Array, Any]:
    out = apply(params, state, x, where)
    out['y'] = jnp.where(changed, 0, out['y'])
    return _loss(out), out

  for train in (True, False):
    loss = functools.partial(visible, _applied(transform, train))
    function = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    results = []
    for value in (0.0, -3.0, math.nan, math.inf):
      with _doing(transform, f'{value} where masked, with train={train}'):
        (dparams, dx), out = function(params, jnp.where(changed, value, x))
        out |= {'gradient of params': dparams, 'gradient of x': dx}
        chex.assert_tree_all_finite(out)
        results.append(out)
        _assert_close(out, results[0], rtol, atol)
        leak = {'gradient of x, masked': jnp.where(changed, dx, 0)}
        _assert_equal(leak, jax.tree.map(jnp.zeros_like, leak))


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
  params, state = _start(transform, x)
  for number, (step, train) in enumerate([(x, True), (-x, True), (x, False)]):
    with _doing(transform, f'step {number} with train={train}'):
      y, expected = reference(params, state, step, train, where)
      out = _apply(transform, train, params, state, step, where)
      _assert_close(out, {'y': y, 'state': expected}, rtol, atol)
      state = out['state']


def assert_normalized(
  y: ArrayLike,
  axis: Axes,
  *,
  where: ArrayLike | None = None,
  mean: float | None = 0.0,
  var: float = 1.0,
  atol: float = 1e-3,
) -> None:
  """Asserts that y has a mean and a variance over some axes.

  Args:
    y: array of any shape, real or complex.
    axis: the axes over which y is normalized, an integer or several.
    where: boolean mask that broadcasts to the shape of y; sets without an
      element are passed over. None counts all.
    mean: the mean of each set. None asserts nothing about it and takes the
      variance about zero, as RMS norm does.
    var: the biased variance of each set.
    atol: how far both may be off.

  Raises:
    AssertionError: if a set has another mean or variance, or none has an
      element.

  Examples:
    >>> import jax.numpy as jnp
    >>> from normkit import testing
    >>> testing.assert_normalized(jnp.array([[-1.0, 1.0], [1.0, -1.0]]), -1)
  """
  values = _wide(y)
  counted = np.broadcast_to(True if where is None else where, values.shape)
  axes = _types.check_axes(axis, values.ndim)
  count = counted.sum(axes, keepdims=True)
  if not count.any():
    raise AssertionError(
      f'y of shape {values.shape} has no element to normalize over '
      f'axis={axis}, masks aside.'
    )

  def average(values: Any) -> Any:
    total = values.sum(axes, keepdims=True, where=counted)
    return total / np.maximum(count, 1)

  center = average(values) if mean is not None else np.zeros(count.shape)
  spread = average(np.abs(values - center) ** 2)
  for name, found, expected in (
    ('mean', center, mean),
    ('variance', spread, var),
  ):
    if expected is None:
      continue
    error = np.where(count > 0, np.abs(found - expected), 0)
    if not np.all(error <= atol):
      worst = np.unravel_index(np.argmax(error), error.shape)
      raise AssertionError(
        f'y of shape {values.shape} is not normalized over axis={axis}: its '
        f'{name} is {found[worst]:.6g} at index {tuple(map(int, worst))}, not '
        f'{expected} to within {atol}.'
      )


def assert_state_unchanged(before: Any, after: Any) -> None:
  """Asserts that two states are the same to the last bit.

  Args:
    before: any pytree of arrays, such as a norm's state or a model's variables.
    after: what it became.

  Raises:
    AssertionError: if the structure, a shape, a dtype or a value differs; the
      message names the leaf.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> from normkit import testing
    >>> bn, x = nk.BatchNorm(), jnp.ones((4, 6))
    >>> params, before = bn.init(x)
    >>> _, after = bn.apply(params, before, x, train=False)
    >>> testing.assert_state_unchanged(before, after)
  """
  try:
    _assert_equal(before, after)
  except AssertionError as error:
    raise AssertionError(f'the state changed: {error}') from error


def _start(transform: Norm, x: Array) -> tuple[Any, Any]:
  """Parameters, a little off those of `init`, and the state."""
  params, state = transform.init(x)
  return jax.tree.map(lambda p: p + 0.1 * _waves(p), params), state


def _start_wide(transform: Norm, x: Array) -> tuple[Any, Any, Array]:
  """Parameters, state and x in float32 or wider, for finite differences."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  params, state = _start(transform, x)
  real = jnp.finfo(x.dtype).dtype
  params = jax.tree.map(
    lambda p: p.astype(jnp.promote_types(p.dtype, real)), params
  )
  return params, state, x


def _apply(
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


def _applied(transform: Norm, train: bool) -> _Apply:
  return functools.partial(_apply, transform, train)


def _each(apply: _Apply) -> _Apply:
  """Maps `apply` over the first axis of x, in a Python loop."""

  def loop(params: Any, state: Any, xs: Array, where: Any) -> Any:
    outs = [apply(params, state, x, where) for x in xs]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)

  return loop


def _mapped(transformation: Callable[..., Any], apply: _Apply) -> _Apply:
  """Maps `apply` over the first axis of x with `jax.vmap` or `jax.pmap`."""

  def mapped(params: Any, state: Any, xs: Array, where: Any) -> Any:
    return transformation(lambda x: apply(params, state, x, where))(xs)

  return mapped


def _loss(out: dict[str, Any]) -> Array:
  """A real number that depends on each value of y and of the state."""
  leaves = [
    a for a in jax.tree.leaves(out) if jnp.issubdtype(a.dtype, jnp.inexact)
  ]
  return jnp.stack([jnp.sum(_waves(a) * a).real for a in leaves]).sum()


def _waves(x: Array) -> Array:
  """Fixed numbers of size one at most, of the shape and dtype of x."""
  steps = jnp.arange(1.0, x.size + 1).reshape(x.shape)
  if jnp.iscomplexobj(x):
    return jnp.exp(1j * steps).astype(x.dtype)
  return jnp.cos(steps).astype(x.dtype)


def _wide(x: ArrayLike) -> np.ndarray[Any, Any]:
  """An array as float64 or complex128."""
  return np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)


def _assert_equal(actual: Any, expected: Any) -> None:
  """Asserts the same structure, shapes, dtypes and values."""
  chex.assert_trees_all_equal_structs(actual, expected)
  chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
  chex.assert_trees_all_equal(actual, expected)


def _assert_close(
  actual: Any, expected: Any, rtol: float | None, atol: float | None
) -> None:
  """Asserts the same structure and shapes, and values as the dtype allows."""

  def close(a: Array, b: Array) -> bool:
    tolerance = _tolerance(a.dtype)
    return np.allclose(
      _wide(a),
      _wide(b),
      tolerance if rtol is None else rtol,
      tolerance if atol is None else atol,
      equal_nan=True,
    )

  chex.assert_trees_all_equal_structs(actual, expected)
  chex.assert_trees_all_equal_shapes(actual, expected)
  chex.assert_trees_all_equal_comparator(
    close, lambda a, b: f'{a} is not close to {b}', actual, expected
  )


def _tolerance(dtype: Any) -> float:
  """Two roundings of the output, or rounding errors of a long float32 sum."""
  if not jnp.issubdtype(dtype, jnp.inexact):
    return 0
  sums = jnp.promote_types(dtype, jnp.float32)
  return max(2 * float(jnp.finfo(dtype).eps), 128 * float(jnp.finfo(sums).eps))


@contextlib.contextmanager
def _doing(transform: Norm, what: str) -> Iterator[None]:
  """Turns whatever is raised into an AssertionError that says where."""
  try:
    yield
  except Exception as error:
    name = type(transform).__name__
    kind = '' if isinstance(error, AssertionError) else type(error).__name__
    raise AssertionError(f'{name}, {what}: {kind} {error}') from error
