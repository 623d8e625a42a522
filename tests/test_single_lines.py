"""Lines of which one could be changed and no other test would fail.

Each was found by changing it on purpose, and each test fails with the line so
changed.
"""

import functools
import math
import re

from cases import draw
import chex
from flax import linen as nn, nnx
import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

import normkit as nk
from normkit import affine, centred, samples, sums
import normkit.linen
import normkit.nnx
from normkit.sets import Sets

KEY = jax.random.key(0)
STATE = nk.BatchNormState(
  jnp.full(3, 0.5), jnp.full(3, 2.0), jnp.full(3, 4, jnp.int32)
)


def test_a_variance_is_never_negative():
  """E[d^2] - E[d]^2 of equal elements about another pivot may round below."""
  size = 7
  x = jnp.broadcast_to(jnp.linspace(0.1, 3, 500)[:, None], (500, size))
  count, pivot = jnp.full((1, 1), size, jnp.float32), jnp.zeros((500, 1))
  unclamped = jnp.mean(x * x, 1) - jnp.mean(x, 1) ** 2
  assert (unclamped < 0).any()  # so that there is something to clamp
  assert (centred.about(pivot, x, count, Sets((1,)))[2] >= 0).all()


@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('form', ['_by_steps', '_by_roots', '_by_factors'])
def test_both_parts_of_the_mean_count(form, scaled):
  """In every form of the affine map, of which a platform runs but some."""
  x = draw((4, 6))
  mean = jnp.mean(x, 1, keepdims=True)
  stats = centred.Centred(
    mean - 0.25, jnp.full((4, 1), 0.25), jnp.ones((4, 1)), jnp.full((4, 1), 6.0)
  )
  params = (
    (draw((1, 6), seed=1), draw((1, 6), seed=2)) if scaled else (None,) * 2
  )
  args = affine.Arguments(*params, 0.0, None, jnp.float32, jnp.float32)
  y = getattr(affine, form)(x, stats, args, True)
  exact = np.asarray(x, np.float64)
  exact = exact - exact.mean(1, keepdims=True)
  if scaled:
    exact = exact * np.asarray(params[0]) + np.asarray(params[1])
  np.testing.assert_allclose(y, exact, atol=1e-5)


@pytest.mark.parametrize(
  ('shape', 'axes', 'size'),
  [
    ((64, 64, 8), (0, 1), 128),
    ((64, 5, 64), (0, 2), 128),
    ((5, 4096), (1,), 128),
    ((5, 1024), (1,), 32),
    ((5, 520), (1,), 18),
    ((5, 999), (1,), 32),
    ((64, 3), (0,), 16),
    ((8, 3), (0,), 8),
    ((255, 3), (0,), 32),
    ((3, 8), (1,), 8),
  ],
)
def test_a_sample_is_small(shape, axes, size):
  """One element of a set in 32, and 16 at least: all would be read again.

  Neighbours on the last axis stay together, as memory brings them, or of a
  row eight of them do.
  """
  x = jnp.arange(math.prod(shape)).reshape(shape)
  sample = samples.sample(x, axes)
  jumps = (np.diff(sample) != 1).sum(-1).max()
  assert sample.shape[-1] >= (8 * (jumps + 1) if jumps else 0)
  assert math.prod(sample.shape[a] for a in axes) == size
  assert sample.size == size * math.prod(shape) // math.prod(
    shape[a] for a in axes
  )


@pytest.mark.parametrize(
  ('shape', 'axes', 'is_small'),
  [
    ((2, 3, 3, 8), (1, 2), True),
    ((2, 22, 22, 8), (1, 2), True),
    ((2, 23, 23, 8), (1, 2), False),
    ((2, 7, 1, 8), (1, 2), False),
    ((2, 3, 3, 8), (0, 1, 2), False),
    ((2, 100), (1,), False),
    ((2, 3, 3, 8), (), False),
  ],
)
def test_of_small_images_a_cpu_takes_fewer(shape, axes, is_small):
  x = draw(shape)
  assert samples.is_of_small_images(x, axes) == is_small
  if len(axes) == 2:  # then the sample is another one
    few, some = (samples.sample(x, axes, least=n).size for n in (4, 16))
    assert (few < some) == is_small


