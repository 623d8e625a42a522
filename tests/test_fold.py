"""Norms folded into layers: the model before and after, in float64."""

import chex
from flax import nnx
import flax.linen as nn
import jax
from jax import export, lax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import second_tier

import normkit as nk
import normkit.linen
import normkit.nnx
from normkit.tools.fold import fold

# What a folded program may hold beside the layers themselves.
NORMS = {'sub', 'mul', 'div', 'rsqrt', 'sqrt', 'square', 'reduce_sum'}


def flax_norm(**options):
  return nn.BatchNorm(use_running_average=True, **options)


def drop_in(**options):
  return normkit.linen.BatchNorm(use_running_average=True, **options)


class Transformed(nn.Module):
  transform: nk.Norm

  @nn.compact
  def __call__(self, x):
    return normkit.linen.Norm(self.transform)(x, train=False)


def drawn(model, x, seed=0):
  """Variables of a model for x, with numbers as if trained, some scales odd."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = jax.tree_util.keystr(path)
    if leaf.dtype == jnp.int32:
      return jax.device_put(np.zeros(leaf.shape, leaf.dtype))
    if 'var' in name:
      values = rng.uniform(0.3, 3, leaf.shape)
    else:
      values = rng.normal(size=leaf.shape)
      if 'kernel' in name:
        values /= np.sqrt(np.prod(leaf.shape[:-1]))
    if 'scale' in name:
      values.flat[:2] = 0, -2
    return jax.device_put(values.astype(leaf.dtype))

  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  return jax.tree_util.tree_map_with_path(draw, shapes)


def image(*shape, seed=1, dtype=jnp.float32):
  values = np.random.default_rng(seed).normal(size=shape)
  return jax.device_put(values.astype(dtype))


def positive(*shape, seed=1):
  return jax.device_put(1 + np.square(image(*shape, seed=seed)))


def in_float64(call, variables, x):
  """What the model itself gives, in float64."""

  def widen(a):
    kind = jnp.issubdtype(a.dtype, jnp.floating)
    return np.asarray(a, np.float64) if kind else a

  with jax.enable_x64(True):
    y = jax.jit(call)(*jax.tree.map(widen, (variables, x)))
    return jax.tree.map(np.asarray, y)


def run(folded, x):
  return jax.jit(folded.apply)(folded.params, x)


def primitives(folded, x):
  jaxpr = jax.make_jaxpr(folded.apply)(folded.params, x)
  return [eqn.primitive.name for eqn in jaxpr.eqns]


def check(model, x, rows, **options):
  """Folds a linen model drawn at random; returns what is folded."""
  variables = drawn(model, x)
  copy = jax.tree.map(np.array, variables)
  folded = fold(model.apply, variables, x, **options)
  chex.assert_trees_all_equal(variables, copy)
  wanted = in_float64(model.apply, variables, x)
  given = run(folded, x)
  size = np.abs(wanted).max()
  chex.assert_trees_all_close(given / size, wanted / size, atol=3e-6)
  assert [(row.norm, row.layer) for row in folded.report.rows] == rows
  return folded


LAYERS = {
  'same': nn.Conv(6, (3, 3)),
  'without bias': nn.Conv(6, (3, 3), use_bias=False),
  'valid': nn.Conv(6, (3, 3), padding='VALID'),
  'strided': nn.Conv(6, (3, 2), strides=(2, 1)),
  'grouped': nn.Conv(6, (3, 3), feature_group_count=2),
  'depthwise': nn.Conv(8, (3, 3), feature_group_count=4),
  'dilated': nn.Conv(6, (3, 3), kernel_dilation=2),
  'transposed': nn.ConvTranspose(6, (3, 3), strides=(2, 2)),
  'one axis': nn.Conv(6, (3,)),
  'dense': nn.Dense(6),
  'two axes': nn.DenseGeneral((2, 3), axis=(-2, -1)),
  'einsum': nn.Einsum((4, 2, 3), 'abcd,def->abcef'),
}


FIRST = 'same', 'valid', 'grouped', 'transposed', 'dense', 'two axes'


def tiered(layers):
  """The names of layers, all but the first ones of the second tier."""
  return [name if name in FIRST else second_tier(name) for name in layers]


@pytest.mark.parametrize('layer', tiered(LAYERS))
def test_after_a_layer(layer):
  norm = (flax_norm, drop_in)[list(LAYERS).index(layer) % 2]
  model = nn.Sequential([LAYERS[layer].copy(), norm()])
  x = image(2, 6, 5, 4)
  folded = check(model, x, [('layers_1', 'layers_0')])
  program = primitives(folded, x)
  assert not NORMS.intersection(program)
  assert program.count('add') == 1
  kernel = 'params/layers_0/kernel'
  assert sorted(folded.params) == [kernel, f'{kernel}:bias']


@pytest.mark.parametrize(
  'norm',
  [
    nk.BatchNorm(),
    second_tier(nk.BatchNorm(use_scale=False, use_bias=False)),
    second_tier(nk.BatchRenorm()),
    nk.BatchNorm(axis=(2, 3)),
  ],
  ids=repr,
)
def test_transforms(norm):
  layer = nn.DenseGeneral((2, 3))
  if norm.axis == -1:
    layer = nn.Conv(6, (3, 3))
  model = nn.Sequential([layer, Transformed(norm)])
  x = image(2, 6, 5, 4) if norm.axis == -1 else image(2, 6, 4)
  folded = check(model, x, [('layers_1/Norm_0', 'layers_0')])
  assert not NORMS.intersection(primitives(folded, x))


BEFORE = {
  'valid': nn.Conv(6, (3, 3), padding='VALID'),
  'strided': nn.Conv(6, (3, 2), strides=(2, 1), padding='VALID'),
  'grouped': nn.Conv(6, (3, 3), feature_group_count=2, padding='VALID'),
  'depthwise': nn.Conv(
    8, (3, 3), feature_group_count=4, padding='VALID', use_bias=False
  ),
  'dilated': nn.Conv(6, (3, 2), kernel_dilation=2, padding='VALID'),
  'pointwise': nn.Conv(6, (1, 1)),
  'dense': nn.Dense(6),
  'einsum': nn.Einsum((4, 2, 3), 'abcd,def->abcef'),
}


@pytest.mark.parametrize('layer', tiered(BEFORE))
def test_before_a_layer(layer):
  model = nn.Sequential([nn.relu, drop_in(), BEFORE[layer].copy()])
  x = image(2, 8, 7, 4)
  folded = check(model, x, [('layers_1', 'layers_2')])
  program = primitives(folded, x)
  assert not NORMS.intersection(program)
  assert program.count('add') == 1


def test_before_two_axes():
  model = nn.Sequential([drop_in(axis=(2, 3)), nn.DenseGeneral(6, (-2, -1))])
  check(model, image(2, 3, 5, 4), [('layers_0', 'layers_1')])


@pytest.mark.parametrize(
  'layer',
  [nn.Conv(6, (3, 3)), nn.ConvTranspose(6, (2, 2), (2, 2), padding='VALID')],
  ids=['same', 'transposed'],
)
def test_padding_keeps_the_shift(layer):
  model = nn.Sequential([flax_norm(), layer.copy()])
  x = image(2, 6, 5, 4)
  folded = check(model, x, [('layers_0', None)])
  assert 'pads with zeros' in folded.report.rows[0].reason
  assert 'rsqrt' not in primitives(folded, x)


def test_scale_alone_goes_through_padding():
  """Gains of the inputs of a padded, grouped convolution: no shift, no harm."""
  kernel, gain = image(6, 2, 3, 3), image(4, 1, 1, seed=2)

  def call(variables, x):
    return lax.conv_general_dilated(
      x * variables['gain'][None],
      variables['kernel'],
      (1, 1),
      'SAME',
      feature_group_count=2,
    )

  variables, x = {'kernel': kernel, 'gain': gain}, image(2, 4, 5, 5)
  folded = fold(call, variables, x)
  wanted = in_float64(call, variables, x)
  y = run(folded, x)
  chex.assert_trees_all_close(y, wanted.astype(np.float32), atol=1e-4)
  assert folded.report.rows == (('gain', 'kernel', ''),)
  assert primitives(folded, x) == ['conv_general_dilated']


def test_channels_first_and_kernels_left_of_the_input():
  """Features on axis 1, and an einsum whose kernel is the first operand."""

  def call(variables, x):
    y = lax.conv_general_dilated(x, variables['first'], (1, 1), 'VALID')
    y = (y - variables['mean'][:, None, None]) / variables['std'][:, None, None]
    y = jax.nn.relu(y)
    y = jnp.einsum('oc,bchw->bohw', variables['second'], y)
    return (y * variables['gain'][:, None, None]).reshape(2, -1)

  variables = {
    'first': image(5, 3, 2, 2),
    'mean': image(5, seed=2),
    'std': positive(5, seed=3),
    'second': image(4, 5, seed=4),
    'gain': image(4, seed=5),
  }
  x = image(2, 3, 4, 4)
  with jax.numpy_rank_promotion('allow'):
    folded = fold(call, variables, x)
    wanted = in_float64(call, variables, x)
    given = run(folded, x)
  chex.assert_trees_all_close(
    given, wanted.astype(np.float32), rtol=1e-4, atol=1e-4
  )
  assert sorted(folded.params) == ['first', 'first:bias', 'second']
  assert [row.layer for row in folded.report.rows] == ['first', 'second']


def test_dense_against_numpy():
  """Both sides of one dense layer, by the formula."""
  rng = np.random.default_rng(0)
  shapes = {'k': (3, 2), 'a': (1, 3), 'b': (1, 3), 'c': (1, 2), 'd': (1, 2)}
  v = {name: rng.normal(size=shape) for name, shape in shapes.items()}

  def call(v, x):
    return ((x * v['a'] + v['b']) @ v['k'] - v['c']) * v['d']

  x = rng.normal(size=(4, 3))
  folded = fold(call, jax.tree.map(jnp.float32, v), jnp.float32(x))
  chex.assert_trees_all_close(
    dict(folded.params),
    {
      'k': (v['a'].T * v['k'] * v['d']).astype(np.float32),
      'k:bias': ((v['b'] @ v['k'] - v['c']) * v['d']).astype(np.float32),
    },
    rtol=1e-5,
    atol=1e-6,
  )


class Block(nn.Module):
  """A pre-activation residual block (He et al. 2016)."""

  @nn.compact
  def __call__(self, x):
    y = nn.relu(flax_norm(name='first')(x))
    short = nn.Conv(8, (1, 1), name='short')(y)
    y = nn.Conv(8, (3, 3), use_bias=False, name='in')(y)
    y = nn.relu(drop_in(name='second')(y))
    return short + nn.Conv(8, (3, 3), name='out')(y)


class Residual(nn.Module):
  """Input norm, stem, two blocks, and a head."""

  @nn.compact
  def __call__(self, x):
    x = flax_norm(name='pixels')(x)
    x = nn.Conv(8, (2, 2), padding='VALID', name='stem')(x)
    x = flax_norm(name='stem_norm')(x)
    for i in range(2):
      x = Block(name=f'block_{i}')(x)
    x = nn.relu(flax_norm(name='last')(x)).mean((1, 2))
    x = nn.LayerNorm(name='layer_norm')(x)
    return nn.Dense(5, name='head')(flax_norm(name='head_norm')(x))


@pytest.fixture(scope='module')
def residual():
  model, x = Residual(), image(2, 9, 9, 3)
  variables = drawn(model, x)
  return model, variables, x, fold(model.apply, variables, x)


def test_residual_network(residual):
  model, variables, x, folded = residual
  fates = {row.norm: row.layer for row in folded.report.rows}
  assert fates == {
    'pixels': 'stem',
    'stem_norm': 'stem',
    'block_0/first': 'stem',
    'block_0/second': 'block_0/in',
    'block_1/first': None,
    'block_1/second': 'block_1/in',
    'last': None,
    'layer_norm': None,
    'head_norm': 'head',
  }
  reasons = {row.norm: row.reason for row in folded.report.rows}
  assert reasons['block_1/first'] == 'follows add, goes to relu'
  assert 'its own input' in reasons['layer_norm']
  for row in folded.report.rows:
    assert row.norm in str(folded.report)
  wanted = in_float64(model.apply, variables, x)
  chex.assert_trees_all_close(
    run(folded, x),
    wanted.astype(np.float32),
    rtol=1e-4,
    atol=1e-4,
  )
  assert not [name for name in folded.params if 'second' in name]


def test_other_batch_sizes(residual):
  model, variables, _, folded = residual
  x = image(5, 9, 9, 3, seed=7)
  chex.assert_trees_all_close(
    run(folded, x),
    jax.jit(model.apply)(variables, x),
    atol=1e-4,
  )


def test_transformations(residual):
  model, variables, x, folded = residual
  wanted = jax.jit(model.apply)(variables, x)

  def loss(call, v):
    return lambda x: jnp.sum(jnp.sin(call(v, x)))

  given = jax.jit(jax.grad(loss(folded.apply, folded.params)))(x)
  true = jax.jit(jax.grad(loss(model.apply, variables)))(x)
  chex.assert_trees_all_close(given, true, rtol=1e-3, atol=1e-4)
  stacked = np.stack([x, x])
  apply = jax.jit(jax.vmap(folded.apply, (None, 0)))
  chex.assert_trees_all_close(
    apply(folded.params, stacked)[1], wanted, atol=1e-4
  )
  exported = export.export(jax.jit(folded.apply))(folded.params, x)
  chex.assert_trees_all_close(
    exported.call(folded.params, x), wanted, atol=1e-4
  )


def gain_and_layer(v, x):
  """An affine map on both sides of one kernel, by x.shape[0]."""
  y = x @ v['k1']
  if x.shape[0] == 1:
    y = y * v['g']
  return jnp.tanh(jnp.tanh(y) @ v['k2']) * v['g']


def gain_of_batch(v, x):
  return jnp.tanh(x @ v['k1'] * (v['g'] / x.shape[0]))


def root_of_gain(v, x):
  y = jnp.tanh(x @ v['k1'])
  return jnp.tanh(y * jnp.exp(v['g']) if x.shape[0] == 1 else y * v['g'])


@pytest.mark.parametrize('call', [gain_and_layer, gain_of_batch, root_of_gain])
def test_other_folds_for_other_shapes_are_refused(call):
  v = {'k1': image(4, 4), 'k2': image(4, 4, seed=2), 'g': image(1, 4, seed=3)}
  folded = fold(call, v, image(1, 4))
  folded.apply(folded.params, image(1, 4, seed=5))
  with pytest.raises(ValueError, match=r'float32\[3,4\].*Fold the model again'):
    folded.apply(folded.params, image(3, 4))


class Net(nnx.Module):
  def __init__(self, rngs, kind=nnx):
    self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
    self.norms = nnx.List([kind.BatchNorm(4, rngs=rngs)])
    self.drop = nnx.Dropout(0.5, rngs=rngs)
    self.out = nnx.LinearGeneral((5, 4), (2, 3), axis=(-2, -1), rngs=rngs)
    self.norm = kind.BatchNorm(3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norms[0](self.conv(x)))
    return self.norm(self.out(self.drop(x)))


@pytest.mark.parametrize('kind', [nnx, normkit.nnx], ids=['flax', 'normkit'])
def test_nnx(kind):
  model, x = nnx.jit(lambda: Net(nnx.Rngs(0), kind))(), image(2, 6, 5, 3)
  call = nnx.jit(lambda model, x: model(x))
  for _ in range(3):
    call(model, np.asarray(x) * 3 + 1)
  model.eval()
  before = jax.tree.map(np.array, nnx.state(model, nnx.Param))
  folded = fold(lambda model, x: model(x), model, x)
  assert folded.report.rows == (
    ('norms/0', 'conv', ''),
    ('norm', 'out', ''),
  )
  assert sorted(folded.params) == [
    'conv/kernel',
    'conv/kernel:bias',
    'out/kernel',
    'out/kernel:bias',
  ]
  y = run(folded, x)
  chex.assert_trees_all_close(y, call(model, x), rtol=1e-5, atol=1e-5)
  chex.assert_trees_all_equal(nnx.state(model, nnx.Param), before)


@pytest.mark.parametrize(
  'dtypes',
  [
    dict(dtype=jnp.bfloat16),
    dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
  ],
  ids=['computed', 'stored'],
)
@pytest.mark.parametrize('out', [jnp.bfloat16, second_tier(jnp.float32)])
def test_half_precision(dtypes, out):
  model = nn.Sequential(
    [nn.Conv(6, (3, 3), **dtypes), drop_in(dtype=out), nn.relu]
  )
  x = image(2, 6, 5, 4, dtype=jnp.bfloat16)
  variables = drawn(model, x)
  folded = fold(model.apply, variables, x)
  y = run(folded, x)
  assert y.dtype == out
  wanted = in_float64(model.apply, variables, x)
  size = np.abs(wanted).max()
  chex.assert_trees_all_close(
    y.astype(jnp.float32) / size, np.float32(wanted / size), atol=1e-2
  )
  assert folded.params['params/layers_0/kernel'].dtype == jnp.bfloat16
  assert folded.params['params/layers_0/kernel:bias'].dtype == jnp.float32
  assert folded.report.rows == (('layers_1', 'layers_0', ''),)


def test_kernels_that_overflow_stay():
  """Zeros times the infinite kernel would be NaN."""

  def call(v, x):
    dims = ('NHWC', 'HWIO', 'NHWC')
    x = jax.nn.relu(x).astype(jnp.float16)
    y = lax.conv_general_dilated(
      x, v['kernel'], (1, 1), 'SAME', dimension_numbers=dims
    )
    y = jnp.tanh(y.astype(jnp.float32) * v['gain'])
    return (y @ v['dense'] - v['mean']) * v['std']

  v = {
    'kernel': image(3, 3, 3, 4, dtype=jnp.float16) * 100,
    'gain': jnp.full((1, 1, 1, 4), 2000.0),
    'dense': image(4, 2, seed=2),
    'mean': image(1, 1, 1, 2, seed=3),
    'std': image(1, 1, 1, 2, seed=4),
  }
  x = image(2, 5, 5, 3, seed=5)
  folded = fold(call, v, x)
  assert [(row.norm, row.layer) for row in folded.report.rows] == [
    ('gain', None),
    ('std', 'dense'),
  ]
  assert 'too large for the dtype' in folded.report.rows[0].reason
  for batch in (x, x[:1]):
    chex.assert_trees_all_close(
      run(folded, batch), jax.jit(call)(v, batch), atol=1e-5
    )


@pytest.mark.parametrize('gains', [(6e4, 6e4), (6e4, 1.0)])
def test_outputs_that_overflow_are_refused(gains):
  """The kernel fits, what it gives does not: infinity by infinity."""

  def call(v, x):
    y = (x @ v['kernel']).astype(jnp.float32) * v['gain']
    return y / y.max()

  v = {
    'kernel': jnp.ones((3, 2), jnp.float16),
    'gain': jnp.array([gains]),
  }
  with pytest.raises(ValueError, match='differ by inf'):
    fold(call, v, jnp.ones((4, 3), jnp.float16))


def haiku_like(v, x):
  """As Haiku computes and names it; no package needed."""
  params, state = v
  norm = params['net/~/batch_norm']
  var = state['net/~/batch_norm/~/var_ema']['average']
  mean = state['net/~/batch_norm/~/mean_ema']['average']
  y = x @ params['net/~/linear']['w'] - mean
  y = jnp.tanh(y * (norm['scale'] * jax.lax.rsqrt(var + 1e-5)))
  with jax.named_scope('net'), jax.named_scope('rms_norm'):
    square = jnp.square(y).mean(-1, keepdims=True)
    return y * params['net/~/rms_norm']['scale'] * jax.lax.rsqrt(square + 1e-5)


def equinox_like(v, x):
  """As Equinox does: the state is a tree of leaves without names."""
  model, state = v
  mean, var = state[1]
  y = (x @ model['linear'] - mean) / jnp.sqrt(var + 1e-5)
  return y * model['norm']['weight'] * model['gain']['weight']


def test_a_norm_whose_statistics_lie_elsewhere_stands_once():
  x, row, var = image(4, 3), image(1, 2), jnp.full((1, 2), 2.0)
  names = 'batch_norm', 'rms_norm'
  params = {f'net/~/{name}': {'scale': row} for name in names}
  params['net/~/linear'] = {'w': image(3, 2)}
  state = {
    'net/~/batch_norm/~/mean_ema': {'average': row},
    'net/~/batch_norm/~/var_ema': {'average': var},
  }
  rows = fold(haiku_like, (params, state), x).report.rows
  assert [r[:2] for r in rows] == [
    ('0/net/~/batch_norm', '0/net/~/linear'),
    ('net/rms_norm', None),
  ]
  model = {'linear': image(3, 2), 'norm': {'weight': row}}
  model['gain'] = {'weight': row + 1}
  state = [jnp.zeros(2, bool), (row, var)]
  rows = fold(equinox_like, (model, state), x).report.rows
  assert [r.norm for r in rows] == ['0/norm', '0/gain']


def test_another_module_after_a_norm_without_scale_keeps_its_name():
  def call(v, x):
    y = x @ v['kernel'] * jax.lax.rsqrt(v['norm']['var'] + 1e-5)
    return y * v['gain']['scale']

  var, row = jnp.full((1, 2), 2.0), image(1, 2)
  v = {'kernel': image(3, 2), 'norm': {'var': var}, 'gain': {'scale': row}}
  rows = fold(call, v, image(4, 3)).report.rows
  assert [r.norm for r in rows] == ['norm', 'gain']


def test_channels_that_are_zero():
  """All of them: there is no largest output to measure the error by."""
  v = {'kernel': image(3, 2), 'gain': jnp.zeros((1, 2))}
  folded = fold(dense, v, image(4, 3))
  assert folded.report.rows == (('gain', 'kernel', ''),)
  assert folded.report.error == 0
  assert not folded.report.compared
  assert 'do not depend on x' in str(folded.report)
  exact = fold(dense, v | {'gain': jnp.full((1, 2), 2.0)}, image(4, 3))
  assert exact.report.error == 0
  assert exact.report.compared
  assert 'error 0e+00' in str(exact.report)
  assert not folded.apply(folded.params, image(4, 3)).any()


@pytest.mark.parametrize('value', [np.inf, np.nan])
def test_outputs_of_which_one_is_not_finite(value):
  v = {'kernel': jnp.eye(2), 'gain': jnp.array([[2.0, value]])}
  with pytest.raises(ValueError, match='not all finite'):
    fold(dense, v, image(4, 2))


def test_each_output_has_its_own_tolerance():
  """Random numbers stand for an error of 1e-3; the other output is bfloat16."""

  def call(v, x):
    y = dense(v, x)
    draw = jax.pure_callback(lambda: next(noise), jax.typeof(jnp.float32(0)))
    return y + draw, y.astype(jnp.bfloat16)

  v = {'kernel': jnp.eye(2), 'gain': jnp.full((1, 2), 3.0)}
  noise = iter(np.float32([0, 1e-2]))
  with pytest.raises(ValueError, match=r'tolerance of 1\.0e-04'):
    fold(call, v, jnp.ones((3, 2)))


def test_complex_gains_of_real_layers_stay():
  def call(v, x):
    return x @ v['kernel'] * v['gain'] * v['phase']

  v = {
    'kernel': image(3, 2),
    'gain': image(1, 2, seed=2),
    'phase': jnp.exp(1j * image(1, 2, seed=3)),
  }
  x = image(4, 3, seed=4)
  folded = fold(call, v, x)
  fates = [(row.norm, row.layer) for row in folded.report.rows]
  assert fates == [('gain', 'kernel'), ('phase', None)]
  wanted = np.asarray(x) @ v['kernel'] * v['gain'] * v['phase']
  chex.assert_trees_all_close(run(folded, x), np.complex64(wanted), atol=1e-5)


@pytest.mark.parametrize('use_bias', [False, True])
def test_input_used_twice(use_bias):
  class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
      y = nn.Conv(4, (3, 3), use_bias=use_bias)(x)
      return nn.relu(flax_norm()(y)) + y

  folded = check(Twice(), image(2, 5, 5, 3), [('BatchNorm_0', None)])
  assert 'shares its input' in folded.report.rows[0].reason
  assert 'params/BatchNorm_0/bias' in folded.params


def test_gains_of_places_stay():
  """One number for each place is not one for each feature of the layer."""

  def call(v, x):
    y = lax.conv_general_dilated(x, v['kernel'], (1, 1), 'SAME')
    return y * v['places'] * v['gain']

  v = {
    'kernel': image(4, 3, 3, 3),
    'places': image(1, 1, 5, 5, seed=2),
    'gain': image(1, 4, 1, 1, seed=3),
  }
  x = image(2, 3, 5, 5, seed=4)
  folded = fold(call, v, x)
  assert [row.layer for row in folded.report.rows] == [None, None]
  chex.assert_trees_all_close(
    run(folded, x),
    np.float32(in_float64(call, v, x)),
    atol=1e-4,
  )


def test_shared_layer_takes_two_norms():
  """One kernel under two norms becomes two kernels."""

  class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
      dense = nn.Dense(4, name='dense')
      return drop_in()(dense(x)) + nn.relu(drop_in()(dense(x + 1)))

  rows = [('BatchNorm_0', 'dense'), ('BatchNorm_1', 'dense')]
  folded = check(Shared(), image(3, 5), rows)
  kernel = 'params/dense/kernel'
  assert {kernel, f'{kernel}:2'} <= set(folded.params)


def test_layer_norm_gives_its_scale_to_the_next_layer():
  def call(v, x):
    x = nk.layer_norm(x) * v['norm']['scale'] + v['norm']['bias']
    return x @ v['kernel']

  v = {
    'norm': {'scale': image(1, 5), 'bias': image(1, 5, seed=2)},
    'kernel': image(5, 4, seed=3),
  }
  x = image(3, 5, seed=4)
  folded = fold(call, v, x)
  assert ('norm', 'kernel', '') in folded.report.rows
  wanted = in_float64(call, v, x)
  chex.assert_trees_all_close(run(folded, x), np.float32(wanted), atol=1e-5)


@pytest.mark.parametrize('norm', [nk.LayerNorm(), nk.GroupNorm(num_groups=2)])
def test_own_statistics_are_reported(norm):
  model = nn.Sequential([nn.Conv(4, (3, 3)), Transformed(norm)])
  folded = check(model, image(2, 5, 5, 3), [('layers_1/Norm_0', None)])
  assert 'its own input' in folded.report.rows[0].reason


@pytest.mark.parametrize('is_centred', [False, True])
def test_own_statistics_that_have_forms(is_centred):
  """Of rows that a CPU sums by halves, behind sums over the batch too."""

  def call(v, x):
    x = x - x.mean(0, keepdims=True) if is_centred else x
    return nk.layer_norm(x, v['scale']) @ v['kernel']

  v = {'scale': positive(40), 'kernel': image(40, 3)}
  (row,) = fold(call, v, image(4, 40)).report.rows
  assert 'its own input' in row.reason


def test_loops_are_reported():
  def call(v, x):
    def layer(x, v):
      y = (x @ v['kernel'] - v['mean']) * lax.rsqrt(v['var'])
      return jnp.tanh(y), None

    return lax.scan(layer, x, v)[0]

  v = {
    'kernel': image(3, 4, 4),
    'mean': image(3, 1, 4, seed=2),
    'var': positive(3, 1, 4, seed=3),
  }
  x = image(2, 4)
  folded = fold(call, v, x)
  (row,) = folded.report.rows
  assert row.layer is None
  assert 'loop' in row.reason
  chex.assert_trees_all_close(
    run(folded, x),
    np.float32(in_float64(call, v, x)),
    atol=1e-5,
  )


def in_evaluation(v, x):
  return (x @ v['kernel'] - v['mean']) * lax.rsqrt(v['var'])


def on_custom_jvp(v, x):
  call = jax.custom_jvp(in_evaluation)
  call.defjvp(lambda p, t: jax.jvp(in_evaluation, p, t))
  return call(v, x.mean(0, keepdims=True))


def on_condition(v, x):
  return lax.cond(x.sum() > 0, in_evaluation, dense, v, x)


@pytest.mark.parametrize(
  ('call', 'reason'),
  [
    (on_custom_jvp, 'is inside custom_jvp_call'),
    (on_condition, 'is inside cond'),
  ],
)
def test_norms_inside_operations_are_reported(call, reason):
  """The sums beside them are none of their statistics."""
  v = {
    'kernel': image(3, 2),
    'gain': image(1, 2, seed=2),
    'mean': image(1, 2, seed=3),
    'var': positive(1, 2, seed=4),
  }
  folded = fold(call, v, image(4, 3, seed=5))
  (row,) = folded.report.rows
  assert (row.layer, row.reason) == (None, reason)


def test_own_statistics_inside_operations():
  def call(v, x):
    norm = jax.custom_vjp(lambda x: nk.layer_norm(x))
    norm.defvjp(lambda x: (norm(x), None), lambda _, g: (g,))
    return norm(x) @ v['kernel']

  folded = fold(call, {'kernel': image(3, 2)}, image(4, 3))
  (row,) = folded.report.rows
  assert 'its own input' in row.reason


def test_inputs_far_from_zero_are_not_folded_forward():
  model = nn.Sequential([drop_in(), nn.Dense(4)])
  x = jax.device_put(np.asarray(image(64, 3)) + np.float32(1e4))
  variables = drawn(model, x)
  stats = jax.device_put({'mean': np.mean(x, 0), 'var': np.var(x, 0)})
  variables = {**variables, 'batch_stats': {'layers_0': stats}}
  folded = fold(model.apply, variables, x)
  (row,) = folded.report.rows
  assert row.layer is None
  assert 'far from zero' in row.reason
  chex.assert_trees_all_close(
    run(folded, x), jax.jit(model.apply)(variables, x), atol=1e-5
  )


@pytest.mark.parametrize('kind', [nn, normkit.linen], ids=['flax', 'normkit'])
def test_training_is_refused(kind):
  model = nn.Sequential(
    [nn.Dense(4), kind.BatchNorm(use_running_average=False)]
  )
  x = image(4, 3)
  variables = drawn(model, x)

  def call(variables, x):
    return model.apply(variables, x, mutable=['batch_stats'])[0]

  with pytest.raises(ValueError, match='call the model in evaluation'):
    fold(call, variables, x)


def test_training_beside_evaluation_is_reported():
  model = nn.Sequential([nn.Dense(4), flax_norm(), nn.relu, nn.Dense(3)])
  last = nn.BatchNorm(use_running_average=False)
  x = image(4, 3)
  variables = {'model': drawn(model, x), 'last': drawn(last, x)}

  def call(v, x):
    y = model.apply(v['model'], x)
    return last.apply(v['last'], y, mutable=['batch_stats'])[0]

  rows = {row.norm: row for row in fold(call, variables, x).report.rows}
  assert rows['model/params/layers_1'].layer == 'model/params/layers_0'
  assert 'call the model in evaluation' in rows['last/params'].reason


def test_training_of_nnx_is_refused():
  model = Net(nnx.Rngs(0))
  with pytest.raises(ValueError, match=r'the call changes .* model\.eval\(\)'):
    fold(lambda model, x: model(x), model, image(2, 6, 5, 3))


def test_sown_values_of_nnx_are_no_change():
  class Sown(Net):
    def __call__(self, x):
      y = super().__call__(x)
      self.a = nnx.Intermediate(y)  # what sow does
      return y

  model, x = Sown(nnx.Rngs(0)), image(2, 6, 5, 3)
  model.eval()
  folded = fold(lambda model, x: model(x), model, x)
  assert [row.layer for row in folded.report.rows] == ['conv', 'out']


def dense(v, x):
  return x @ v['kernel'] * v['gain']


@pytest.mark.parametrize(
  ('call', 'change', 'x', 'options', 'error', 'match'),
  [
    (3, {}, None, {}, TypeError, 'call must be a function'),
    (dense, {'gain': 1.0}, None, {}, TypeError, r"variables\['gain'\]"),
    (dense, {}, jax.ShapeDtypeStruct((2, 3), 'float32'), {}, TypeError, 'x '),
    (dense, {}, None, {'tolerance': 0}, ValueError, 'tolerance must be'),
    (
      dense,
      {},
      jnp.ones((0, 3)),
      {},
      ValueError,
      r'x must have elements.*0, 3',
    ),
    (dense, {}, None, {'tolerance': 1e-30}, ValueError, 'beyond the tolerance'),
    (
      dense,
      {'gain': jnp.full((1, 2), jnp.nan)},
      None,
      {},
      ValueError,
      'finite',
    ),
    (
      lambda v, x: dense(v, x).argmax(-1),
      {},
      None,
      {},
      ValueError,
      'no floating-point',
    ),
  ],
)
def test_broken_inputs(call, change, x, options, error, match):
  v = {'kernel': image(3, 2), 'gain': image(1, 2, seed=3), **change}
  with pytest.raises(error, match=match):
    fold(call, v, image(5, 3, seed=5) if x is None else x, **options)


def test_tracers_are_refused():
  v = {'kernel': image(3, 2), 'gain': image(1, 2)}
  with pytest.raises(TypeError, match='outside of jit'):
    jax.jit(lambda x: fold(dense, v, x).params)(image(5, 3))


def test_params_that_do_not_fit():
  v, x = {'kernel': image(3, 2), 'gain': image(1, 2)}, image(5, 3)
  folded = fold(dense, v, x)
  with pytest.raises(ValueError, match=r"'kernel'.*\(3, 2\)"):
    folded.apply({'kernel': image(2, 3)}, x)
  with pytest.raises(ValueError, match="'kernel'"):
    folded.apply({}, x)
