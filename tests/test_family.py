"""What the wider family promises beyond the conformance suite."""

import dataclasses
import functools
import math

from cases import SelfGated, draw
import chex
import family
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import optax
import pytest
from tiers import thinned

import normkit as nk
from normkit.masks import decay_mask

STATE = jax.device_put(
  nk.BatchNormState(
    np.float32([0.5, -2.0, 1.0]),
    np.float32([40.0, 0.3, 1.0]),
    np.full(3, 7, np.int32),
  )
)


def compiled(function, *args, **options):
  """A call in one program: eagerly, each operation would be one."""
  return jax.jit(functools.partial(function, **options))(*args)


class TestBatchRenorm:
  @pytest.mark.parametrize('limits', [(1.0, 0.0), (1.2, 0.3), (50.0, 50.0)])
  def test_values(self, limits):
    x, scale, bias = draw((6, 2, 3)), draw(3, seed=1), draw(3, seed=2)
    options = {'train': True, 'r_max': limits[0], 'd_max': limits[1]}
    y, state = compiled(nk.batch_renorm, x, STATE, scale, bias, **options)
    params = nk.NormParams(scale, bias)
    of = family.batch_renorm(*limits)
    chex.assert_trees_all_close(
      (y, state), of(params, STATE, x, True), rtol=1e-5, atol=1e-5
    )

  def test_without_limits_training_is_evaluation(self):
    x = draw((6, 3))
    options = {'r_max': np.inf, 'd_max': np.inf}
    y, _ = compiled(nk.batch_renorm, x, STATE, train=True, **options)
    z, _ = compiled(nk.batch_renorm, x, STATE, train=False, **options)
    np.testing.assert_allclose(y, z, atol=1e-5)

  def test_gradients_hold_r_and_d(self):
    """Those of batch norm whose result is then scaled and moved."""
    x, dy = draw((6, 3)), draw((6, 3), seed=1)
    options = {'r_max': 1.5, 'd_max': 0.7}

    def renormed(x):
      return nk.batch_renorm(x, STATE, train=True, **options)[0]

    def normed(x):
      return nk.batch_norm(x, STATE, train=True)[0]

    def pulled(x, dy):
      y, pull = jax.vjp(renormed, x)
      n, pull_normed = jax.vjp(normed, x)
      r = (y[0] - y[1]) / (n[0] - n[1])
      return r, pull(dy)[0], pull_normed(r[None] * dy)[0]

    r, found, want = compiled(pulled, x, dy)
    assert np.ptp(r) > 0.1  # the features differ
    np.testing.assert_allclose(found, want, atol=1e-5)

  def test_schedules(self):
    """By the updates so far, which differ between features."""
    r_max = optax.linear_schedule(1.0, 3.0, 10, 5)
    d_max = optax.linear_schedule(0.0, 5.0, 10, 5)
    state = STATE._replace(count=np.int32([0, 10, 40]))
    norm = nk.BatchRenorm(r_max=r_max, d_max=d_max)
    x = 3 * np.asarray(draw((8, 3)))
    params, _ = norm.init(x)
    y, _ = jax.jit(norm.apply, static_argnames='train')(
      params, state, x, train=True
    )
    for feature, limits in enumerate([(1.0, 0.0), (2.0, 2.5), (3.0, 5.0)]):
      want, _ = family.batch_renorm(*limits)(params, STATE, x, True)
      np.testing.assert_allclose(y[:, feature], want[:, feature], atol=2e-5)

  def test_schedules_of_the_paper(self):
    x = 100 + np.asarray(draw((8, 3)))
    counts = np.array([5_000, 22_500, 40_000], np.int32)
    state = nk.BatchNormState(np.zeros(3), np.ones(3), counts)
    y, _ = compiled(nk.batch_renorm, x, state, train=True)
    y = np.asarray(y)
    np.testing.assert_allclose(y.mean(0), [0, 4.375, 5], atol=1e-4)
    spread = np.minimum(np.std(x, 0), [1, 2, 3])
    np.testing.assert_allclose(y.std(0), spread, rtol=1e-4)

  @pytest.mark.parametrize(
    ('options', 'match'),
    [({'r_max': 0.5}, 'r_max must be 1'), ({'d_max': -1.0}, 'd_max must be 0')],
  )
  def test_errors(self, options, match):
    with pytest.raises(ValueError, match=match):
      nk.BatchRenorm(**options)
    with pytest.raises(ValueError, match=match):
      nk.batch_renorm(jnp.ones((2, 3)), STATE, train=True, **options)
    with pytest.raises(TypeError, match='r_max'):
      nk.BatchRenorm(r_max='3')
    with pytest.raises(ValueError, match='r_max must give one number'):
      nk.batch_renorm(
        jnp.ones((2, 3)), STATE, train=True, r_max=lambda n: jnp.ones(2) * n
      )

  def test_schedules_stay_in_their_limits(self):
    x = draw((6, 3))
    options = {'r_max': lambda n: 0.0, 'd_max': lambda n: -1.0}
    low, _ = compiled(nk.batch_renorm, x, STATE, train=True, **options)
    same, _ = compiled(nk.batch_norm, x, STATE, train=True)
    np.testing.assert_allclose(low, same, atol=1e-6)


