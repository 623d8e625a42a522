"""Gradients in half precision and at extreme scales, and other ways to call.

The true gradient is a difference of terms that may be much larger than it is.
It is rounded once, when it is made narrow: where it is small by cancellation
it is right too.
"""

import functools

import cases
from cases import draw
import chex
import family
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from test_conformance import inputs, train
import test_gated
from test_kernels import (
  Rows,
  group_norm_of,
  name,
  norm_of,
  platform,
  programs_of_one_platform,
)
from tiers import thinned

import normkit as nk
from normkit import weights

__all__ = ['name', 'platform', 'programs_of_one_platform']

ROUNDING = {'bfloat16': 2.0**-8, 'float16': 2.0**-11}
# Mean 1 and deviation 2 of x and dy, unless said otherwise.
GRADIENTS = {
  'a large mean': ('bfloat16', lambda x, dy: (x, 100 + dy / 2)),
  'parallel to x': ('bfloat16', lambda x, dy: (x, x * (1 + 0.01 * dy))),
  'near the largest': ('float16', lambda x, dy: (x / 100, 2048 + 16 * dy)),
}


def given(kind, shape):
  """x and the gradient of y, both narrow."""
  dtype, form = GRADIENTS[kind]
  x, dy = (np.asarray(draw(shape, seed=seed)) for seed in (0, 9))
  return [jax.device_put(np.asarray(a, dtype)) for a in form(x, dy)]


def assert_rounded_once(actual, desired, terms):
  """Within a rounding of the exact value, and float32's of its terms."""
  rounding = ROUNDING[actual.dtype.name]
  largest = float(jnp.finfo(actual.dtype).max)
  inside = np.abs(desired) < (1 - rounding) * largest
  actual = np.asarray(actual, np.float64)
  assert np.isfinite(actual[inside]).all()
  error = np.abs(actual - desired)[inside]
  allowed = rounding * np.abs(desired) + 2e-6 * terms
  assert (error <= allowed[inside]).all(), (error / allowed[inside]).max()


def case_name(value):
  return getattr(value, 'name', None)


# Of x that is its own gate the gradient is a sum of two that are each rounded.
ALONE = [c for c in cases.CASES if not isinstance(c.transform, cases.SelfGated)]


@functools.cache
def pull_of(case, masked):
  """The gradient of x; what each kind of gradient has in one dtype is given."""
  params, state, _, where = inputs(case, masked=masked)
  apply = train(case)

  @jax.jit
  def pull(x, dy):
    return jax.vjp(lambda x: apply(params, state, x, where)[0], x)[1](dy)[0]

  return pull, params, where


@pytest.mark.parametrize(
  ('case', 'kind'), thinned(ALONE, GRADIENTS, every=16), ids=case_name
)
def test_one_rounding(case, kind):
  """Every other one with a mask; each kind of gradient has both."""
  x, dy = given(kind, case.shape)
  masked = (ALONE.index(case) + (x.dtype == jnp.float16)) % 2 == 0
  pull, params, where = pull_of(case, masked)
  desired = case.reference.gradients(params, x, dy, where)[0]
  terms = 10 * float(np.abs(reference.wide(dy)).max() / reference.wide(x).std())
  # Differences of the reference have an error of their own.
  terms = terms * max(1, case.reference.gradient_error / 2e-7)
  assert_rounded_once(pull(x, dy), desired, terms)


@pytest.mark.parametrize(
  ('kind', 'last'), thinned(GRADIENTS, [True, False], every=3)
)
def test_one_rounding_with_a_gate(kind, last):
  x, dy = given(kind, (6, 40))
  gate = draw(x.shape, x.dtype, seed=2)
  norm = functools.partial(nk.gated_rms_norm, norm_before_gate=last)
  found = jax.jit(lambda *a: jax.vjp(norm, *a)[1](dy))(x, gate)
  desired = test_gated.gradients(x, gate, np.ones(40), dy, last, None)
  terms = 10 * float(np.abs(reference.wide(dy)).max() / reference.wide(x).std())
  for actual, exact in zip(found, desired[:2], strict=True):
    assert_rounded_once(actual, exact, 8 * terms)


@pytest.mark.parametrize(
  ('of', 'kind'), thinned(['layer', 'rms', 'group'], GRADIENTS, every=12)
)
def test_one_rounding_by_kernel(name, of, kind):
  shape = (2, 5, 12) if of == 'group' else (6, 40)
  x, dy = given(kind, shape)
  if (name, x.dtype) == ('mosaic_tpu', jnp.float16):
    pytest.skip('TPUs have no float16: test_refused holds the error')
  scale, bias = draw(shape[-1:], seed=2), draw(shape[-1:], seed=3)
  norm, exact = (
    norm_of(of == 'layer', name),
    Rows(x, scale, bias, of == 'layer'),
  )
  if of == 'group':
    norm, exact = group_norm_of(3, name), Rows(x, scale, bias, True, 3)
  dx = jax.jit(lambda x: jax.vjp(lambda x: norm(x, scale, bias), x)[1](dy)[0])
  terms = 10 * float(np.abs(reference.wide(dy)).max() * exact.root.max())
  assert_rounded_once(dx(x), exact.gradients(dy)[0], terms)


