"""Weights of today's norms: offsets, gates, responses, heads, and back."""

import math

import chex
from flax import linen as nn, nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normkit as nk
import normkit.linen
import normkit.nnx
from normkit.tools import convert

KEY = jax.random.key(0)
ADDED = {'*norm*': 1.0}


def draw(*shape, seed=0, dtype=np.float32):
  return np.random.default_rng(seed).normal(size=shape).astype(dtype)


X = draw(2, 3, 4, 8, seed=9)


def exact_rms(x, scale, epsilon=1e-6):
  x = np.float64(x)
  return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon) * scale


class Norms(nn.Module):
  """Flax's norm, whose scale lies around one, and a gated one beside it."""

  norm: type = nn.RMSNorm
  offset: float = 0.0

  @nn.compact
  def __call__(self, x):
    options = {'scale_offset': self.offset} if self.offset else {}
    y = self.norm(epsilon=1e-6, name='norm', **options)(x)
    return normkit.linen.GatedRMSNorm(name='gated')(y, x)


def shapes(model, *args):
  return jax.eval_shape(model.init, KEY, *args)


@pytest.fixture(scope='module')
def around_zero():
  return {
    'norm.weight': draw(8, dtype=jnp.bfloat16) / 8,
    'gated.weight': 1 + draw(8, seed=1, dtype=jnp.bfloat16) / 8,
  }


def exact(state):
  y = exact_rms(X, 1 + np.float64(state['norm.weight']))
  silu = np.float64(X) / (1 + np.exp(-np.float64(X)))
  return exact_rms(y, np.float64(state['gated.weight'])) * silu


@pytest.mark.parametrize(
  ('norm', 'offset', 'added'),
  [
    (nn.RMSNorm, 0.0, 1.0),  # Flax's
    (normkit.linen.RMSNorm, 1.0, 0.0),
    (normkit.linen.RMSNorm, 0.5, 0.5),
  ],
)
def test_offsets(norm, offset, added, around_zero):
  """Gemma's weights in any norm, those of the gated one as they are."""
  model = Norms(norm, offset)
  pattern = {'norm': added} if added else None
  variables = convert.from_torch(
    around_zero, shapes(model, X), add_to_scale=pattern
  )
  chex.assert_type(jax.tree.leaves(variables), jnp.float32)
  y = model.apply(variables, X)
  np.testing.assert_allclose(y, exact(around_zero), rtol=1e-5, atol=1e-5)
  scale = np.asarray(variables['params']['norm']['scale'])
  want = np.float32(around_zero['norm.weight']) + np.float32(added)
  np.testing.assert_array_equal(scale, want)
  back = convert.to_torch(variables, add_to_scale=pattern, like=around_zero)
  chex.assert_trees_all_equal(back, around_zero)
  assert back['norm.weight'].dtype == jnp.bfloat16
  plain = convert.to_torch(variables, add_to_scale=pattern)
  np.testing.assert_allclose(
    plain['norm.weight'], np.float32(around_zero['norm.weight']), atol=1e-7
  )


def test_offsets_from_other_frameworks():
  """The same argument, the same addition."""
  w, here = draw(8), {'params': {'norm': {'scale': jnp.ones(8)}}}
  given = {'add_to_scale': ADDED}
  found = convert.from_keras({'norm': {'gamma': w}}, here, **given)
  again = convert.from_haiku({'norm': {'scale': w}}, None, here, **given)
  for variables in found, again:
    scale = np.asarray(variables['params']['norm']['scale'])
    np.testing.assert_allclose(scale, 1 + w, rtol=1e-6)


def test_offsets_that_name_nothing():
  here = {'params': {'norm': {'scale': jnp.ones(8)}, 'fc': {'bias': X[0, 0]}}}
  for added, error, match in (
    ({'fc': 1.0}, ValueError, r"'fc' matches no layer .*'norm'"),
    ({'*': 1.0, 'norm': 0.5}, ValueError, "'norm' both 1.0 and 0.5"),
    ({'*': 'one'}, TypeError, 'add_to_scale must be'),
    (1.0, TypeError, 'add_to_scale must be a mapping'),
  ):
    with pytest.raises(error, match=match):
      convert.from_torch({}, here, add_to_scale=added)
    with pytest.raises(error, match=match):
      convert.to_torch(here, add_to_scale=added)


def test_integers_are_refused_where_something_is_added():
  here = {'params': {'norm': {'scale': jnp.ones(8)}}}
  state = {'norm.weight': np.ones(8, np.int8)}
  with pytest.raises(ValueError, match=r"dtype: 'norm\.weight' int8"):
    convert.from_torch(state, here, add_to_scale=ADDED)


# Names and shapes, of modules that are published.

RESPONSES = {
  'timm': {'grn.weight': draw(8), 'grn.bias': draw(8, seed=1)},
  'convnext_v2': {  # of the authors, and of transformers
    'grn.gamma': draw(1, 1, 1, 8),
    'grn.beta': draw(1, 1, 1, 8, seed=1),
  },
}
FUNCTIONS = {  # of the authors; in others alpha has no axis
  'dyt': (nk.DyT(), np.tanh),
  'derf': (nk.Derf(), np.vectorize(math.erf)),
}


