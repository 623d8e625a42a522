"""Norms of weights: NumPy in float64, their authors', transformations."""

import functools

from flax import linen as nn, nnx
import jax
from jax import test_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import (
  spectral_norm_reference,
  weight_norm_reference,
  weight_standardize_reference,
)
from tiers import thinned

from normkit.norm import EmptyState, NormParams
from normkit.weights import (
  SpectralNorm,
  SpectralNormState,
  WeightNorm,
  WeightStandardization,
  spectral_norm,
  weight_norm,
  weight_standardize,
)

TOLERANCES = {
  jnp.bfloat16: 1e-2,
  jnp.float16: 1e-3,
  jnp.float32: 1e-6,
  jnp.float64: 1e-14,
  jnp.complex64: 1e-6,
  jnp.complex128: 1e-14,
}
# The shape of a weight, its feature axes and their shape.
AXES = [
  ((5, 4), -1, (4,)),
  ((5, 4), 0, (5,)),
  ((5, 4), None, ()),
  ((3, 2, 4), (-1, 0), (3, 4)),
  ((3, 2, 4), [0, 1, 2], (3, 2, 4)),
  ((4,), -1, (4,)),
  ((), None, ()),
]
SHAPES = [(5, 4), (2, 5), (3, 3, 2, 4), (4, 1)]
STEPS = [(1, True), (3, False)]
PLACES = ('conv', 'kernel'), ('dense', 'kernel')


def is_kernel(path, weight):
  del weight
  return 'kernel' in path


def draw(shape, dtype=jnp.float32, seed=0):
  rng = np.random.default_rng(seed)
  x = 0.5 + rng.standard_normal(shape)
  if jnp.issubdtype(dtype, jnp.complexfloating):
    x = x + 1j * rng.standard_normal(shape)
  return jax.device_put(np.asarray(x, dtype))


def start(columns, dtype=jnp.float32):
  u = draw((1, columns), dtype, seed=5)
  return SpectralNormState(u, jax.device_put(np.ones((), dtype)))


def compiled(function, *arrays, **options):
  """A call in one program: eagerly, each operation would be one."""
  return jax.jit(functools.partial(function, **options))(*arrays)


def with_column(v, value):
  """The matrix, its second column all of one value."""
  v = np.array(v)
  v[:, 1] = value
  return jax.device_put(v)


def network(seed=0):
  """Weights of which two are kernels, and a table of integers."""
  return {
    'conv': {'kernel': draw((3, 3, 2, 4), seed=seed), 'bias': draw((4,))},
    'dense': {'kernel': draw((4, 3), seed=seed + 1), 'bias': draw((3,))},
    'table': jnp.arange(6).reshape(2, 3),
  }


def wide(x):
  return np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)


def close(actual, desired, tolerance=1e-6):
  assert np.shape(actual) == np.shape(desired)
  np.testing.assert_allclose(
    wide(actual), wide(desired), rtol=tolerance, atol=tolerance
  )


def check_weight_norm(shape, feature_axes, features, dtype):
  with jax.enable_x64(jnp.finfo(dtype).bits == 64):
    v, g = draw(shape, dtype), draw(features, jnp.finfo(dtype).dtype, seed=1)
    norm = functools.partial(weight_norm, feature_axes=feature_axes)
    without, with_g = compiled(lambda v, g: (norm(v), norm(v, g)), v, g)
    for y, scale in (without, 1.0), (with_g, wide(g)):
      assert y.dtype == dtype
      desired = weight_norm_reference(v, scale, feature_axes)
      close(y, desired, TOLERANCES[dtype])


@pytest.mark.parametrize(('shape', 'feature_axes', 'features'), AXES)
def test_weight_norm_axes(shape, feature_axes, features):
  check_weight_norm(shape, feature_axes, features, jnp.float32)


@pytest.mark.parametrize('dtype', TOLERANCES)
def test_weight_norm_dtypes(dtype):
  check_weight_norm((3, 2, 4), (-1, 0), (3, 4), dtype)


def test_weight_norm_epsilon():
  v = draw((5, 4))
  desired = weight_norm_reference(v, 1.0, epsilon=0.5)
  close(compiled(weight_norm, v, epsilon=0.5), desired)


def test_weight_norm_scale_in_the_rank_of_the_weight():
  v, g = draw((5, 4)), draw((1, 4), seed=1)
  np.testing.assert_array_equal(
    compiled(weight_norm, v, g), compiled(weight_norm, v, g[0])
  )


def value_and_slope(norm, v):
  """The norm of v, and the gradient of the sum of its cubes."""

  def cubes(v):
    y = norm(v)
    return jnp.sum(y**3), y

  dv, y = jax.jit(jax.grad(cubes, has_aux=True))(v)
  return np.asarray(y), np.asarray(dv)


def test_weight_norm_without_epsilon_leaves_zeros():
  v = with_column(draw((5, 4)), 0)
  y, dv = value_and_slope(functools.partial(weight_norm, epsilon=0.0), v)
  assert not y[:, 1].any()
  assert np.isfinite(dv).all()


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
  """300^2 overflows float16, and ones in bfloat16 stop adding up at 256."""
  v = np.full((4096, 2), 300, dtype)
  close(compiled(weight_norm, v), np.full(v.shape, 1 / 64), 1e-3)
  y, state = compiled(spectral_norm, v, start(2))
  close(wide(state.sigma) / (300 * np.sqrt(8192)), 1.0, 1e-5)
  close(wide(y) * np.sqrt(8192), np.ones(v.shape), 5e-3)