class TestStreamingNorm:
  def test_batches_of_one_tell_the_variance(self):
    xs = np.asarray(draw((2000, 1, 3))) * np.float32([[[1.0, 3.0, 0.1]]])
    norm = nk.StreamingNorm(momentum=None)
    params, state = norm.init(xs[0])

    def step(state, x):
      y, state = norm.apply(params, state, x, train=True)
      return state, y

    state, ys = jax.device_get(jax.lax.scan(step, state, xs))
    np.testing.assert_allclose(state.mean, xs.mean((0, 1)), rtol=1e-4)
    np.testing.assert_allclose(state.var, xs.var((0, 1)), rtol=1e-3)
    np.testing.assert_allclose(ys[1000:].std((0, 1)), 1, atol=0.1)

  def test_gradient_of_one_element_is_not_zero(self):
    def total(x):
      return nk.streaming_norm(x, STATE, train=True, momentum=0.9)[0].sum()

    assert np.all(jax.jit(jax.grad(total))(draw((1, 3))) != 0)

  def test_earlier_batches_are_constant(self):
    def later(x):
      _, state = nk.streaming_norm(x, STATE, train=True)
      return nk.streaming_norm(draw((2, 3)), state, train=True)[0].sum()

    found = jax.jit(jax.grad(later))(draw((2, 3), seed=1))
    np.testing.assert_array_equal(found, 0)


