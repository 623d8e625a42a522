"""Which parameters decay, in trees of normkit, linen and nnx."""

import functools

from cases import CASES as NORMS
from flax import linen as nn, nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import normkit as nk
from normkit import linen as kl, nnx as kn
from normkit.masks import decay_mask
from normkit.weights import WeightNorm

KEY = jax.random.key(0)
DECAY = 0.25


def ones(*shape):
  return jax.device_put(np.ones(shape, np.float32))


class Linen(nn.Module):
  """A bit of everything."""

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(5, 8)(tokens)  # (2, 6, 8)
    x = nn.LayerNorm()(nn.Dense(8)(x))
    x = nn.MultiHeadDotProductAttention(2, normalize_qk=True)(x, x)
    x = nn.BatchNorm(use_running_average=False)(nn.Conv(8, (3,))(x))
    x = x.reshape(2, 6, 2, 4)
    x = kl.Norm(nk.LayerNorm(axis=(-2, -1)))(x, train=True)
    x = nn.LayerNorm(reduction_axes=(-2, -1), feature_axes=(-2, -1))(x)
    x = nn.DenseGeneral((2, 4), axis=(-2, -1))(x).reshape(2, 6, 8)
    x = kl.WeightStandardization(nn.Dense(8), use_gain=True)(x)
    return kl.WeightNorm(nn.Dense(8), feature_axes=(0, 1))(x)


LINEN_DECAYS = {
  'Embed_0/embedding',
  'Dense_0/kernel',
  *(
    f'MultiHeadDotProductAttention_0/{name}/kernel'
    for name in ('query', 'key', 'value', 'out')
  ),
  'Conv_0/kernel',
  'DenseGeneral_0/kernel',
  'Dense_1/kernel',  # of the wrappers
  'Dense_2/kernel',
}


class NNX(nnx.Module):
  """The same, but for the dense layer over two axes."""

  def __init__(self, rngs, norm=nk.LayerNorm(axis=(-2, -1))):  # noqa: B008
    self.embed = nnx.Embed(5, 8, rngs=rngs)
    self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
    self.layer_norm = nnx.LayerNorm(8, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(
      2, 8, normalize_qk=True, decode=False, rngs=rngs
    )
    self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
    self.batch_norm = nnx.BatchNorm(8, rngs=rngs)
    self.norm = kn.Norm(norm, ones(2, 6, 2, 4))
    self.standard = kn.WeightStandardization(
      nnx.Linear(8, 8, rngs=rngs), use_gain=True, rngs=rngs
    )
    self.weight_norm = kn.WeightNorm(
      nnx.Linear(8, 8, rngs=rngs), feature_axes=(0, 1), rngs=rngs
    )


NNX_DECAYS = {
  'embed/embedding',
  'layers/0/kernel',
  'layers/1/kernel',
  *(f'attention/{n}/kernel' for n in ('query', 'key', 'value', 'out')),
  'conv/kernel',
  'standard/layer_instance/kernel',
  'weight_norm/layer_instance/kernel',
}
TOKENS = jnp.arange(12).reshape(2, 6) % 5


@functools.cache
def linen_params():
  shapes = jax.eval_shape(Linen().init, KEY, TOKENS)['params']
  return jax.tree.map(lambda s: np.full(s.shape, 0.5, s.dtype), shapes)


def decaying(tree):
  """The paths at which a tree of booleans is True."""
  leaves = jax.tree.leaves_with_path(tree)
  assert all(isinstance(leaf, bool) for _, leaf in leaves)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/').removesuffix(
      '/value'
    )
    for path, leaf in leaves
    if leaf
  }