def test_dtype_of_the_result():
  w = draw((5, 4), jnp.bfloat16)
  y = compiled(weight_norm, w, dtype=jnp.float32)
  assert y.dtype == jnp.float32
  close(y, weight_norm_reference(w))
  y, state = compiled(spectral_norm, w, start(4), dtype=jnp.float32)
  assert y.dtype == jnp.float32
  close(y, spectral_norm_reference(w, start(4).u)[0])
  with jax.enable_x64(True):  # u in float64 makes all of it float64
    state = start(4, jnp.float64)
    y, state = compiled(spectral_norm, w, state, dtype=jnp.float64)
    close(y, spectral_norm_reference(w, start(4).u)[0], 1e-6)
    close(state.sigma, np.mean(wide(w) / wide(y)), 1e-14)


def pulled(function):
  """What it gives a cotangent and arguments: their cotangents."""
  return lambda dy, *args: jax.vjp(function, *args)[1](dy)


def directions(*args):
  rng = np.random.default_rng(7)
  return tuple(rng.standard_normal(np.shape(a)) for a in args)


def check_forward_mode(function, dy, gradients, *args):
  """Against gradients that are known to be right."""
  moves = directions(*args)
  _, pushed = jax.jit(lambda *args: jax.jvp(function, args, moves))(*args)
  close(np.vdot(dy, pushed), sum(map(np.vdot, gradients, moves)), 1e-10)


def check_second_derivative(function, dy, *args):
  """By both modes, of a symmetric matrix, against differences."""
  moves = directions(*args)
  gradients = functools.partial(pulled(function), dy)

  @jax.jit
  def run(*args):
    back = jax.vjp(gradients, *args)[1](moves)
    return *jax.jvp(gradients, args, moves), back

  ends = [
    run(*(a + step * m for a, m in zip(args, moves, strict=True)))[0]
    for step in (1e-5, -1e-5)
  ]
  _, forward, back = run(*args)
  for above, below, *slopes in zip(*ends, forward, back, strict=True):
    for slope in slopes:
      close((above - below) / 2e-5, slope, 1e-7)


def test_weight_norm_gradient():
  """Salimans and Kingma 2016, equation 3."""
  with jax.enable_x64(True):
    v, g, dw = (
      draw(s, jnp.float64, i) for i, s in enumerate([(5, 4), 4, (5, 4)])
    )
    dv, dg = compiled(pulled(weight_norm), dw, v, g)
    v, g, dw = wide(v), wide(g), wide(dw)
    check_second_derivative(weight_norm, dw, v, g)
    check_forward_mode(weight_norm, dw, (dv, dg), v, g)
    length = np.sqrt(np.sum(v**2, axis=0))
    expected = np.sum(dw * v, axis=0) / length
    close(dg, expected, 1e-10)
    close(dv, g / length * dw - g * expected / length**2 * v, 1e-10)


def test_weight_norm_complex_gradient():
  with jax.enable_x64(True):
    v = np.asarray(draw((5, 4), jnp.complex128))
    test_util.check_grads(jax.jit(weight_norm), (v,), order=1)


# What weight standardization takes: two elements or more share a mean.
SHARED_AXES = [*AXES[:4], ((4,), None, ()), ((3, 3, 2, 4), -1, (4,))]
both_forms = pytest.mark.parametrize('scaled', [False, True])


def check_weight_standardize(shape, feature_axes, features, scaled, dtype):
  with jax.enable_x64(jnp.finfo(dtype).bits == 64):
    v, g = draw(shape, dtype), draw(features, jnp.finfo(dtype).dtype, seed=1)
    options = {'feature_axes': feature_axes, 'scaled': scaled}
    norm = functools.partial(weight_standardize, **options)
    without, with_g = compiled(lambda v, g: (norm(v), norm(v, g)), v, g)
    for w, gain in (without, 1.0), (with_g, wide(g)):
      assert w.dtype == dtype
      desired = weight_standardize_reference(v, gain, **options)
      close(w, desired, 3 * TOLERANCES[dtype])


@pytest.mark.parametrize(
  ('axes', 'scaled'), thinned(SHARED_AXES, [False, True], every=2)
)
def test_weight_standardize_axes(axes, scaled):
  shape, feature_axes, features = axes
  check_weight_standardize(shape, feature_axes, features, scaled, jnp.float32)


@pytest.mark.parametrize(
  ('dtype', 'scaled'), thinned(TOLERANCES, [False, True], every=2)
)
def test_weight_standardize_dtypes(dtype, scaled):
  check_weight_standardize((3, 2, 5, 4), (-1, 0), (3, 4), scaled, dtype)


@both_forms
def test_weight_standardize_gives_mean_and_variance(scaled):
  v = draw((3, 3, 16, 4))
  standardize = jax.jit(functools.partial(weight_standardize, scaled=scaled))
  w = wide(standardize(v))
  close(np.mean(w, (0, 1, 2)), np.zeros(4))
  var = 1 / 144 if scaled else 1.0
  np.testing.assert_allclose(np.var(w, (0, 1, 2)), var, rtol=1e-5)
  moved = standardize(7 * np.asarray(v) - 3)
  np.testing.assert_allclose(moved, w, rtol=1e-4, atol=1e-6)


@both_forms
def test_weight_standardize_epsilon(scaled):
  """Added to the variance; scaled, the least of N times the variance."""
  v = draw((8, 4))
  options = [{'scaled': scaled, 'epsilon': e} for e in (0.0, 0.5, 30.0)]
  found = compiled(lambda v: [weight_standardize(v, **o) for o in options], v)
  for w, given in zip(found, options, strict=True):
    close(w, weight_standardize_reference(v, **given))


@both_forms
def test_weight_standardize_default_epsilon(scaled):
  v = np.asarray(draw((8, 4))) * np.float32(1e-3 if scaled else 1e-5)
  desired = weight_standardize_reference(v, scaled=scaled)
  close(compiled(weight_standardize, v, scaled=scaled), desired)
  without = compiled(weight_standardize, v, scaled=scaled, epsilon=0.0)
  assert np.max(np.abs(without - desired)) > 0.05