class TestGlobalResponseNorm:
  @pytest.mark.parametrize('shape', [(2, 7, 4), (2, 3, 4, 4), (2, 3, 2, 2, 4)])
  def test_any_number_of_places(self, shape):
    x, scale, bias = draw(shape), draw(4, seed=1), draw(4, seed=2)
    y = compiled(nk.global_response_norm, x, scale, bias)
    params = nk.NormParams(scale, bias)
    want, _ = family.global_response()(params, None, x, True)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    x, y = np.asarray(x), np.asarray(y)
    norm = functools.partial(nk.global_response_norm, batch_axis=())
    alone = compiled(norm, x[0], scale, bias)
    np.testing.assert_allclose(alone, y[0], rtol=1e-6, atol=1e-6)

  def test_starts_as_the_identity(self):
    x = draw((2, 5, 4), jnp.bfloat16)
    for norm in nk.GlobalResponseNorm(), nk.GlobalResponseNorm(scale_offset=2):
      y, _ = compiled(norm.apply, *norm.init(x), x, train=True)
      chex.assert_trees_all_equal(y, x)

  def test_bfloat16_is_rounded_once(self):
    x = draw((2, 50, 16), jnp.bfloat16)
    params = nk.NormParams(*(draw(16, jnp.bfloat16, i) for i in (1, 2)))
    y = jax.jit(nk.global_response_norm)(x, *params)
    want, _ = family.global_response()(params, None, x, True)
    error = np.abs(np.asarray(y, float) - want)
    np.testing.assert_array_less(error, 2.0**-8 * np.abs(want) + 1e-5)

  @pytest.mark.parametrize('epsilon', [0.0, 1e-6])
  def test_channels_of_zeros(self, epsilon):
    """As behind a ReLU: the root's derivative there is zero, not infinite."""

    def run(x, scale):
      return nk.global_response_norm(x, scale, epsilon=epsilon).sum()

    one = np.array(draw((2, 5, 4)))
    one[..., 0] = one[1] = 0
    grads = compiled(jax.grad(run, (0, 1)), one, draw(4, seed=1))
    chex.assert_tree_all_finite(grads)
    np.testing.assert_array_equal(grads[0][1], 1)

  def test_padding_is_as_if_left_out(self):
    x, scale = np.array(draw((2, 9, 4))), draw(4, seed=1)
    want = compiled(nk.global_response_norm, x[:, :5], scale)
    x[:, 5:] = np.nan
    where = np.arange(9)[:, None] < 5
    y = compiled(nk.global_response_norm, x, scale, where=where)
    np.testing.assert_allclose(np.asarray(y)[:, :5], want, rtol=1e-6)

  @pytest.mark.parametrize(
    ('shape', 'options'),
    [((2, 4), {}), ((2, 3, 4), {'axis': (1, 2)}), ((2, 3), {'axis': ()})],
  )
  def test_no_places_or_channels(self, shape, options):
    with pytest.raises(ValueError, match='examples or channels alone'):
      nk.global_response_norm(jnp.ones(shape), **options)

  def test_errors(self):
    x = jnp.ones((2, 3, 4))
    with pytest.raises(ValueError, match='batch_axis=0 and axis share'):
      nk.global_response_norm(x, axis=0)
    with pytest.raises(ValueError, match='scale of shape'):
      nk.global_response_norm(x, jnp.ones(3))
    with pytest.raises(ValueError, match='no elements along'):
      nk.global_response_norm(x[:, :0])


class TestDerf:
  def test_shift_and_alpha(self):
    """One number, or one an example; with neither it is erf."""
    x = draw((3, 4))
    want = np.vectorize(math.erf)(np.asarray(x, float))
    np.testing.assert_allclose(nk.derf(x, 1.0), want, atol=1e-6)
    moved = nk.derf(x - 1, jnp.ones((3, 1)), jnp.ones((3, 1)))
    np.testing.assert_allclose(moved, want, atol=1e-6)
    params, _ = nk.Derf(alpha=0.8, shift=-0.5).init(x)
    assert (params.alpha, params.shift) == (jnp.float32(0.8), -0.5)

  def test_errors(self):
    x = jnp.ones((2, 3))
    for name in 'alpha', 'shift':
      with pytest.raises(ValueError, match=rf'{name} of shape \(3,\)'):
        nk.derf(x, **{'alpha': 1.0, name: jnp.ones(3)})
      with pytest.raises(TypeError, match=f'{name} must be a Python number'):
        nk.Derf(**{name: '1'})
    with pytest.raises(TypeError, match='Derf is for real ones'):
      nk.derf(x.astype(jnp.complex64), 1.0)

  def test_no_parameter_decays(self):
    params, _ = nk.Derf(axis=(0, 1)).init(jnp.ones((2, 3)))
    assert decay_mask(params) == nk.DerfParams(*[False] * 4)
    assert not any(decay_mask(params._asdict()).values())