def decayed(params, optimizer):
  """The paths of what an optimizer moves where the gradients are zero."""

  @jax.jit
  def step(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    return updates, optax.apply_updates(params, updates)

  updates, new = step(params)
  moved = jax.tree.map(lambda u: bool(np.any(np.asarray(u) != 0)), updates)
  jax.tree.map(
    lambda p, n, m: np.testing.assert_allclose(n, p * (1 - DECAY * m)),
    params,
    new,
    moved,
  )
  return decaying(moved)


def adamw(mask):
  return optax.adamw(1.0, weight_decay=DECAY, mask=mask)


def test_linen():
  params = linen_params()
  mask = decay_mask(params)
  assert jax.tree.structure(mask) == jax.tree.structure(params)
  assert decaying(mask) == LINEN_DECAYS
  shapes = jax.eval_shape(lambda: params)
  assert decay_mask(shapes) == mask
  assert decaying(decay_mask({'params': params})) == {
    f'params/{path}' for path in LINEN_DECAYS
  }


def test_rank_alone_would_not_do():
  """What the mask is for: norms and biases of rank two."""
  params = linen_params()
  by_rank = decaying(jax.tree.map(lambda p: p.ndim > 1, params))
  assert by_rank - LINEN_DECAYS == {
    'Norm_0/scale',
    'Norm_0/bias',
    'LayerNorm_1/scale',
    'LayerNorm_1/bias',
    'DenseGeneral_0/bias',
    *(
      f'MultiHeadDotProductAttention_0/{name}/bias'
      for name in ('query', 'key', 'value')
    ),
    'WeightNorm_0/Dense_2/kernel/scale',
  }
  assert by_rank > LINEN_DECAYS


@pytest.mark.parametrize('pure', [False, True])
def test_nnx(pure):
  state = nnx.state(NNX(nnx.Rngs(0)), nnx.Param)
  if pure:
    state = nnx.to_pure_dict(state)
  mask = decay_mask(state)
  assert jax.tree.structure(mask) == jax.tree.structure(state)
  assert decaying(mask) == NNX_DECAYS


def test_adamw_linen():
  """What decays is what the mask says; beside clipping too, and under jit."""
  params = linen_params()
  for mask in decay_mask, decay_mask(params):
    assert decayed(params, adamw(mask)) == LINEN_DECAYS
  chain = optax.chain(optax.adaptive_grad_clip(0.01), adamw(decay_mask))
  assert decayed(params, chain) == LINEN_DECAYS
  assert decayed(params, adamw(None)) > LINEN_DECAYS


def test_adamw_nnx():
  model = NNX(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, adamw(decay_mask), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    state = nnx.state(model, nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.zeros_like, state))

  before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  step(model, optimizer)
  after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  moved = jax.tree.map(lambda b, a: not np.array_equal(b, a), before, after)
  assert decaying(moved) == NNX_DECAYS


def test_norm_params_anywhere():
  """Of any rank, and all that they hold."""
  weights = {'kernel': ones(3, 2), 'bias': ones(2)}
  scales = WeightNorm(feature_axes=(0, 1)).init(weights)[0]
  tree = {
    'a': [weights, nk.NormParams(ones(2, 3), ones(2, 3))],
    'b': (scales, {'c': nk.NormParams(bias=ones(2, 3, 4))}),
  }
  assert decaying(decay_mask(tree)) == {'a/0/kernel'}
  assert decay_mask(scales).scale == {'kernel': False, 'bias': None}


CASES = {
  'norm': (dict(scale=ones(2, 3), bias=ones(2, 3)), set()),
  'scale alone': (dict(scale=ones(2, 3)), set()),
  'bias alone': (dict(bias=ones(2, 3)), set()),
  'haiku': (dict(scale=ones(1, 1, 3), offset=ones(1, 1, 3)), set()),
  'vectors': (dict(w=ones(3), a=ones(), s=2.0), set()),
  'scale beside a kernel': (
    dict(kernel=ones(4, 2, 3), scale=ones(2, 3), bias=ones(2, 3)),
    {'kernel', 'scale'},
  ),
  'bias that fits no kernel': (
    dict(kernel=ones(4, 2, 3), bias=ones(3, 2)),
    {'kernel', 'bias'},
  ),
  'bias of equal rank': (
    dict(kernel=ones(2, 3), bias=ones(2, 3)),
    {'kernel', 'bias'},
  ),
  'batched': (dict(kernel=ones(7, 4, 3), bias=ones(7, 3)), {'kernel'}),
  'local': (dict(kernel=ones(5, 6, 4, 3), bias=ones(5, 6, 3)), {'kernel'}),
  'weights that fit': (dict(qkv=ones(3, 8, 8), out=ones(8, 8)), {'qkv', 'out'}),
  'bias of a name': (
    dict(qkv=ones(8, 3, 2), qkv_bias=ones(3, 2)),
    {'qkv'},
  ),
  'lora': (dict(lora_a=ones(4, 2), lora_b=ones(2, 4)), {'lora_a', 'lora_b'}),
  'the kernel is elsewhere': (
    dict(scale=ones(2, 3), inner=dict(kernel=ones(4, 2, 3))),
    {'inner/kernel'},
  ),
  'a dictionary called scale': (
    dict(scale=dict(kernel=ones(2, 3))),
    {'scale/kernel'},
  ),
  'an array alone': (ones(2, 3), {''}),
  'a list': ([ones(2, 3), ones(3)], {'0'}),
  'nothing': ({}, set()),
  'None': (dict(kernel=ones(2, 3), bias=None), {'kernel'}),
}


@pytest.mark.parametrize(('tree', 'expected'), CASES.values(), ids=CASES)
def test_rule(tree, expected):
  mask = decay_mask(tree)
  assert jax.tree.structure(mask) == jax.tree.structure(tree)
  assert decaying(mask) == expected


def test_stacked_layers():
  """Each parameter has an axis more; the same ones decay."""

  class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      x = nn.LayerNorm()(nn.Dense(8)(x))
      return nn.MultiHeadDotProductAttention(2)(x, x), None

  stack = nn.scan(
    Block, variable_axes={'params': 0}, split_rngs={'params': True}, length=3
  )
  variables = jax.eval_shape(stack().init, KEY, ones(2, 6, 8), None)
  attention = 'MultiHeadDotProductAttention_0'
  assert decaying(decay_mask(variables['params'])) == {
    'Dense_0/kernel',
    *(f'{attention}/{n}/kernel' for n in ('query', 'key', 'value', 'out')),
  }


def test_boxes():
  """Sharding annotations of linen are no part of the names."""
  init = nn.with_partitioning(nn.initializers.ones, (None, 'x'))
  layer = nn.DenseGeneral((2, 3), kernel_init=init, bias_init=init)
  params = layer.init(KEY, ones(1, 4))['params']
  assert isinstance(params['bias'], nn.Partitioned)
  mask = decay_mask(params)
  assert jax.tree.structure(mask) == jax.tree.structure(params)
  assert decaying(mask) == {'kernel'}


def test_where():
  """It sees paths without boxes, and every leaf; None leaves it to the rule."""
  seen = {}

  def where(path, leaf):
    seen[path] = leaf
    return {'embed/embedding': False, 'norm/scale': True}.get(path)

  model = NNX(nnx.Rngs(0))
  state = nnx.state(model, nnx.Param)
  mask = functools.partial(decay_mask, where=where)
  expected = NNX_DECAYS - {'embed/embedding'} | {'norm/scale'}
  assert decaying(mask(state)) == expected
  assert len(seen) == len(jax.tree.leaves(state))
  assert seen['norm/scale'] is model.norm.scale.get_value()
  pure = jax.tree.map(lambda x: x + 0.5, nnx.to_pure_dict(state))
  assert decayed(pure, adamw(mask)) == expected
  params = {'a': nk.NormParams(ones(3), ones(3))}
  mask = decay_mask(params, lambda path, _: path == 'a/scale')
  assert mask == {'a': nk.NormParams(scale=True, bias=False)}


@pytest.mark.parametrize(
  ('where', 'message'),
  [
    ('kernel', "where must be a function of a path and a leaf, got 'kernel'"),
    (
      lambda path, leaf: 1,
      "where must return True, False or None, got 1 .*'a'",
    ),
    (lambda path, leaf: leaf > 0, 'where must return .* static'),
  ],
)
def test_errors(where, message):
  with pytest.raises(TypeError, match=message):
    decay_mask({'a': ones(3)}, where)


@pytest.mark.parametrize('case', NORMS, ids=[c.name for c in NORMS])
def test_no_norm_decays(case):
  """Not as a tuple, nor as the dictionary of a module; stacked or not."""
  params, _ = case.transform.init(jnp.ones(case.shape))
  stacked = jax.tree.map(lambda p: jnp.stack([p, p]), params)
  for one in params, stacked, jax.tree.map(lambda p: p[None], stacked):
    as_dict = {n: p for n, p in one._asdict().items() if p is not None}
    for tree in one, {'norm': as_dict}:
      assert not any(jax.tree.leaves(decay_mask(tree)))