@pytest.mark.parametrize(
  ('center', 'implementation'),
  thinned([True, False], ['xla', None, 'triton', 'mosaic_tpu'], every=2),
)
def test_sums(center, implementation, request):
  """y is the norm of the sum unrounded, and gradients are of what is kept."""
  if implementation in ('triton', 'mosaic_tpu'):
    patch = request.getfixturevalue('monkeypatch')
    patch.setattr('normkit.kernels.dispatch.interpreted', implementation)
    jax.clear_caches()
  x, residual, dy, dtotal = (
    draw((6, 40), 'bfloat16', seed=i) for i in range(4)
  )
  scale, bias = draw(40, seed=4), draw(40, seed=5) if center else 0.0
  parameters = (scale, bias) if center else (scale,)
  add = nk.add_layer_norm if center else nk.add_rms_norm
  options = {'implementation': implementation, 'dtype': jnp.float32}

  @jax.jit
  def step(x, residual):
    run = functools.partial(add, **options)
    y, pull = jax.vjp(lambda *a: run(*a, *parameters), x, residual)
    return *y, *pull((dy.astype(jnp.float32), dtotal))

  with jax.numpy_rank_promotion('allow'):
    y, total, dx, dresidual = step(x, residual)
  exact = np.asarray(x, np.float64) + np.asarray(residual, np.float64)
  desired = Rows(exact, scale, bias, center)
  np.testing.assert_allclose(y, desired.y, atol=2e-6 * np.abs(desired.y).max())
  np.testing.assert_array_equal(total, np.asarray(exact, jnp.bfloat16))
  kept = Rows(total, scale, bias, center).gradients(dy)[0]
  kept = kept + np.asarray(dtotal, np.float64)
  # The statistics are those of the sum, or of what is kept of it.
  assert_rounded_once(dx, kept, 500 * np.abs(reference.wide(dy)).max())
  np.testing.assert_array_equal(dx, dresidual)


@pytest.mark.parametrize('form', ['scale', 'mask'])
def test_sums_without_a_kernel(form):
  """What kernels do not take: the same rounding, and every mode."""
  x, residual = (draw((6, 40), 'bfloat16', seed=i) for i in range(2))
  scale = draw((6, 1) if form == 'scale' else (1, 40), seed=4)
  add = functools.partial(nk.add_rms_norm, implementation='xla')
  y, _ = jax.jit(functools.partial(add, dtype=jnp.float32))(x, residual, scale)
  exact = np.asarray(x, np.float64) + np.asarray(residual, np.float64)
  desired = Rows(exact, scale, 0.0, False)
  np.testing.assert_allclose(y, desired.y, atol=2e-6 * np.abs(desired.y).max())
  wide = x.astype(jnp.float32), residual.astype(jnp.float32), scale
  chex.assert_trees_all_close(
    jax.jit(jax.jacfwd(lambda *a: add(*a)[0].sum()))(*wide),
    jax.jit(jax.jacrev(lambda *a: add(*a)[0].sum()))(*wide),
    atol=1e-4,
  )


SCALED = {
  'layer': (nk.LayerNorm(epsilon=0.0), reference.layer_norm(epsilon=0.0)),
  'layer_xla': (
    nk.LayerNorm(epsilon=0.0, implementation='xla'),
    reference.layer_norm(epsilon=0.0),
  ),
  'layer_tiny': (
    nk.LayerNorm(epsilon=1e-37),
    reference.layer_norm(epsilon=0.0),
  ),
  'rms': (nk.RMSNorm(epsilon=0.0), reference.rms_norm(epsilon=0.0)),
  'batch': (nk.BatchNorm(epsilon=0.0), reference.batch_norm(epsilon=0.0)),
  'group': (
    nk.GroupNorm(num_groups=2, epsilon=0.0),
    reference.group_norm(num_groups=2, epsilon=0.0),
  ),
  'instance': (
    nk.InstanceNorm(epsilon=0.0),
    reference.instance_norm(epsilon=0.0),
  ),
  'response': (
    nk.FilterResponseNorm(epsilon=0.0, use_threshold=False),
    family.filter_response(epsilon=0.0),
  ),
  'scale': (nk.ScaleNorm(epsilon=0.0), family.scale_norm(epsilon=0.0)),
}
SCALES = 1e-15, 1e-13, 1e13, 1e15