class TestIterativeWhitening:
  def correlated(self, count, channels=4):
    mix = np.random.default_rng(3).normal(size=(channels, channels))
    return np.asarray(draw((count, channels))) @ np.float32(mix)

  def test_outputs_are_white(self):
    x = self.correlated(400)
    norm = nk.IterativeWhitening(group_size=None, n_steps=12)
    params, state = norm.init(x)
    y, _ = compiled(norm.apply, params, state, x, train=True)
    np.testing.assert_allclose(np.cov(y.T, bias=True), np.eye(4), atol=2e-3)

  def test_fewer_elements_than_channels(self):
    x = self.correlated(3, channels=16)
    norm = nk.IterativeWhitening(group_size=16)
    params, state = norm.init(x)

    def loss(x):
      y, after = norm.apply(params, state, x, train=True)
      return (y**3).sum(), (y, after)

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(x)
    chex.assert_tree_all_finite((grads, out))
    assert np.abs(out[0]).max() < 10

  def test_evaluation_whitens_as_training_did(self):
    x = self.correlated(400)
    norm = nk.IterativeWhitening(group_size=2, momentum=None)
    params, state = norm.init(x)
    y, state = compiled(norm.apply, params, state, x, train=True)
    z, after = compiled(norm.apply, params, state, x, train=False)
    np.testing.assert_allclose(y, z, atol=1e-4)
    chex.assert_trees_all_equal(state, after)

  def test_errors(self):
    with pytest.raises(ValueError, match='group_size=3 does not divide'):
      nk.IterativeWhitening(group_size=3).init(jnp.ones((2, 4)))
    with pytest.raises(ValueError, match='n_steps'):
      nk.IterativeWhitening(n_steps=0)
    with pytest.raises(ValueError, match='epsilon=0'):
      nk.IterativeWhitening(epsilon=0.0)
    _, state = nk.IterativeWhitening(group_size=2).init(jnp.ones((2, 4)))
    with pytest.raises(ValueError, match='6 channels'):
      nk.iterative_whitening(jnp.ones((2, 6)), state, train=True)


CONDITIONED = {
  'batch': lambda x, *given: nk.batch_norm(
    x, nk.BatchNorm().init(x)[1], *given, train=True
  )[0],
  'layer': nk.layer_norm,
  'group': lambda x, *given: nk.group_norm(x, *given, num_groups=2),
  'instance': nk.instance_norm,
  'response': nk.filter_response_norm,
  'evonorm': lambda x, *given: nk.evonorm_s0(
    x, jnp.ones(4), *given, num_groups=2
  ),
  'renorm': lambda x, *given: nk.batch_renorm(x, STATE4, *given, train=True)[0],
  'streaming': lambda x, *given: nk.streaming_norm(
    x, STATE4, *given, train=True
  )[0],
  'global_response': lambda x, *given: nk.global_response_norm(x, *given) - x,
  'dyt': lambda x, *given: nk.dyt(x, 0.5, *given),
  'derf': lambda x, *given: nk.derf(x, 0.5, 0.1, *given),
}
STATE4 = nk.BatchNormState(jnp.zeros(4), jnp.ones(4), jnp.full(4, 30_000))


SPREAD = (2, 1, 1, 4), (2, 3, 5, 4), (1, 3, 5, 1)


@pytest.mark.parametrize('name', thinned(CONDITIONED, every=8), ids=str)
def test_conditioned(name):
  """Scale and bias per example (FiLM, adaLN), per position (SPADE), or both."""
  norm, x = CONDITIONED[name], draw((2, 3, 5, 4))
  given = [(draw(shape, seed=1), draw(shape, seed=2)) for shape in SPREAD]

  def pulled(x, scale, bias):
    y, pull = jax.vjp(norm, x, scale, bias)
    return y, *pull(jnp.ones_like(x))

  def run(x, given):
    return norm(x), [pulled(x, *pair) for pair in given]

  n, found = jax.device_get(compiled(run, x, given))
  for (scale, bias), (y, dx, dscale, dbias) in zip(given, found, strict=True):
    np.testing.assert_allclose(
      y, n * np.asarray(scale) + np.asarray(bias), atol=2e-5
    )
    axes = tuple(a for a in range(4) if scale.shape[a] == 1)
    want = n.sum(axes, keepdims=True)
    np.testing.assert_allclose(dscale, want, atol=2e-4)
    np.testing.assert_allclose(dbias, np.full(bias.shape, x.size / bias.size))
    chex.assert_tree_all_finite(dx)