@pytest.mark.parametrize('kind', RESPONSES)
def test_global_response(kind):
  state = RESPONSES[kind]
  layer = nnx.Dict(grn=normkit.nnx.Norm(nk.GlobalResponseNorm(), X))
  filled = convert.from_torch(state, layer)
  length = np.sqrt(np.square(np.float64(X)).sum((1, 2), keepdims=True))
  response = length / (length.mean(-1, keepdims=True) + 1e-6)
  scale, bias = (np.float64(v).reshape(8) for v in state.values())
  want = scale * (X * response) + bias + X
  np.testing.assert_allclose(filled['grn'](X), want, rtol=1e-5, atol=1e-5)
  chex.assert_trees_all_equal(convert.to_torch(filled, like=state), state)


@pytest.mark.parametrize('axes', [(), (1,)], ids=['number', 'vector'])
@pytest.mark.parametrize('name', FUNCTIONS)
def test_norms_without_statistics(name, axes):
  transform, function = FUNCTIONS[name]
  state = {'alpha': draw(*axes), 'weight': draw(8), 'bias': draw(8, seed=1)}
  state['alpha'] = np.asarray(state['alpha'])
  if name == 'derf':
    state['shift'] = np.asarray(draw(*axes, seed=2))
  model = normkit.linen.Norm(transform)
  empty = jax.eval_shape(lambda: model.init(KEY, X, train=True))
  variables = convert.from_torch(state, empty)
  inner = np.float64(X) * state['alpha'] + state.get('shift', 0.0)
  want = function(inner) * state['weight'] + state['bias']
  y = model.apply(variables, X, train=False)
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
  chex.assert_trees_all_equal(convert.to_torch(variables, like=state), state)


@pytest.mark.parametrize('shape', [(32,), (4, 8)], ids=['flat', 'heads'])
def test_norms_of_heads(shape):
  """OLMo 2 has one vector for all of them, Command R+ a matrix."""
  transform = nk.RMSNorm(axis=(-2, -1))
  state = {'q_norm.weight': draw(*shape)}
  layer = nnx.Dict(q_norm=normkit.nnx.Norm(transform, X))
  filled = convert.from_torch(state, layer)
  flat = exact_rms(X.reshape(2, 3, 32), state['q_norm.weight'].reshape(32))
  y = filled['q_norm'](X)
  np.testing.assert_allclose(y, flat.reshape(X.shape), rtol=1e-5, atol=1e-5)
  chex.assert_trees_all_equal(convert.to_torch(filled, like=state), state)


def test_axes_of_one_size_are_still_refused():
  here = {'params': {'n': {'scale': jnp.ones((4, 4))}}}
  with pytest.raises(ValueError, match='norm over several axes'):
    convert.from_torch({'n.weight': draw(4, 4)}, here)


def test_projections_that_only_begin_like_packed_ones():
  """Qwen3-Next's in_proj_qkvz is a layer, not MultiheadAttention's array."""
  model = nn.Dense(6, use_bias=False, name='in_proj_qkvz')
  state = {'weight': draw(6, 8)}
  here = {'params': {'in_proj_qkvz': shapes(model, X)['params']}}
  there = {'in_proj_qkvz.weight': state['weight']}
  variables = convert.from_torch(there, here)
  kernel = np.asarray(variables['params']['in_proj_qkvz']['kernel'])
  np.testing.assert_array_equal(kernel, state['weight'].T)


# The way back, alike.


def test_names_there_that_flax_has_too():
  """A `kernel` goes as it is, and comes back so; a count that is not here."""
  state = {
    'a.kernel': draw(3, 5),
    'a.gamma': draw(3),  # a layer scale beside it, of no norm
    'bn.weight': draw(5),
    'bn.bias': draw(5),
    'bn.running_mean': draw(5),
    'bn.running_var': np.ones(5, np.float32),
    'bn.num_batches_tracked': np.asarray(7),
  }
  here = {
    'params': {
      'x': {'kernel': jnp.ones((3, 5)), 'gamma': jnp.ones(3)},
      'bn': {'scale': jnp.ones(5), 'bias': jnp.ones(5)},
    },
    'batch_stats': {'bn': {'mean': jnp.ones(5), 'var': jnp.ones(5)}},
  }
  names = {'a': 'x'}
  variables = convert.from_torch(state, here, names=names)
  back = convert.to_torch(variables, names=names, like=state)
  chex.assert_trees_all_equal(back, state)


def test_what_is_not_alike_is_listed():
  here = {'params': {'a': {'kernel': draw(3, 5)}, 'b': {'table': draw(2, 3)}}}
  like = {
    'a.weight': draw(3, 5),
    'b.table': draw(3, 2),  # of the same size, and not the same
    'c.bias': draw(1),
  }
  with pytest.raises(ValueError, match='3 arrays') as caught:
    convert.to_torch(here, like=like)
  for fault in (
    "shape: 'a/kernel' becomes (5, 3), but 'a.weight' is (3, 5)",
    "shape: 'b/table' becomes (2, 3)",
    "missing: 'c/bias', for 'c.bias' (1,)",
  ):
    assert fault in str(caught.value)
  with pytest.raises(ValueError, match="extra: 'b/table'"):
    convert.to_torch(here, like={'a.weight': draw(5, 3)})