def test_weight_standardize_gain():
  """One for each feature, in the rank of the weight, or one number."""
  v, g = draw((5, 4)), draw((1, 4), seed=1)
  np.testing.assert_array_equal(
    compiled(weight_standardize, v, g), compiled(weight_standardize, v, g[0])
  )
  for gain in 1.5, np.float32(1.5):
    w = compiled(weight_standardize, v, gain, scaled=True)
    assert w.dtype == v.dtype
    close(w, weight_standardize_reference(v, 1.5, scaled=True))


@both_forms
@pytest.mark.parametrize('epsilon', [None, 0.0])
def test_weight_standardize_equal_elements(scaled, epsilon):
  """Zeros, with gradients that are finite."""
  v = with_column(draw((5, 4)), 0.3)
  options = {'scaled': scaled, 'epsilon': epsilon}
  w, dv = value_and_slope(functools.partial(weight_standardize, **options), v)
  np.testing.assert_allclose(w[:, 1], 0, atol=1e-2)
  assert np.isfinite(dv).all()


@both_forms
def test_weight_standardize_large_mean(scaled):
  """A common mean far above the deviations costs no digits."""
  v = 1000 + np.random.default_rng(0).standard_normal((300, 4), np.float32)
  desired = weight_standardize_reference(v, scaled=scaled)
  close(compiled(weight_standardize, v, scaled=scaled), desired, 3e-6)


@both_forms
def test_weight_standardize_gradient(scaled):
  """The projection off the mean and off w itself, over the deviation."""
  with jax.enable_x64(True):
    v, g, dw = (
      draw(s, jnp.float64, i) for i, s in enumerate([(3, 2, 4), 4, (3, 2, 4)])
    )
    standardize = functools.partial(
      weight_standardize, scaled=scaled, epsilon=0.0
    )
    dv, dg = compiled(pulled(standardize), dw, v, g)
    check_forward_mode(standardize, dw, (dv, dg), v, g)
    n = wide(weight_standardize_reference(v, epsilon=0.0))
    root = np.sqrt(6) if scaled else 1.0
    close(dg, np.sum(wide(dw) * n, (0, 1)) / root, 1e-10)
    h = wide(dw) * wide(g) / root
    h = h - np.mean(h, (0, 1)) - n * np.mean(h * n, (0, 1))
    close(dv, h / np.std(wide(v), (0, 1)), 1e-10)


def test_weight_standardize_half_precision_is_summed_in_float32():
  v = np.tile(np.array([[300.0], [-300.0]], np.float16), (2048, 2))
  w = compiled(weight_standardize, v, dtype=jnp.float32)
  close(w, np.sign(v), 1e-6)


def test_weight_standardize_is_batch_norm_of_the_weight():
  """Flax's, of a kernel as a batch, whose features are the outputs."""
  v, g = draw((3, 3, 2, 4)), draw((4,), seed=1)

  def both(v, g, scaled, epsilon):
    module = nn.BatchNorm(use_running_average=False, epsilon=epsilon)
    variables = module.init(jax.random.key(0), v)
    scale = g * 18**-0.5 if scaled else g
    variables['params'] = {'scale': scale, 'bias': jnp.zeros(4)}
    desired, _ = module.apply(variables, v, mutable='batch_stats')
    w = weight_standardize(v, g, scaled=scaled, epsilon=epsilon)
    return w, desired

  for scaled, epsilon in (False, 1e-2), (True, 0.0):
    w, desired = compiled(both, v, g, scaled=scaled, epsilon=epsilon)
    close(w, desired, 2e-6)


def check_power_iteration(shape, n_steps, dtype):
  with jax.enable_x64(dtype == jnp.float64):
    state_dtype = jnp.promote_types(dtype, jnp.float32)
    w, first = draw(shape, dtype), start(shape[-1], state_dtype)
    norm = jax.jit(functools.partial(spectral_norm, n_steps=n_steps))
    y, state = norm(w, first)
    assert y.dtype == dtype
    desired, u, _, sigma = spectral_norm_reference(w, first.u, n_steps)
    close(y, desired, TOLERANCES[dtype])
    close(state.u, u, min(TOLERANCES[dtype], 2e-6))
    close(state.sigma, sigma, min(TOLERANCES[dtype], 2e-6))


@pytest.mark.parametrize(('shape', 'n_steps'), thinned(SHAPES, [1, 3], every=2))
def test_power_iteration(shape, n_steps):
  check_power_iteration(shape, n_steps, jnp.float32)


@pytest.mark.parametrize('dtype', list(TOLERANCES)[:4])
def test_power_iteration_dtypes(dtype):
  check_power_iteration((3, 2, 4), 1, dtype)


def test_spectral_norm_epsilon():
  w, first = draw((5, 4)), start(4)
  y, state = compiled(spectral_norm, w, first, epsilon=0.5)
  expected, u, _, _ = spectral_norm_reference(w, first.u, epsilon=0.5)
  close(y, expected)
  close(state.u, u)


@pytest.mark.parametrize('shape', SHAPES)
def test_many_steps_give_the_singular_value(shape):
  w = draw(shape)

  def body(state, _):
    y, state = spectral_norm(w, state)
    return state, y

  first = start(shape[-1])
  scan = functools.partial(jax.lax.scan, body, length=100)
  state, ys = compiled(scan, first)
  left, singular, right = np.linalg.svd(wide(w).reshape(-1, shape[-1]))
  del left
  close(state.sigma, singular[0], 2e-6)
  close(abs(wide(state.u)[0] @ right[0]), 1.0)
  largest = np.linalg.norm(wide(ys[-1]).reshape(-1, shape[-1]), 2)
  close(largest, 1.0, 2e-6)
  if shape != SHAPES[0]:
    return
  y, at_once = spectral_norm(w, first, n_steps=100)  # one program is long
  close(y, ys[-1])
  close(at_once.sigma, state.sigma)


