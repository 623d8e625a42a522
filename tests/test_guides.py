"""The pages for newcomers: what they teach works, and their tables are true."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_docs import BLOCK, DOCS

NEED = "needs {}: pip install -e '.[peers]'"
X = np.float32(np.random.default_rng(0).normal(0.03, 0.01, (6, 8, 4, 5)))


def run_page(name):
  """Runs the blocks of a page; gives its names."""
  names = {'__name__': name}
  with jax.numpy_rank_promotion('allow'):
    for block in BLOCK.findall((DOCS / name).read_text()):
      exec(compile(block, name, 'exec'), names)
  return names


@pytest.mark.second_tier
def test_tutorial_learns_in_three_ways():
  accuracy = run_page('tutorial.md')['accuracy']
  assert list(accuracy) == ['plain', 'linen', 'nnx']
  assert min(accuracy.values()) > 0.85


def test_questions_are_answered():
  run_page('questions.md')


# Coming from another library: the layer with its defaults, and the transform.


@pytest.fixture(scope='module')
def page():
  return run_page('coming.md')


def outputs(transform, x, steps=3):
  """In training, at the last of some steps, and in evaluation."""
  params, state = transform.init(x)
  train = jax.jit(lambda s, x: transform.apply(params, s, x, train=True))
  for scale in range(1, steps + 1):
    y, state = train(state, x * scale)
  evaluated, _ = transform.apply(params, state, x, train=False)
  return np.asarray(y), np.asarray(evaluated)


def assert_same(transform, peer, x=X, steps=3):
  """`peer(x, train)` gives an output, and keeps its own statistics."""
  for scale in range(1, steps + 1):
    desired = peer(x * scale, True)
  trained, evaluated = outputs(transform, x, steps)
  np.testing.assert_allclose(trained, desired, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(evaluated, peer(x, False), rtol=1e-4, atol=1e-5)


def assert_cases(transforms, peers):
  assert list(transforms) == list(peers)
  for name, peer in peers.items():
    assert_same(transforms[name], peer)


def test_flax(page):
  from flax import nnx  # noqa: PLC0415

  def peer(layer):
    def call(x, train):
      (layer.train if train else layer.eval)()
      return layer(x)

    return call

  rngs, wide = nnx.Rngs(0), np.concatenate([X] * 7, -1)[..., :32]
  layers = {
    'BatchNorm': nnx.BatchNorm(32, rngs=rngs),
    'LayerNorm': nnx.LayerNorm(32, rngs=rngs),
    'RMSNorm': nnx.RMSNorm(32, rngs=rngs),
    'GroupNorm': nnx.GroupNorm(32, rngs=rngs),
    'InstanceNorm': nnx.InstanceNorm(32, rngs=rngs),
  }
  assert list(layers) == list(page['flax'])
  for name, layer in layers.items():
    assert_same(page['flax'][name], peer(layer), wide)


def test_pytorch(page):
  torch = pytest.importorskip('torch', reason=NEED.format('torch'))

  def peer(layer):
    def call(x, train):
      layer.train(train)
      with torch.no_grad():
        return layer(torch.tensor(x)).numpy()

    return call

  width = X.shape[-1]
  layers = {
    'BatchNorm2d': torch.nn.BatchNorm2d(8),
    'LayerNorm': torch.nn.LayerNorm(width),
    'RMSNorm': torch.nn.RMSNorm(width),
    'GroupNorm': torch.nn.GroupNorm(4, 8),
    'InstanceNorm2d': torch.nn.InstanceNorm2d(8),
  }
  assert_cases(page['pytorch'], {n: peer(m) for n, m in layers.items()})


def test_haiku(page):
  hk = pytest.importorskip('haiku', reason=NEED.format('haiku'))

  def peer(make, *flag):
    def run(x, train):
      return make()(x, *([train] if flag else []))

    net, held = hk.transform_with_state(run), {}

    def call(x, train):
      if not held:
        held['params'], held['state'] = net.init(None, x, True)
      y, state = net.apply(held['params'], held['state'], None, x, train)
      held['state'] = state
      return y

    return call

  both = {'create_scale': True, 'create_offset': True}
  x = np.moveaxis(X, 1, -1)
  peers = {
    'BatchNorm': peer(lambda: hk.BatchNorm(decay_rate=0.9, **both), 'train'),
    'LayerNorm': peer(lambda: hk.LayerNorm(axis=-1, **both)),
    'RMSNorm': peer(lambda: hk.RMSNorm(axis=-1)),
    'GroupNorm': peer(lambda: hk.GroupNorm(4)),
    'InstanceNorm': peer(lambda: hk.InstanceNorm(**both)),
  }
  assert list(page['haiku']) == list(peers)
  with jax.numpy_rank_promotion('allow'):
    for name, call in peers.items():
      assert_same(page['haiku'][name], call, x)


@pytest.mark.second_tier
def test_equinox(page):
  eqx = pytest.importorskip('equinox', reason=NEED.format('equinox'))
  shape = X.shape[1:]
  layers = {
    'LayerNorm': eqx.nn.LayerNorm(shape),
    'RMSNorm': eqx.nn.RMSNorm(shape),
    'GroupNorm': eqx.nn.GroupNorm(4, 8),
  }
  norms = page['equinox']
  assert list(norms) == ['BatchNorm', *layers]
  for name, layer in layers.items():
    assert_same(norms[name], lambda x, _, layer=layer: jax.vmap(layer)(x))
  norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(8, 'b', mode='batch')
  call = jax.vmap(norm, axis_name='b', in_axes=(0, None), out_axes=(0, None))
  y, state = call(jnp.asarray(X), state)
  trained, _ = outputs(norms['BatchNorm'], X, steps=1)
  np.testing.assert_allclose(trained, y, rtol=1e-4, atol=1e-5)
  # The trap: a variance that is about 1 + 99 after one step.
  norm = eqx.nn.inference_mode(norm)
  call = jax.vmap(norm, axis_name='b', in_axes=(0, None), out_axes=(0, None))
  y, _ = call(jnp.asarray(X), state)
  assert y.std() < 0.3


def test_keras(page, monkeypatch):
  monkeypatch.setenv('KERAS_BACKEND', 'jax')
  keras = pytest.importorskip('keras', reason=NEED.format('keras'))

  def peer(layer):
    def call(x, train):
      options = {'training': train} if 'Batch' in type(layer).__name__ else {}
      return np.asarray(layer(x, **options))

    return call

  layers = {
    'BatchNormalization': keras.layers.BatchNormalization(),
    'LayerNormalization': keras.layers.LayerNormalization(),
    'RMSNormalization': keras.layers.RMSNormalization(),
    'GroupNormalization': keras.layers.GroupNormalization(4),
  }
  x = np.moveaxis(X, 1, -1)
  assert list(page['keras']) == list(layers)
  with warnings.catch_warnings(), jax.numpy_rank_promotion('allow'):
    warnings.simplefilter('ignore')
    for name, layer in layers.items():
      assert_same(page['keras'][name], peer(layer), x)


def test_defaults_of_the_tables(page):
  """What the page says of normkit's own defaults."""
  nk, text = page['nk'], (DOCS / 'coming.md').read_text()
  (batch, others, momentum) = re.search(
    r'`epsilon` (\S+) in batch norm and (\S+) in the\s'
    r'others, `momentum` (\S+),',
    text,
  ).groups()
  assert nk.BatchNorm().epsilon == float(batch)
  assert nk.BatchNorm().momentum == float(momentum)
  for norm in (nk.LayerNorm(), nk.RMSNorm(), nk.InstanceNorm()):
    assert norm.epsilon == float(others)