@pytest.mark.parametrize('width', [33, 34, 40, 65, 66, 256, 999, 1000])
def test_small_rows_are_summed_by_halves(width):
  """On a CPU, where it has one device; all elements, about a large mean."""
  x = 1000 + draw((4, width))
  found = jax.jit(lambda x: nk.moments(x, -1))(x)
  exact = np.asarray(x, np.float64)
  np.testing.assert_allclose(found.mean, exact.mean(-1), rtol=1e-7)
  np.testing.assert_allclose(found.var, exact.var(-1), rtol=1e-5)
  mesh = jax.make_mesh((2,), ('rows',), (AxisType.Auto,))
  placed = jax.device_put(x, NamedSharding(mesh, P('rows')))
  for given, is_alone in (x, True), (placed, False):
    lowered = jax.jit(lambda x: nk.layer_norm(x)).lower(given)
    added = rf'add [^:]*: tensor<4x{-(-width // 2)}xf32>'
    has_halves = bool(re.search(added, lowered.as_text()))
    assert has_halves == (is_alone and width != 33)  # short enough, and odd


@pytest.mark.parametrize('width', [3, 4, 5, 33, 128, 129])
def test_the_pivot_of_many_short_rows_is_no_sum(width):
  """On a CPU, where it has one device; about a mean and elements far off."""
  x = 1000 + draw((2000, width))
  x = x.at[:, 0].add(300).at[:, width // 8].add(-200)
  run = jax.jit(lambda x: centred.centred(x, (1,), output_alone=False))
  found = run(x)
  exact = np.asarray(x, np.float64)
  wide = [np.asarray(a, np.float64) for a in found]
  mean, var = exact.mean(-1, keepdims=True), exact.var(-1, keepdims=True)
  np.testing.assert_allclose(wide[0] + wide[1], mean, rtol=1e-7)
  np.testing.assert_allclose(wide[2], var, rtol=1e-5)
  mesh = jax.make_mesh((2,), ('rows',), (AxisType.Auto,))
  placed = jax.device_put(x, NamedSharding(mesh, P('rows')))
  sums = [run.lower(a).as_text().count('.reduce(') for a in (x, placed, x[:9])]
  of_others = 1 if width <= 63 else 3 if width % 16 == 0 else 4
  assert sums == [(not 4 <= width <= 128) + of_others, 3, 2]


@pytest.mark.parametrize(
  ('side', 'channels', 'sums', 'sample'),
  [
    (4, 8, 2, '2x2'),
    (4, 66, 2, '2x2'),
    (8, 8, 2, '2x2'),
    (8, 40, 4, '2x2'),
    (16, 8, 2, '2x4'),
    (23, 8, 3, '3x6'),
  ],
)
def test_small_images_are_summed_at_once(side, channels, sums, sample):
  """On a CPU, where it has one device, about a mean of few; all elements."""
  x = 1000 + draw((2, side, side, channels))
  x = x.at[:, 0, 0].add(300).at[:, -1, -2].add(-200)
  run = jax.jit(lambda x: centred.centred(x, (1, 2)))
  pivot, offset, var, _ = (np.asarray(a, np.float64) for a in run(x))
  exact = np.asarray(x, np.float64)
  mean = exact.mean((1, 2), keepdims=True)
  np.testing.assert_allclose(pivot + offset, mean, rtol=1e-7)
  np.testing.assert_allclose(var, exact.var((1, 2), keepdims=True), rtol=1e-5)
  mesh = jax.make_mesh((2,), ('d',), (AxisType.Auto,))
  placed = jax.device_put(x, NamedSharding(mesh, P(None, None, None, 'd')))
  alone, apart = (run.lower(a).as_text() for a in (x, placed))
  assert [text.count('.reduce(') for text in (alone, apart)] == [sums, 3]
  sliced = re.compile(r'stablehlo.slice.*-> tensor<\d+x(\d+x\d+)x\d+x')
  assert sliced.findall(alone) == [sample]
  assert sliced.findall(apart) == ['3x6' if side == 23 else '4x4']


def test_groups_of_a_single_image_are_summed_at_once():
  x = jax.ShapeDtypeStruct((8, 8, 16), jnp.float32)
  norm = functools.partial(nk.group_norm, num_groups=4, batch_axis=())
  assert jax.jit(norm).lower(x).as_text().count('.reduce(') == 3


@pytest.mark.parametrize(
  ('rows', 'width', 'sums', 'is_own'),
  [
    (9, 129, 2, False),
    (2000, 129, 5, False),
    (4095, 129, 5, False),
    (4096, 129, 3, True),
    (4096, 128, 3, True),
    (4095, 128, 3, False),
    (1024, 1024, 4, False),
    (1024, 1040, 4, False),
    (40_000, 32, 1, False),
  ],
)
def test_the_pivot_where_the_output_is_alone(rows, width, sums, is_own):
  """On a CPU: of some elements, or the mean where there are many rows."""
  kind = jax.ShapeDtypeStruct((rows, width), jnp.float32)
  text = jax.jit(nk.layer_norm).lower(kind).as_text()
  assert text.count('.reduce(') == sums
  assert ('slice' in text) != is_own


@pytest.mark.parametrize('norm', [nk.layer_norm, nk.rms_norm])
@pytest.mark.parametrize('shape', [(0, 8192), (2, 0, 8192)])
def test_no_rows_have_gradients(norm, shape):
  """The scale, which a CPU sums by products of matrices, is not empty."""
  x, scale = jnp.ones(shape), jnp.ones(8192)
  dx, dscale = jax.grad(lambda *a: norm(*a).sum(), (0, 1))(x, scale)
  chex.assert_shape(dx, shape)
  np.testing.assert_array_equal(dscale, 0 * scale)


def test_rows_of_a_symbol_beside_none():
  kind = jax.ShapeDtypeStruct(export.symbolic_shape('0, n'), jnp.float32)
  exported = export.export(jax.jit(nk.layer_norm))(kind)
  chex.assert_shape(exported.call(jnp.ones((0, 40))), (0, 40))
  scale = jax.ShapeDtypeStruct(kind.shape[1:], jnp.float32)
  run = jax.jit(jax.grad(lambda x, scale: nk.layer_norm(x, scale).sum()))
  exported = export.export(run)(kind, scale)
  given = jnp.ones((0, 40)), jnp.ones(40)
  chex.assert_shape(exported.call(*given), (0, 40))


PARTS = {
  'halves': ((5, 70), 'sums_at_once', Sets((1,))),
  'odd': ((5, 331), 'sums_at_once', Sets((1,))),
  'lanes': ((5, 96), '_sums_of_long_rows', Sets((1,))),
  'fewer lanes': ((5, 90), '_sums_of_long_rows', Sets((1,))),
  'lanes, and others': ((5, 83), '_sums_of_long_rows', Sets((1,))),
  'lanes of images': ((2, 3, 6, 10), '_sums_by_lanes', Sets((1, 2), 3, 5)),
  'no elements': ((5, 0), 'sums_at_once', Sets((1,))),
  'groups at once': ((2, 3, 7, 10), 'sums_at_once', Sets((1, 2), 3, 5)),
  'channels first': ((2, 6, 3, 7), 'sums_at_once', Sets((2, 3), 1, 3)),
  'images': ((2, 3, 7, 10), '_sums_by_lines', Sets((1, 2))),
  'groups': ((2, 3, 7, 10), '_sums_by_lines', Sets((1, 2), 3, 5)),
  'sequences': ((2, 192, 10), '_sums_by_lines', Sets((1,), 2, 5)),
  'empty': ((2, 3, 0, 10), '_sums_by_lines', Sets((1, 2))),
}


@pytest.mark.parametrize(('shape', 'form', 'of'), PARTS.values(), ids=PARTS)
def test_sums_in_parts_are_whole(shape, form, of):
  """Of one array, and of two."""
  x = 3 + draw((2, *shape))
  axes = tuple(a + 1 for a in of.axes)
  exact = np.asarray(x, np.float64).sum(axes, keepdims=True)
  if of.groups:
    at = of.channel + 1
    parts = np.split(exact, of.groups, at)
    exact = np.concatenate([p.sum(at, keepdims=True) for p in parts], at)
  run = functools.partial(getattr(sums, form), of)
  for found in run(*x), run(x[0]) + run(x[1]):
    np.testing.assert_allclose(found, exact, rtol=1e-6)


def test_sums_of_small_groups_at_once():
  """On a CPU: of x - pivot and its square, by one loop."""
  x = 1000 + draw((2, 4, 4, 32))
  run = jax.jit(lambda x: nk.group_norm(x, num_groups=8))
  few, many = (run.lower(a).as_text() for a in (x, jnp.tile(x, (9, 1, 1, 1))))
  # Of channels and of groups: of the pivot's sample, and of both or of either.
  assert (few.count('.reduce('), many.count('.reduce(')) == (3, 7)
  exact = np.asarray(x, np.float64).reshape(2, 16, 8, 4)
  exact -= exact.mean((1, 3), keepdims=True)
  exact /= np.sqrt((exact**2).mean((1, 3), keepdims=True) + 1e-6)
  np.testing.assert_allclose(run(x), exact.reshape(x.shape), atol=1e-4)


def batch_norm(x):
  return nk.batch_norm(x, nk.BatchNorm().init(x)[1], train=True)


def group_norm(x):
  return nk.group_norm(x, num_groups=4)


@pytest.mark.parametrize(
  ('norm', 'shape', 'lanes'),
  [
    (nk.moments, (9, 32, 32, 3), '9x64x16x3'),
    (nk.moments, (200, 7, 7, 1), '200x7x7x1'),
    (nk.moments, (2048, 5), '128x16x5'),
    (nk.moments, (2049, 5), None),  # into three parts at most
    (nk.moments, (819, 5), None),  # 4,095 elements
    (nk.instance_norm, (2, 12, 14, 20), '2x12x14x20'),
    (group_norm, (2, 14, 14, 20), '2x14x14x20'),
    (group_norm, (2, 14, 9, 20), '2x9x14x20'),
  ],
)
def test_images_are_summed_by_lanes(norm, shape, lanes):
  """On a CPU, where it has one device; about a large mean."""
  x = 1000 + draw(shape)
  axis = tuple(range(len(shape) - 1))
  is_moments = norm is nk.moments
  run = jax.jit(functools.partial(norm, axis=axis) if is_moments else norm)
  text = run.lower(x).as_text()
  pairs = re.findall(r'reduce\(.*\), \(.* : \(tensor<(\w+)xf32>', text)
  assert pairs == ([] if lanes is None else [lanes])
  if is_moments:
    exact = np.asarray(x, np.float64)
    found = run(x)
    np.testing.assert_allclose(found.mean, exact.mean(axis), rtol=1e-7)
    np.testing.assert_allclose(found.var, exact.var(axis), rtol=1e-5)


@pytest.mark.parametrize(
  ('norm', 'shape', 'sums'),
  [
    (nk.instance_norm, (2, 6, 32, 8), '2x6x1x8'),
    (group_norm, (2, 6, 32, 8), '2x6x1x8'),
    (group_norm, (2, 1024, 8), '2x16x8'),
    (batch_norm, (1024, 8), '16x8'),
  ],
)
def test_few_sets_are_summed_by_lines(norm, shape, sums):
  """In float32 and for one GPU; test_bytes.py holds what that moves."""

  def by_lines(dtype, platform, devices=1):
    mesh = jax.make_mesh((devices,), ('rows',), (AxisType.Auto,))
    placed = NamedSharding(mesh, P(*[None] * (len(shape) - 2), 'rows'))
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    traced = jax.jit(norm).trace(x)
    lowered = traced.lower(lowering_platforms=(platform,))
    return f'tensor<{sums}xf32>' in lowered.as_text()

  assert by_lines('float32', 'cuda')
  assert not by_lines('bfloat16', 'cuda')
  assert not by_lines('float32', 'cpu')
  assert not by_lines('float32', 'cuda', 2)


def test_one_form_is_no_choice_of_platforms():
  """Converters of programs, to ONNX for example, do not know such choices."""
  norms = (lambda x: nk.batch_norm(x, STATE, train=True)), nk.layer_norm
  programs = [str(jax.make_jaxpr(norm)(draw((3, 3)))) for norm in norms]
  found = ['normkit_form' in text for text in programs]
  assert found == [False, True]  # three rows are too few for lanes


def test_rows_of_gpus_stay_on_chip_until_a_derivative_needs_them():
  """Their own mean costs no read of them before, and after that of a sample."""

  def var(x):
    return nk.moments(x, -1).var

  x = jax.ShapeDtypeStruct((8, 4096), jnp.float32)
  programs = (
    jax.jit(run).trace(x).lower(lowering_platforms=('cuda',)).as_text()
    for run in (var, lambda x: jax.jvp(var, (x,), (x,))[1])
  )
  assert ['stablehlo.slice' in text for text in programs] == [False, True]


@pytest.mark.parametrize(
  'run',
  [
    lambda x: nk.moments(x, 0),
    lambda x: nk.batch_norm(x, STATE, train=True)[1],
  ],
  ids=['moments', 'batch_norm'],
)
def test_bfloat16_takes_no_sample_on_gpus(run):
  """Nor where it is widened first."""
  for dtype in jnp.float32, jnp.bfloat16:
    x = jax.ShapeDtypeStruct((512, 3), dtype)
    lowered = jax.jit(run).trace(x).lower(lowering_platforms=('cuda',))
    assert ('stablehlo.slice' in lowered.as_text()) == (dtype == jnp.float32)


def test_what_is_not_masked_stays_visible():
  """An infinity that counts goes through the map: it is no stray."""
  x = draw((4, 3)).at[1, 1].set(jnp.inf)
  where = jnp.ones((4, 3), bool).at[0, 0].set(False)
  y, _ = nk.batch_norm(x, STATE, -jnp.ones(3), train=False, where=where)
  assert y[1, 1] == -jnp.inf


@pytest.mark.parametrize(
  'norm',
  [
    nk.streaming_norm,
    functools.partial(nk.batch_renorm, r_max=1e3, d_max=1e3),
  ],
  ids=['streaming', 'renorm'],
)
def test_old_statistics_are_constants(norm):
  def loss(mean, var):
    state = STATE._replace(mean=mean, var=var)
    return jnp.sin(norm(draw((8, 3)), state, train=True)[0]).sum()

  for gradient in jax.jit(jax.grad(loss, (0, 1)))(STATE.mean, STATE.var):
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(
  'norm',
  [
    nk.streaming_norm,
    nk.batch_renorm,
    lambda x, state, **options: nk.evonorm_b0(x, state, jnp.ones(3), **options),
  ],
  ids=['streaming', 'renorm', 'evonorm_b0'],
)
def test_running_statistics_show_a_batch_that_is_not_finite(norm):
  """Only batch norm has an option to skip it."""
  x = np.array(draw((8, 3)))
  x[0, 1] = np.inf
  _, state = jax.jit(functools.partial(norm, train=True))(x, STATE)
  np.testing.assert_array_equal(np.isfinite(state.var), [True, False, True])


def test_a_virtual_batch_of_one_is_refused():
  """Each of its elements would become zero."""
  with pytest.raises(ValueError, match='one element a feature'):
    nk.batch_norm(draw((8, 3)), STATE, train=True, virtual_batch_size=1)


def test_evonorm_without_variance_has_gradients():
  state = jax.tree.map(lambda a: a[:3], STATE)

  def loss(x):
    options = {'train': True, 'epsilon': 0.0}
    return nk.evonorm_b0(x, state, jnp.ones(3), **options)[0].sum()

  dx = jax.jit(jax.grad(loss))(np.ones((2, 5, 3), np.float32))
  assert np.isfinite(dx).all()


@pytest.mark.parametrize('add', [nk.add_layer_norm, nk.add_rms_norm])
def test_the_sum_has_gradients(add):
  x, residual, weight = (draw((4, 6), seed=i) for i in range(3))

  def loss(x, residual):
    return (add(x, residual)[1] * weight).sum()

  @jax.jit
  def derivatives(x, residual):
    _, moved = jax.jvp(lambda x: add(x, residual)[1], (x,), (weight,))
    return *jax.grad(loss, (0, 1))(x, residual), moved

  for derivative in derivatives(x, residual):
    np.testing.assert_allclose(derivative, weight, rtol=1e-6)


def rounded(arrays, dtype):
  """A `promote_dtype` that rounds what it is given."""
  del dtype
  return tuple(None if a is None else a.astype(jnp.bfloat16) for a in arrays)


def test_training_starts_from_what_is_stored():
  """Not from what `promote_dtype` makes of it; evaluation takes that."""
  layer, flax = (
    package.BatchNorm(3, momentum=1.0, promote_dtype=rounded, rngs=nnx.Rngs(0))
    for package in (normkit.nnx, nnx)
  )
  for module in (layer, flax):
    module.mean[...] = jnp.full(3, 1 / 3)
  layer(draw((4, 3)))
  np.testing.assert_array_equal(layer.mean[...], jnp.full(3, 1 / 3))
  x = jnp.full((4, 3), 1 / 3)
  ours, theirs = (m(x, use_running_average=True) for m in (layer, flax))
  np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize('force', [True, False])
@pytest.mark.parametrize('dtype', [None, 'float32', 'float64'])
@pytest.mark.parametrize('of', ['bfloat16', 'float32', 'float64'])
def test_dtypes_of_stored_statistics(of, dtype, force):
  """As Flax stores them."""
  options = {'use_running_average': False, 'dtype': dtype}
  options |= {'force_float32_reductions': force, 'param_dtype': of}
  with jax.enable_x64(True):
    x, found = jax.ShapeDtypeStruct((4, 3), of), []
    for package in (normkit.linen, nn):
      module = package.BatchNorm(**options)
      variables = jax.eval_shape(module.init, KEY, x)
      train = functools.partial(module.apply, mutable=['batch_stats'])
      _, new = jax.eval_shape(train, variables, x)
      found.append(jax.tree.map(lambda a: a.dtype, new['batch_stats']))
  assert found[0] == found[1]