def test_spectral_norm_gradient():
  """Miyato and others 2018, equation 12, u and v held fixed."""
  with jax.enable_x64(True):
    w, first = draw((3, 2, 4), jnp.float64), start(4, jnp.float64)
    dy = draw(w.shape, jnp.float64, seed=2)
    y, u, v, sigma = spectral_norm_reference(w, first.u, 2)
    sigma_of_w = (v * u).reshape(w.shape)

    def function(w, u):
      state = SpectralNormState(u, first.sigma)
      y, state = spectral_norm(w, state, n_steps=2)
      return y, state.sigma

    pull, dy = jax.jit(pulled(function)), wide(dy)
    dw, du = pull((dy, np.zeros(())), w, first.u)
    close(dw, (dy - np.sum(dy * y) * sigma_of_w) / sigma, 1e-10)
    assert not np.any(du)
    of_sigma = np.zeros_like(dy), np.ones(())
    close(pull(of_sigma, w, first.u)[0], sigma_of_w, 1e-10)


def test_update_false_iterates_and_keeps_the_state():
  w, first = draw((5, 4)), start(4)
  y, state = spectral_norm(w, first, n_steps=2, update=False)
  trained, _ = spectral_norm(w, first, n_steps=2)  # eagerly, as that is
  assert state is first
  np.testing.assert_array_equal(y, trained)


def test_a_weight_of_zeros_leaves_u():
  w, first = draw((5, 4)), start(4)
  y, state = compiled(spectral_norm, np.zeros_like(w), first)
  assert not np.any(y)
  assert state.sigma == 0
  np.testing.assert_array_equal(state.u, first.u)


@pytest.mark.parametrize('value', [np.inf, np.nan])
def test_a_weight_that_is_not_finite_leaves_u(value):
  w, first = draw((5, 4)), start(4)
  w = np.array(w)
  w[1, 2] = value
  y, state = compiled(spectral_norm, w, first)
  assert np.isnan(y).all()
  np.testing.assert_array_equal(state.u, first.u)


def test_a_weight_of_zeros_has_a_finite_gradient():
  total = jax.grad(lambda w: jnp.sum(spectral_norm(w, start(4))[0]))
  dw = compiled(total, np.zeros((5, 4), np.float32))
  np.testing.assert_array_equal(dw, np.ones((5, 4)))


def test_state_keeps_its_dtypes():
  with jax.enable_x64(True):
    w = draw((5, 4), jnp.float64)
    first = SpectralNormState(start(4, jnp.bfloat16).u, np.ones((), np.float32))
    _, state = compiled(spectral_norm, w, first)
    assert state.u.dtype == jnp.bfloat16
    assert state.sigma.dtype == jnp.float32


def test_products_are_in_full_precision():
  """Where float32 is rounded to fewer bits by default, sigma would be off."""
  program = jax.make_jaxpr(spectral_norm)(draw((5, 4)), start(4))
  products = [e for e in program.eqns if e.primitive.name == 'dot_general']
  assert len(products) == 3
  for product in products:
    assert set(product.params['precision']) == {jax.lax.Precision.HIGHEST}


# Flax's own, on a layer whose output is its kernel.


class LinenKernel(nn.Module):
  shape: tuple[int, ...]

  @nn.compact
  def __call__(self):
    return self.param('kernel', nn.initializers.normal(), self.shape)


class NNXKernel(nnx.Module):
  def __init__(self, kernel):
    self.kernel = nnx.Param(kernel)

  def __call__(self, x):
    return self.kernel[...] + x