@pytest.mark.parametrize('shape', [(2, 4), (3, 1, 1, 4), (2, 1, 1, 3)], ids=str)
@pytest.mark.parametrize('norm', CONDITIONED.values(), ids=CONDITIONED)
def test_conditioned_by_a_wrong_shape(norm, shape):
  with pytest.raises(ValueError, match='scale of shape'):
    norm(np.ones((2, 3, 5, 4), np.float32), np.ones(shape, np.float32))


def test_adaptive_instance_norm():
  x, style = draw((2, 5, 6, 3)), draw((2, 7, 2, 3), seed=1)
  style = 4 + 3 * np.asarray(style)
  y = np.asarray(compiled(nk.adaptive_instance_norm, x, style))
  np.testing.assert_allclose(y.mean((1, 2)), style.mean((1, 2)), rtol=1e-4)
  np.testing.assert_allclose(y.std((1, 2)), style.std((1, 2)), rtol=1e-4)
  with pytest.raises(ValueError, match='style has 3 axes'):
    nk.adaptive_instance_norm(x, style[0])
  for other in style[..., :1], jnp.ones((3, 7, 2, 3)):
    with pytest.raises(ValueError, match='must have the channels of x'):
      nk.adaptive_instance_norm(x, other)
  with pytest.raises(TypeError, match='cannot hold its mean'):
    nk.adaptive_instance_norm(x, style.astype(jnp.complex64))


def test_scale_offset():
  """The parameter starts at zero; bfloat16 keeps the digits near zero."""
  norm = nk.RMSNorm(scale_offset=1.0, param_dtype=jnp.bfloat16)
  x = draw((4, 6))
  params, state = norm.init(x)
  chex.assert_trees_all_equal(params.scale, jnp.zeros(6, jnp.bfloat16))
  small = params._replace(scale=jnp.full(6, 1e-3, jnp.bfloat16))
  y, _ = compiled(norm.apply, small, state, x, train=True)
  scale = 1 + np.asarray(small.scale, np.float32)
  np.testing.assert_allclose(y, compiled(nk.rms_norm, x, scale), rtol=1e-6)
  with pytest.raises(TypeError, match='scale_offset'):
    nk.LayerNorm(scale_offset='1')


@pytest.mark.parametrize('ndim', [9, 30])
def test_whitening_of_any_rank(ndim):
  transform = nk.IterativeWhitening(group_size=2)
  x = np.asarray(draw((8, 3, 4)))
  params, state = transform.init(x)

  @jax.jit
  def apply(x):
    return transform.apply(params, state, x, train=True)[0]

  y = apply(x.reshape(8, *[1] * (ndim - 3), 3, 4))
  chex.assert_trees_all_close(y.reshape(x.shape), apply(x), atol=1e-6)


def test_whitening_far_from_zero():
  x = 1e5 + np.asarray(draw((512, 4)))
  norm = nk.IterativeWhitening(group_size=2)
  params, state = norm.init(x)
  y, _ = compiled(norm.apply, params, state, x, train=True)
  np.testing.assert_allclose(np.mean(y, 0), 0, atol=1e-5)


VARIANTS = {
  'batch offset': (nk.BatchNorm(scale_offset=1.0), nk.BatchNorm()),
  'no threshold': (
    nk.FilterResponseNorm(use_threshold=False, use_bias=False),
    family.filter_response(),
  ),
  'no scale': (
    nk.EvoNormS0(num_groups=4, use_scale=False),
    family.evonorm_s0(num_groups=4),
  ),
}