@pytest.mark.parametrize(('kind', 'scale'), thinned(SCALED, SCALES, every=6))
def test_extreme_scales(kind, scale):
  """The norm of s x is that of x, so that its gradient is 1 / s of that."""
  transform, exact = SCALED[kind]
  shape = (3, 5, 4)
  x, dy = draw(shape), draw(shape, seed=9)
  params, state = transform.init(x)

  @jax.jit
  def pull(x):
    run = functools.partial(transform.apply, params, state, train=True)
    return jax.vjp(lambda x: run(x)[0], x)[1](dy)[0]

  scaled = np.float32(scale) * np.asarray(x)
  same = np.asarray(scaled, np.float64) / scale
  if kind == 'response':
    params = params._replace(threshold=None)
  desired = exact.gradients(params, same, dy)[0]
  found = np.asarray(pull(scaled), np.float64) * scale
  size = np.abs(desired).max()
  np.testing.assert_allclose(found / size, desired / size, atol=2e-6)


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize(
  ('norm', 'center'),
  [
    (functools.partial(weights.weight_norm, epsilon=0.0), False),
    (functools.partial(weights.weight_standardize, epsilon=0.0), True),
    (
      functools.partial(weights.weight_standardize, epsilon=0.0, scaled=True),
      True,
    ),
  ],
  ids=['weight_norm', 'standardize', 'scaled'],
)
def test_extreme_scales_of_weights(norm, center, scale):
  v, dw = draw((12, 3)), draw((12, 3), seed=9)
  scaled = np.float32(scale) * np.asarray(v)
  dv = jax.jit(lambda v: jax.vjp(norm, v)[1](dw)[0])(scaled)
  v, dw = np.asarray(scaled, np.float64).T / scale, np.asarray(dw, np.float64).T
  d = v - v.mean(-1, keepdims=True) if center else v
  length = np.sqrt((d * d).sum(-1, keepdims=True))
  unit = d / length
  desired = (dw - unit * (dw * unit).sum(-1, keepdims=True)) / length
  if center:
    desired -= desired.mean(-1, keepdims=True)
    if norm.keywords.get('scaled') is None:
      desired *= np.sqrt(v.shape[-1])
  found = np.asarray(dv, np.float64).T * scale
  size = np.abs(desired).max()
  np.testing.assert_allclose(found / size, desired / size, atol=2e-6)


@pytest.mark.parametrize('scale', thinned(SCALES, every=4))
def test_extreme_scales_of_whitening(scale):
  """Its epsilon is small beside the variances, at each scale."""
  x, dy = draw((16, 4)), draw((16, 4), seed=9)

  def gradient(x, epsilon):
    norm = nk.IterativeWhitening(group_size=2, epsilon=epsilon)
    params, state = norm.init(x)
    run = functools.partial(norm.apply, params, state, train=True)
    return jax.jit(lambda x: jax.vjp(lambda x: run(x)[0], x)[1](dy)[0])(x)

  desired = family.whitening(group_size=2, epsilon=1e-3).gradients(
    nk.IterativeWhitening(group_size=2).init(x)[0], x, dy
  )[0]
  found = gradient(np.float32(scale) * np.asarray(x), 1e-3 * scale**2)
  size = np.abs(desired).max()
  np.testing.assert_allclose(
    np.asarray(found, np.float64) * scale / size, desired / size, atol=2e-5
  )


@pytest.mark.second_tier
def test_sums_and_weights_without_implicit_promotion():
  x, scale = jnp.ones((4, 6), jnp.bfloat16), jnp.ones(6)
  with jax.numpy_dtype_promotion('strict'):
    for norm in (
      lambda x: nk.add_layer_norm(x, x, scale, scale)[0],
      lambda x: nk.adaptive_instance_norm(x[None], x[None]),
      lambda x: nk.moments(x, 0, where=x > 0).var,
      lambda x: weights.weight_norm(x, scale),
      lambda x: weights.weight_standardize(x, scale),
    ):
      pull = jax.vjp(norm, x)[1]
      assert jax.eval_shape(norm, x) == jax.eval_shape(norm, *pull(norm(x)))


def test_parameters_are_rounded_once():
  """Of bfloat16, used twice: with a mean, 100 times the rest, in x."""
  x, dy = np.asarray(draw((64, 40))) + 200, draw((64, 40), seed=1)
  scale, bias = (draw(40, 'bfloat16', seed=i) for i in (2, 3))
  exact = Rows(x, scale, bias, True).gradients(dy)
  for implementation in None, 'xla':
    norm = functools.partial(nk.layer_norm, implementation=implementation)
    found = jax.jit(lambda *a: jax.vjp(norm, *a)[1](dy))(x, scale, bias)  # noqa: B023
    for actual, desired in zip(found[1:], exact[1:], strict=True):
      assert_rounded_once(actual, desired, 64.0)