def set_leaves(tree, **values):
  """The tree, with leaves whose path ends in a name replaced."""

  def replaced(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    value = values[name.rsplit('/', maxsplit=1)[-1]]
    assert leaf.shape == value.shape
    return value

  return jax.tree.map_with_path(replaced, tree)


FLAX_AXES = [a for a in AXES if len(a[0]) > 1]


@pytest.mark.parametrize(
  ('axes', 'use_scale'), thinned(FLAX_AXES, [True, False], every=3, keep=2)
)
def test_weight_norm_is_that_of_linen(axes, use_scale):
  shape, feature_axes, features = axes
  v, g, dw = draw(shape), draw(features, seed=1), draw(shape, seed=2)
  module = nn.WeightNorm(
    LinenKernel(shape), feature_axes=feature_axes, use_scale=use_scale
  )
  variables = jax.eval_shape(module.init, jax.random.key(0))

  def flax(v, g):
    return module.apply(set_leaves(variables, kernel=v, scale=g))

  def ours(v, g):
    return weight_norm(v, g if use_scale else None, feature_axes=feature_axes)

  def both_ways(function):
    y, pull = jax.vjp(function, v, g)
    return y, pull(dw)

  # A length of one element has no gradient: Flax's is what two terms leave.
  terms = np.abs(wide(dw) / wide(v)).max() if features == shape else 1.0
  jax.tree.map(
    functools.partial(close, tolerance=2e-6 * max(1.0, terms)),
    *jax.jit(lambda: (both_ways(ours), both_ways(flax)))(),
  )


@pytest.mark.parametrize(
  ('shape', 'steps'), thinned(SHAPES, STEPS, every=4, keep=2)
)
def test_spectral_norm_is_that_of_linen(shape, steps):
  n_steps, update = steps
  w, dy, first = draw(shape), draw(shape, seed=2), start(shape[-1])
  module = nn.SpectralNorm(LinenKernel(shape), n_steps=n_steps)
  init = functools.partial(module.init, update_stats=False)
  variables = jax.eval_shape(init, jax.random.key(0))
  state = set_leaves(variables['batch_stats'], **first._asdict())

  def flax(w):
    params = set_leaves(variables['params'], kernel=w)
    y, updates = module.apply(
      {'params': params, 'batch_stats': state},
      update_stats=update,
      mutable='batch_stats',
    )
    return y, updates['batch_stats']

  def ours(w):
    return spectral_norm(w, first, n_steps=n_steps, update=update)

  def both_ways(function):
    y, pull, new = jax.vjp(function, w, has_aux=True)
    return y, pull(dy), new

  (*actual, new), (*desired, updates) = jax.jit(
    lambda: (both_ways(ours), both_ways(flax))
  )()
  jax.tree.map(functools.partial(close, tolerance=5e-6), actual, desired)
  jax.tree.map(close, set_leaves(updates, **new._asdict()), updates)


@pytest.mark.parametrize(
  ('axes', 'use_scale'), thinned(FLAX_AXES, [True, False], every=3, keep=2)
)
def test_weight_norm_is_that_of_nnx(axes, use_scale):
  shape, feature_axes, features = axes
  v, g = draw(shape), draw(features, seed=1)
  module = nnx.WeightNorm(
    NNXKernel(v),
    feature_axes=feature_axes,
    use_scale=use_scale,
    scale_init=lambda *_: g,
    rngs=nnx.Rngs(0),
  )
  scale = g if use_scale else None
  ours = compiled(weight_norm, v, scale, feature_axes=feature_axes)
  close(ours, nnx.jit(lambda module: module(0.0))(module))


@pytest.mark.parametrize(
  ('shape', 'steps'), thinned(SHAPES, STEPS, every=4, keep=2)
)
def test_spectral_norm_is_that_of_nnx(shape, steps):
  n_steps, update = steps
  w = draw(shape)

  @nnx.jit
  def make(kernel):
    kernel = NNXKernel(kernel)
    return nnx.SpectralNorm(kernel, n_steps=n_steps, rngs=nnx.Rngs(0))

  module = make(w)
  stats = {path[-1]: stat for path, stat in module.batch_stats.items()}
  first = SpectralNormState(stats['u'][...], stats['sigma'][...])
  y, state = compiled(spectral_norm, w, first, n_steps=n_steps, update=update)
  call = nnx.jit(lambda module: module(0.0, update_stats=update))
  close(y, call(module))
  close(state.u, stats['u'][...])
  close(state.sigma, stats['sigma'][...])


# The transforms, on arrays and trees.

TRANSFORMS = {
  'weight_norm': WeightNorm(),
  'weight_norm_two_axes': WeightNorm(
    feature_axes=(0, -1), use_scale=False, where=is_kernel
  ),
  'weight_norm_whole': WeightNorm(feature_axes=None, epsilon=1e-3),
  'standardization': WeightStandardization(),
  'standardization_scaled': WeightStandardization(
    feature_axes=0, scaled=True, epsilon=1e-3, where=is_kernel
  ),
  'standardization_gain': WeightStandardization(
    feature_axes=None, use_gain=True
  ),
  'spectral_norm': SpectralNorm(),
  'spectral_norm_steps': SpectralNorm(n_steps=3, epsilon=1e-3, where=is_kernel),
}
transforms = pytest.mark.parametrize(
  'transform', TRANSFORMS.values(), ids=TRANSFORMS
)
# One of each kind, for the tests that take long.
KINDS = WeightNorm(), WeightStandardization(use_gain=True), SpectralNorm()
kinds = pytest.mark.parametrize(
  'transform', KINDS, ids=['weight', 'standard', 'spectral']
)


@pytest.mark.parametrize(
  ('transform', 'update'), thinned(TRANSFORMS.values(), [True, False], every=2)
)
def test_transform_of_a_tree_is_the_function_on_its_kernels(transform, update):
  weights = network()
  params, state = transform.init(weights)

  def state_at(layer, name, state):
    return type(state)(*(field[layer][name] for field in state))

  def both(weights, state):
    new, new_state = transform.apply(params, state, weights, update=update)
    found, expected = [], []
    for layer, name in PLACES:
      one = state_at(layer, name, state)
      expected.append(of_one(transform, weights[layer][name], one, update))
      found.append((new[layer][name], state_at(layer, name, new_state)))
      assert new[layer]['bias'] is weights[layer]['bias']
    assert new['table'] is weights['table']
    return new, new_state, found, expected

  new, new_state, found, expected = jax.jit(both)(weights, state)
  assert jax.tree.structure(new) == jax.tree.structure(weights)
  assert jax.tree.structure(new_state) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def of_one(transform, weight, state, update):
  """What the function of the transform makes of one weight and its state."""
  options = {'epsilon': transform.epsilon}
  if isinstance(transform, SpectralNorm):
    options.update(n_steps=transform.n_steps, update=update)
    return spectral_norm(weight, state, **options)
  options['feature_axes'] = transform.feature_axes
  if isinstance(transform, WeightNorm):
    return weight_norm(weight, **options), state
  options['scaled'] = transform.scaled
  return weight_standardize(weight, **options), state


def test_parameters_and_state_lie_where_the_weights_do():
  weights = network()
  params, state = WeightNorm().init(weights)
  shapes = jax.tree.map(jnp.shape, params.scale)
  assert shapes == {
    'conv': {'kernel': (4,), 'bias': None},
    'dense': {'kernel': (3,), 'bias': None},
    'table': None,
  }
  assert state == EmptyState()
  params, state = SpectralNorm(param_dtype=jnp.bfloat16).init(weights)
  assert params == NormParams()
  assert state.u['conv'] == {'bias': None, 'kernel': state.u['conv']['kernel']}
  chosen = jax.tree.map(lambda u: (u.shape, u.dtype), tuple(state))
  assert chosen[0]['conv']['kernel'] == ((1, 4), jnp.bfloat16)
  assert chosen[0]['dense']['kernel'] == ((1, 3), jnp.bfloat16)
  assert chosen[1]['dense']['kernel'] == ((), jnp.bfloat16)
  assert state.sigma['dense']['kernel'] == 1


@pytest.mark.parametrize('use_scale', [True, False])
def test_use_scale(use_scale):
  transform = WeightNorm(use_scale=use_scale, param_dtype=jnp.bfloat16)
  params, state = transform.init(draw((5, 4)))
  if not use_scale:
    assert params == NormParams()
  else:
    assert params.scale.dtype == jnp.bfloat16
    scale = draw((4,), jnp.bfloat16, seed=1)
    params = params._replace(scale=scale)
    apply = functools.partial(transform.apply, update=True)
    y, _ = compiled(apply, params, state, draw((5, 4)))
    close(y, weight_norm_reference(draw((5, 4)), wide(scale)))


@both_forms
def test_use_gain(scaled):
  transform = WeightStandardization(
    use_gain=True, scaled=scaled, param_dtype=jnp.bfloat16
  )
  v = draw((5, 4))
  params, state = transform.init(v)
  assert (params.scale.shape, params.scale.dtype) == ((4,), jnp.bfloat16)
  assert jnp.all(params.scale == 1)
  gain = draw((4,), jnp.bfloat16, seed=1)
  params = params._replace(scale=gain)
  w, new = compiled(transform.apply, params, state, v, update=True)
  assert new == EmptyState()
  close(w, weight_standardize_reference(v, wide(gain), scaled=scaled))
  assert WeightStandardization(scaled=scaled).init(v) == (
    NormParams(),
    EmptyState(),
  )


def test_where_sees_paths_and_weights():
  seen = {}

  def where(path, weight):
    seen[path] = weight
    return path == 'conv/kernel'

  weights = network()
  transform = WeightNorm(where=where)
  params, state = transform.init(weights)
  new, _ = transform.apply(params, state, weights, update=True)
  names = 'conv/bias', 'conv/kernel', 'dense/bias', 'dense/kernel', 'table'
  assert tuple(seen) == names
  assert seen['table'] is weights['table']
  assert new['dense']['kernel'] is weights['dense']['kernel']
  close(new['conv']['kernel'], weight_norm_reference(weights['conv']['kernel']))


def test_a_single_array_has_an_empty_path():
  transform = WeightNorm(where=lambda path, weight: path == '')
  v = draw((4,))
  y, _ = transform.apply(*transform.init(v), v, update=True)
  close(y, np.sign(v))


@transforms
def test_init_of_shapes(transform):
  weights = network()
  shapes = jax.eval_shape(lambda: weights)
  for a, b in zip(
    jax.tree.leaves(transform.init(shapes)),
    jax.tree.leaves(transform.init(weights)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


def test_init_draws_each_u_by_itself():
  weights = {'a': draw((5, 4)), 'b': draw((5, 4))}
  transform = SpectralNorm()
  fixed = transform.init(weights)[1].u
  drawn = transform.init(weights, jax.random.key(1))[1].u
  assert not np.allclose(fixed['a'], fixed['b'])
  assert not np.allclose(fixed['a'], drawn['a'])
  np.testing.assert_array_equal(
    transform.init(weights, jax.random.key(1))[1].u['b'], drawn['b']
  )


@kinds
def test_jit_takes_the_transform_as_static(transform):
  weights = network()
  params, state = transform.init(weights)

  @functools.partial(jax.jit, static_argnums=0)
  def apply(transform, params, state, weights):
    return transform.apply(params, state, weights, update=True)

  actual = apply(transform, params, state, weights)
  closed_over = functools.partial(transform.apply, update=True)
  desired = compiled(closed_over, params, state, weights)
  jax.tree.map(close, actual, desired)


@kinds
def test_vmap_over_stacked_layers(transform):
  layers = [network(seed) for seed in range(3)]
  stacked = jax.tree.map(lambda *w: np.stack(w), *layers)
  params, state = jax.jit(jax.vmap(transform.init))(stacked)

  @jax.jit
  def apply(params, state, weights):
    return transform.apply(params, state, weights, update=True)

  actual = jax.jit(jax.vmap(apply))(params, state, stacked)
  params, state, actual = jax.device_get((params, state, actual))
  for i, weights in enumerate(layers):
    p, s = jax.tree.map(lambda x, i=i: x[i], (params, state))
    desired = apply(p, s, weights)
    jax.tree.map(close, jax.tree.map(lambda x, i=i: x[i], actual), desired)


@pytest.mark.parametrize(
  ('transform', 'spec'),
  thinned(KINDS, [('x', 'y'), (None, 'y'), ('x', None)], every=3),
  ids=str,
)
def test_explicit_sharding(transform, spec):
  """Weights keep their sharding, the state its own, as a scan asks."""
  w = draw((4, 6))
  params, first = transform.init(w)

  @jax.jit
  def steps(w):
    def body(state, _):
      y, state = transform.apply(params, state, w, update=True)
      return state, y

    state, ys = jax.lax.scan(body, first, length=2)
    return ys[-1], state

  desired = steps(w)
  mesh = jax.make_mesh(
    (2, 2), ('x', 'y'), (jax.sharding.AxisType.Explicit,) * 2
  )
  with jax.set_mesh(mesh):
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    sharded = jax.device_put(w, sharding)
    actual = steps(sharded)
    assert actual[0].sharding == sharding
  jax.tree.map(close, actual, desired)


def test_options_hash_and_compare():
  assert WeightNorm(feature_axes=[0, 1]) == WeightNorm(feature_axes=(0, 1))
  assert hash(WeightNorm(feature_axes=[0, 1])) is not None
  assert SpectralNorm(n_steps=2) != SpectralNorm()
  assert WeightStandardization() == WeightStandardization(epsilon=None)
  assert WeightStandardization(scaled=True) != WeightStandardization()
  assert SpectralNorm(dtype='bfloat16').dtype == jnp.bfloat16


@kinds
def test_dtype_of_a_transform(transform):
  transform = type(transform)(dtype=jnp.bfloat16, where=is_kernel)
  weights = network()
  new, _ = transform.apply(*transform.init(weights), weights, update=True)
  assert new['conv']['kernel'].dtype == jnp.bfloat16
  assert new['conv']['bias'].dtype == jnp.float32


def test_nnx_state():
  layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
  weights = nnx.state(layer, nnx.Param)
  kernel = layer.kernel[...]
  transform = WeightNorm(where=is_kernel)
  new, _ = transform.apply(*transform.init(weights), weights, update=True)
  x = draw((2, 4))
  close(nnx.merge(nnx.graphdef(layer), new)(x), x @ weight_norm(kernel), 1e-5)
  np.testing.assert_array_equal(layer.kernel[...], kernel)


@kinds
def test_training_with_optax(transform):
  """Weights and scales train together; the state rides along, under scan."""
  x, y = draw((16, 4)), draw((16, 3), seed=1)
  model = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(3)])
  weights = jax.jit(model.init)(jax.random.key(0), x)['params']
  params, state = transform.init(weights)
  optimizer = optax.adam(1e-2)

  def loss(trained, state):
    params, weights = trained
    weights, state = transform.apply(params, state, weights, update=True)
    return jnp.mean((model.apply({'params': weights}, x) - y) ** 2), state

  def step(carry, _):
    trained, state, moments = carry
    (value, state), grads = jax.value_and_grad(loss, has_aux=True)(
      trained, state
    )
    updates, moments = optimizer.update(grads, moments)
    return (optax.apply_updates(trained, updates), state, moments), value

  @jax.jit
  def train(params, weights, state):
    first = (params, weights), state, optimizer.init((params, weights))
    return jax.lax.scan(step, first, length=50)

  (trained, state, _), losses = train(params, weights, state)
  assert losses[-1] < 0.9 * losses[0]
  for old, new in zip(
    jax.tree.leaves((params, weights)), jax.tree.leaves(trained), strict=True
  ):
    assert not np.allclose(old, new)
  if isinstance(transform, SpectralNorm):
    for layer, sigma in state.sigma.items():
      kernel = trained[1][layer]['kernel']
      close(sigma['kernel'], np.linalg.norm(wide(kernel), 2), 5e-2)


# Bad input.

W, STATE = jnp.ones((5, 4)), start(4)
WEIGHT_ERRORS = {
  'integer': (
    dict(weight=jnp.ones((5, 4), int)),
    TypeError,
    'weight must .*int',
  ),
  'list': (
    dict(weight=[[1.0]]),
    TypeError,
    'weight must be an array, got list',
  ),
  'axes-range': (
    dict(feature_axes=2),
    ValueError,
    'feature_axes=2 is out of range for an input of rank 2',
  ),
  'axes-twice': (dict(feature_axes=(1, -1)), ValueError, 'names an axis twice'),
  'axes-type': (
    dict(feature_axes=0.5),
    TypeError,
    'feature_axes must be an in',
  ),
  'scale-shape': (
    dict(scale=jnp.ones(5)),
    ValueError,
    r'scale of shape \(5,\) fits neither the feature axes .*\(4,\)',
  ),
  'epsilon': (dict(epsilon=-1), ValueError, 'epsilon must be .*-1'),
  'dtype': (dict(dtype=int), TypeError, 'dtype must have a floating-point'),
  'dtype-real': (
    dict(weight=W.astype(jnp.complex64), dtype=jnp.float32),
    TypeError,
    'dtype=float32 cannot hold the complex result',
  ),
  'scale-complex': (
    dict(scale=jnp.ones(4, jnp.complex64)),
    TypeError,
    'dtype=float32 cannot hold the complex result',
  ),
}
STANDARD_ERRORS = {
  'integer': (dict(weight=jnp.ones(4, int)), TypeError, 'weight must .*int'),
  'axes-range': (
    dict(feature_axes=2),
    ValueError,
    'feature_axes=2 is out of range for an input of rank 2',
  ),
  'gain-shape': (
    dict(gain=jnp.ones(5)),
    ValueError,
    r'gain of shape \(5,\) fits neither the feature axes .*\(4,\)',
  ),
  'gain-complex': (
    dict(gain=jnp.ones(4, jnp.complex64)),
    TypeError,
    'dtype=float32 cannot hold the complex result of gain',
  ),
  'vector': (
    dict(weight=jnp.ones(4)),
    ValueError,
    r'weight has shape \(4,\), and only 1 element .*Give other feature_axes',
  ),
  'one-input': (
    dict(weight=jnp.ones((1, 1, 4))),
    ValueError,
    r'only 1 element shares a mean along the axes \(0, 1\)',
  ),
  'empty': (dict(weight=jnp.ones((0, 4))), ValueError, 'only 0 element'),
  'scaled': (dict(scaled=1), TypeError, 'scaled must be True or False'),
  'epsilon': (dict(epsilon=-1.0), ValueError, 'epsilon must be .*-1'),
  'epsilon-type': (dict(epsilon='a'), TypeError, 'epsilon must be a Python n'),
  'dtype': (dict(dtype=int), TypeError, 'dtype must have a floating-point'),
}
SPECTRAL_ERRORS = {
  'integer': (
    dict(weight=jnp.ones((5, 4), int)),
    TypeError,
    'weight must .*int',
  ),
  'complex': (
    dict(weight=W.astype(jnp.complex64)),
    TypeError,
    'weight must be real in spectral norm, got complex64',
  ),
  'vector': (
    dict(weight=jnp.ones(4)),
    ValueError,
    r'weight must have rank two or more, got shape \(4,\)',
  ),
  'state': (
    dict(state=(STATE.u, STATE.sigma)),
    ValueError,
    r'state must be SpectralNormState\(u, sigma\), got tuple',
  ),
  'u-shape': (
    dict(state=STATE._replace(u=jnp.ones((1, 5)))),
    ValueError,
    r'state.u has shape \(1, 5\).* 4 columns .* takes \(1, 4\)',
  ),
  'u-type': (dict(state=STATE._replace(u=None)), TypeError, 'state.u must be'),
  'u-complex': (
    dict(state=STATE._replace(u=STATE.u + 1j)),
    TypeError,
    'state.u must be real',
  ),
  'sigma-shape': (
    dict(state=STATE._replace(sigma=jnp.ones(1))),
    ValueError,
    r'state.sigma has shape \(1,\).* takes \(\)',
  ),
  'steps': (dict(n_steps=0), ValueError, 'n_steps must be 1 or more, got 0'),
  'steps-type': (dict(n_steps=1.5), TypeError, 'n_steps must be a Python int'),
  'update': (dict(update=jnp.array(True)), TypeError, 'update must be True or'),
  'epsilon': (dict(epsilon=np.nan), ValueError, 'epsilon must be .*nan'),
  'dtype': (dict(dtype=int), TypeError, 'dtype must have a floating-point'),
}


def rows(table):
  return pytest.mark.parametrize(
    ('arguments', 'error', 'message'), table.values(), ids=table
  )


@rows(WEIGHT_ERRORS)
def test_weight_norm_raises(arguments, error, message):
  with pytest.raises(error, match=message):
    weight_norm(**(dict(weight=W) | arguments))


@rows(STANDARD_ERRORS)
def test_weight_standardize_raises(arguments, error, message):
  with pytest.raises(error, match=message):
    weight_standardize(**(dict(weight=W) | arguments))


@rows(SPECTRAL_ERRORS)
def test_spectral_norm_raises(arguments, error, message):
  with pytest.raises(error, match=message):
    spectral_norm(**(dict(weight=W, state=STATE) | arguments))


@pytest.mark.parametrize(
  ('make', 'error', 'message'),
  [
    (lambda: WeightNorm(-1), TypeError, 'positional'),
    (lambda: WeightNorm(epsilon=-1), ValueError, 'epsilon must'),
    (lambda: WeightNorm(param_dtype=int), TypeError, 'param_dtype must'),
    (lambda: WeightNorm(dtype=int), TypeError, 'dtype must'),
    (lambda: WeightNorm(feature_axes='a'), TypeError, 'feature_axes must'),
    (lambda: WeightNorm(where='kernel'), TypeError, "where must .*'kernel'"),
    (lambda: WeightNorm(epsilon=None), TypeError, 'epsilon must'),
    (lambda: WeightStandardization(epsilon=-1), ValueError, 'epsilon must'),
    (lambda: WeightStandardization(scaled=1), TypeError, 'scaled must be'),
    (lambda: WeightStandardization(use_gain=1), TypeError, 'use_gain must be'),
    (
      lambda: WeightStandardization().init({'a': W, 'b': W[:1]}),
      ValueError,
      "only 1 element shares a mean(.|\n)*weight is 'b'",
    ),
    (lambda: SpectralNorm(n_steps=0), ValueError, 'n_steps must be 1 or more'),
    (
      lambda: WeightNorm().init({'w': W[0]}),
      ValueError,
      r"where=None chooses none of the weights, .*\['w'\]",
    ),
    (
      lambda: WeightNorm(where=lambda p, w: p == 'x').init({'w': W}),
      ValueError,
      'chooses none',
    ),
    (
      lambda: WeightNorm(feature_axes=1, where=lambda p, w: True).init(
        {'a': {'b': W[0]}}
      ),
      ValueError,
      "feature_axes=1 is out of range(.|\n)*weight is 'a/b'",
    ),
    (
      lambda: SpectralNorm(where=lambda p, w: True).init(network()),
      ValueError,
      "rank two or more, got shape(.|\n)*weight is 'conv/bias'",
    ),
    (
      lambda: WeightNorm(where=lambda p, w: True).init(jnp.ones((2, 3), int)),
      TypeError,
      'weight must have a floating-point',
    ),
  ],
)
def test_transform_raises(make, error, message):
  with pytest.raises(error, match=message):
    make()


def test_params_and_state_must_be_those_of_init():
  weights = network()
  wn, sn = WeightNorm(), SpectralNorm()
  scales, nothing = wn.init(weights)
  none, state = sn.init(weights)
  less = {k: v for k, v in scales.scale.items() if k != 'conv'}
  wrong = [
    (wn, none, nothing, r"params must be NormParams\(scale={'conv': .*'\*'"),
    (wn, NormParams(scale=less), nothing, 'params must be NormParams'),
    (wn, scales, state, r'state must be EmptyState\(\)'),
    (wn, scales._replace(bias=jnp.ones(4)), nothing, 'bias=None'),
    (WeightNorm(use_scale=False), scales, nothing, 'params must be'),
    (WeightStandardization(), scales, nothing, 'params must be NormParams'),
    (WeightStandardization(use_gain=True), none, nothing, 'params must be'),
    (
      WeightStandardization(use_gain=True),
      scales,
      state,
      r'state must be EmptyState\(\)',
    ),
    (sn, scales, state, r'params must be NormParams\(scale=None'),
    (sn, none, nothing, r'state must be SpectralNormState\(u={'),
    (sn, none, state._replace(sigma=None), 'state must be SpectralNormState'),
  ]
  for transform, params, state, message in wrong:
    with pytest.raises(ValueError, match=message):
      transform.apply(params, state, weights, update=True)


def test_update_must_be_given():
  for transform in (WeightNorm(), WeightStandardization(), SpectralNorm()):
    with pytest.raises(TypeError, match='update'):
      transform.apply(*transform.init(W), W)


def test_raises_while_tracing():
  """Shapes are enough for the message."""
  vector = jax.ShapeDtypeStruct((4,), jnp.float32)
  with pytest.raises(ValueError, match='rank two or more'):
    jax.eval_shape(lambda w: spectral_norm(w, STATE), vector)
  with pytest.raises(ValueError, match='scale of shape'):
    jax.eval_shape(lambda v: weight_norm(v, v[:3]), vector)