@pytest.mark.parametrize(('norm', 'of'), VARIANTS.values(), ids=VARIANTS)
def test_variants(norm, of):
  x = draw((4, 5, 4))
  params, state = norm.init(x)
  y, _ = compiled(norm.apply, params, state, x, train=True)
  if isinstance(of, nk.BatchNorm):
    want, _ = compiled(of.apply, of.init(x)[0], state, x, train=True)
  else:
    want, _ = of(params, state, x, True)
  np.testing.assert_allclose(y, want, atol=1e-5)


def test_l2_norm_of_queries():
  """QK norm: cosines, times one learned number."""
  q, k = (np.asarray(draw((2, 5, 8), seed=seed)) for seed in range(2))

  @jax.jit
  def scores_of(q, k):
    return nk.l2_norm(q, 3.0) @ nk.l2_norm(k).swapaxes(-1, -2)

  scores = scores_of(q, k)
  length = (
    np.linalg.norm(q, axis=-1)[..., None] * np.linalg.norm(k, axis=-1)[:, None]
  )
  want = 3 * (q @ k.swapaxes(-1, -2)) / length
  np.testing.assert_allclose(scores, want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
  'transform',
  [nk.FilterResponseNorm(), nk.EvoNormS0(num_groups=2), nk.DyT(), nk.Derf()],
)
def test_parameters_of_another(transform):
  x = jnp.ones((2, 3, 4))
  _, state = transform.init(x)
  with pytest.raises(ValueError, match='params must be'):
    transform.apply(nk.NormParams(), state, x, train=True)


SHARDED = {
  'renorm': nk.BatchRenorm(r_max=1.5, d_max=0.5),
  'streaming': nk.StreamingNorm(),
  'whitening': nk.IterativeWhitening(group_size=2, n_steps=2),
  'evonorm_s0': nk.EvoNormS0(num_groups=4),
  'evonorm_b0': nk.EvoNormB0(),
  'response': nk.FilterResponseNorm(),
  'global_response': nk.GlobalResponseNorm(),
  'scale': nk.ScaleNorm(),
  'dyt': nk.DyT(),
  'gated': SelfGated(group_size=4),
  'gate_first': SelfGated(norm_before_gate=False),
  'rounded': nk.RMSNorm(round_before_scale=True),
  'derf': nk.Derf(),
}


@pytest.mark.parametrize('name', thinned(SHARDED, every=12))
def test_explicit_meshes(name):
  """Sharded along all axes and, by turns, one: the same, sharded as x is."""
  norm, x = SHARDED[name], draw((8, 4, 8))
  params, state = norm.init(x)

  @jax.jit
  def run(params, state, x):
    def loss(x):
      y, new = norm.apply(params, state, x, train=True)
      return (y**3).sum(), (y, new)

    return jax.grad(loss, has_aux=True)(x)

  want = run(params, state, x)
  axis = list(SHARDED).index(name) % 3
  along = P(*('d' if a == axis else None for a in range(3)))
  cut = np.asarray(x)  # one on a device is cut by a program
  for spec, sizes in (P('d', 'e', 'f'), (2, 2, 2)), (along, (4,)):
    kinds = (AxisType.Explicit,) * len(sizes)
    mesh = jax.make_mesh(sizes, ('d', 'e', 'f')[: len(sizes)], axis_types=kinds)
    with jax.set_mesh(mesh):
      given = jax.device_put((params, state), NamedSharding(mesh, P()))
      found = run(*given, jax.device_put(cut, NamedSharding(mesh, spec)))
    assert jax.typeof(found[1][0]).sharding.spec == spec
    chex.assert_trees_all_close(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  'name', [n for n in SHARDED if n not in ('derf', 'dyt', 'response')]
)
def test_no_kernels(name):
  x = jnp.ones((4, 5, 8))
  norm = dataclasses.replace(SHARDED[name], implementation='triton')
  with pytest.raises(NotImplementedError, match='no kernel'):
    norm.apply(*norm.init(x), x, train=True)
  with pytest.raises(ValueError, match='implementation must be'):
    dataclasses.replace(norm, implementation='cudnn')
