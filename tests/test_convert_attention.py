"""Weights of attention: heads, projections that share an array, and back."""

import chex
from flax import linen as nn, nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normkit.tools import convert

D, HEADS, SIZE = 6, 2, 3
WIDE = HEADS * SIZE
NAMES = ('query', 'key', 'value')
TORCH = "needs torch: pip install 'normkit[benchmarks]'"


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def here(bias=True):
  """The leaves of Flax's attention, as shapes."""
  tree = {
    **{n: {'kernel': (D, HEADS, SIZE), 'bias': (HEADS, SIZE)} for n in NAMES},
    'out': {'kernel': (HEADS, SIZE, D), 'bias': (D,)},
  }
  if not bias:
    tree = {name: {'kernel': leaves['kernel']} for name, leaves in tree.items()}
  return jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    {'params': {'attn': tree}},
    is_leaf=lambda node: isinstance(node, tuple),
  )


def separate(bias=True):
  """Four linear layers of PyTorch, by Flax's names."""
  state = {f'attn.{n}.weight': draw(i, WIDE, D) for i, n in enumerate(NAMES)}
  state['attn.out.weight'] = draw(3, D, WIDE)
  if bias:
    state |= {f'attn.{n}.bias': draw(i, WIDE) for i, n in enumerate(NAMES, 4)}
    state['attn.out.bias'] = draw(7, D)
  return state


def fused(state, name):
  """The same with query, key and value in one array."""
  given = dict(state)
  for leaf in ('weight', 'bias'):
    parts = [given.pop(f'attn.{n}.{leaf}', None) for n in NAMES]
    if parts[0] is not None:
      given[name.format(leaf)] = np.concatenate(parts)
  return given


def expected(state):
  """By the definition: head h is rows h * SIZE to (h + 1) * SIZE."""
  tree = {}
  for key, value in state.items():
    _, name, leaf = key.split('.')
    rows = [value[..., h * SIZE : (h + 1) * SIZE] for h in range(HEADS)]
    if leaf == 'bias':
      want = value if name == 'out' else np.stack(rows)
    elif name == 'out':
      want = np.stack([block.T for block in rows])
    else:
      blocks = [value[h * SIZE : (h + 1) * SIZE].T for h in range(HEADS)]
      want = np.stack(blocks, 1)
    leaf = 'kernel' if leaf == 'weight' else leaf
    tree.setdefault(name, {})[leaf] = want
  return {'params': {'attn': tree}}


@pytest.mark.parametrize('bias', [True, False])
def test_linear_layers_with_heads_and_back(bias):
  state = separate(bias)
  got = convert.from_torch(state, here(bias))
  chex.assert_trees_all_equal(jax.tree.map(np.asarray, got), expected(state))
  chex.assert_trees_all_equal(convert.to_torch(got), state)
  chex.assert_trees_all_equal(convert.to_torch(got, like=state), state)


@pytest.mark.parametrize(
  ('name', 'out', 'names'),
  [
    ('attn.qkv.{}', 'attn.proj', None),  # timm
    ('attn.c_attn.{}', 'attn.c_proj', None),  # GPT
    ('attn.in_proj_{}', 'attn.out_proj', None),  # MultiheadAttention
    ('in_proj_{}', 'out_proj', {'in_proj': 'attn', 'out_proj': 'attn/out'}),
    ('h.0.qkv.{}', 'h.0.o_proj', {'h.0': 'attn'}),
  ],
)
def test_fused_projections_are_split_and_merged(name, out, names):
  state = separate()
  given = fused(state, name)
  for leaf in ('weight', 'bias'):
    given[f'{out}.{leaf}'] = given.pop(f'attn.out.{leaf}')
  got = convert.from_torch(given, here(), names=names)
  chex.assert_trees_all_equal(jax.tree.map(np.asarray, got), expected(state))
  back = convert.to_torch(got, names=names, like=given)
  chex.assert_trees_all_equal(back, given)


def test_projections_of_other_sizes_are_split_by_those_here():
  """Fewer heads of keys and values, and kernels that are matrices."""
  sizes = {'q_proj': 8, 'k_proj': 4, 'v_proj': 4}
  tree = {name: {'kernel': jnp.zeros((D, n))} for name, n in sizes.items()}
  weight = draw(0, 16, D)
  state = {'qkv_proj.weight': weight}
  got = convert.from_torch(state, {'params': tree})['params']
  want = np.split(weight, [8, 12])
  for name, part in zip(sizes, want, strict=True):
    np.testing.assert_array_equal(got[name]['kernel'], part.T)
  back = convert.to_torch({'params': got}, like=state)
  chex.assert_trees_all_equal(back, state)


def test_fused_projections_that_do_not_fit_are_refused():
  state = separate()
  given = fused(state, 'attn.qkv.{}')
  given['attn.qkv.weight'] = given['attn.qkv.weight'][:-1]
  with pytest.raises(ValueError, match=r"'attn.qkv.weight' \(17, 6\)"):
    convert.from_torch(given, here())
  each = fused(state, 'attn.query_key_value.{}')  # each head has its three
  with pytest.raises(
    ValueError, match=r"extra: 'attn\.query_key_value\.weight'"
  ):
    convert.from_torch(each, here())
  with pytest.raises(ValueError, match=r"extra: 'attn\.qkv\.bias'"):
    convert.from_torch(fused(state, 'attn.qkv.{}'), here(bias=False))


def test_a_convolution_is_no_attention():
  """(k, in, out) beside others of the same sizes, with and without bias."""
  state = {
    'a.conv.weight': draw(0, 3, 3, 2),
    'a.next.weight': draw(1, 2, 3, 3),
    'a.next.bias': draw(2, 2),
    'a.query.weight': draw(3, 3, 4, 2),
    'a.key.weight': draw(4, 3, 4, 1),
    'a.v.weight': draw(5, 3, 4, 3, 3),
  }
  tree = {
    'conv': {'kernel': jnp.zeros((2, 3, 3))},
    'next': {'kernel': jnp.zeros((3, 3, 2)), 'bias': jnp.zeros(2)},
    'query': {'kernel': jnp.zeros((2, 4, 3))},
    'key': {'kernel': jnp.zeros((1, 4, 3))},
    'v': {'kernel': jnp.zeros((3, 3, 4, 3))},
  }
  got = convert.from_torch(state, {'params': {'a': tree}})
  chex.assert_trees_all_equal(convert.to_torch(got), state)
  wrong = {**state, 'a.next.weight': draw(1, 2, 9)}
  with pytest.raises(ValueError, match=r"shape: 'a.next.weight' \(2, 9\)"):
    convert.from_torch(wrong, {'params': {'a': tree}})


def test_nnx_attention_tells_its_heads():
  """Without biases too, under any names."""

  class Block(nnx.Module):
    def __init__(self, rngs):
      options = {'use_bias': False, 'rngs': rngs}
      self.one = nnx.LinearGeneral(D, (HEADS, SIZE), **options)
      self.two = nnx.LinearGeneral((HEADS, SIZE), D, axis=(-2, -1), **options)

  state = {'one.weight': draw(0, WIDE, D), 'two.weight': draw(1, D, WIDE)}
  got = convert.from_torch(state, Block(nnx.Rngs(0)))
  one, two = got.one.kernel[...], got.two.kernel[...]
  np.testing.assert_array_equal(one[:, 1, 2], state['one.weight'][SIZE + 2])
  np.testing.assert_array_equal(two[1, 2], state['two.weight'][:, SIZE + 2])
  chex.assert_trees_all_equal(convert.to_torch(got), state)


def test_haiku_and_equinox_have_heads_too():
  state = separate()
  flipped = {'weight': lambda a: a.T, 'bias': lambda a: a}
  there = {}
  for key, value in state.items():
    _, name, leaf = key.split('.')
    name = 'linear' if name == 'out' else name
    module = there.setdefault(f'attn/{name}', {})
    module[{'weight': 'w', 'bias': 'b'}[leaf]] = flipped[leaf](value)
  got = convert.from_haiku(there, None, here())
  chex.assert_trees_all_equal(jax.tree.map(np.asarray, got), expected(state))
  eqx = pytest.importorskip(
    'equinox', reason="needs equinox: pip install 'normkit[benchmarks]'"
  )
  options = {'use_query_bias': True, 'use_key_bias': True}
  options |= {'use_value_bias': True, 'use_output_bias': True}
  attention = eqx.nn.MultiheadAttention(
    HEADS, D, key=jax.random.key(0), qk_size=SIZE, vo_size=SIZE, **options
  )
  got = convert.from_equinox({'attn': attention}, here())
  x = draw(9, 4, D)
  model = nn.MultiHeadDotProductAttention(HEADS)
  y = model.apply({'params': got['params']['attn']}, x)
  np.testing.assert_allclose(y, attention(x, x, x), rtol=2e-5, atol=2e-6)


def test_inputs_first():
  """The square `Conv1D` of GPT-2, and one that holds three projections."""
  state = separate()
  square = {'attn.c_attn.weight': draw(0, D, 3 * WIDE)}
  square['attn.c_proj.weight'] = state['attn.out.weight']
  template = here(bias=False)
  options = {'inputs_first': ('attn/*',)}
  got = convert.from_torch(square, template, **options)
  kernels = {k: v['kernel'] for k, v in got['params']['attn'].items()}
  for i, name in enumerate(NAMES):
    want = square['attn.c_attn.weight'][:, i * WIDE : (i + 1) * WIDE]
    np.testing.assert_array_equal(kernels[name].reshape(D, WIDE), want)
  np.testing.assert_array_equal(
    kernels['out'].reshape(WIDE, D), square['attn.c_proj.weight']
  )
  back = convert.to_torch(got, **options, like=square)
  chex.assert_trees_all_equal(back, square)
  plain = convert.to_torch(got, **options)
  np.testing.assert_array_equal(
    plain['attn.out.weight'], square['attn.c_proj.weight']
  )
  with pytest.raises(ValueError, match="inputs_first: 'mlp' matches no layer"):
    convert.from_torch(square, template, inputs_first=('mlp',))


def test_torch_attention_computes_the_same():
  torch = pytest.importorskip('torch', reason=TORCH)
  there = torch.nn.MultiheadAttention(D, HEADS, batch_first=True)
  torch.nn.init.normal_(there.in_proj_bias)
  x = draw(0, 2, 4, D)
  with torch.no_grad():
    want = there(*[torch.from_numpy(x)] * 3)[0].numpy()
  model = nn.MultiHeadDotProductAttention(HEADS)
  empty = jax.eval_shape(model.init, jax.random.key(0), x)
  variables = convert.from_torch(there.state_dict(), empty)
  np.testing.assert_allclose(
    model.apply(variables, x), want, rtol=2e-5, atol=2e-6
  )
  module = nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=nnx.Rngs(0))
  module = convert.from_torch(there.state_dict(), module)
  np.testing.assert_allclose(module(x), want, rtol=2e-5, atol=2e-6)
  state = {k: v.numpy() for k, v in there.state_dict().items()}
  for filled in variables, module:
    back = convert.to_torch(filled, like=state)
    chex.assert_trees_all_equal(back, state)
  there = torch.nn.MultiheadAttention(D, HEADS, kdim=4, vdim=5)
  tree = here()['params']['attn']
  for name, size in (('key', 4), ('value', 5)):
    shape = jax.ShapeDtypeStruct((size, HEADS, SIZE), jnp.float32)
    tree[name] = {**tree[name], 'kernel': shape}
  got = convert.from_torch(there.state_dict(), {'params': tree})
  state = {k: v.numpy() for k, v in there.state_dict().items()}
  chex.assert_trees_all_equal(convert.to_torch(got, like=state), state)


@pytest.mark.parametrize('form', ['transposed', 'dilated'])
def test_transposed_convolutions_in_groups(form):
  """(in, out / groups, k) of PyTorch; each input adds its kernel, by hand."""
  groups, ins, outs, size, stride = 2, 4, 6, 3, 2
  weight = draw(0, ins, outs // groups, size)
  x = draw(1, 1, 5, ins)
  want = np.zeros((1, (5 - 1) * stride + size, outs))
  for i in range(5):
    for c in range(ins):
      group = c // (ins // groups)
      at = slice(group * outs // groups, (group + 1) * outs // groups)
      patch = x[:, i, c, None, None] * weight[c].T
      want[:, i * stride : i * stride + size, at] += patch
  if form == 'transposed':
    model = nn.ConvTranspose(
      outs, (size,), (stride,), padding='VALID', use_bias=False
    )
  else:
    model = nn.Conv(
      outs,
      (size,),
      padding=[(size - 1, size - 1)],
      input_dilation=stride,
      feature_group_count=groups,
      use_bias=False,
    )
  template = jax.eval_shape(model.init, jax.random.key(0), x)
  state, options = {'weight': weight}, {'transposed': ('',)}
  got = convert.from_torch(state, template, **options)
  np.testing.assert_allclose(model.apply(got, x), want, rtol=1e-5, atol=1e-5)
  back = convert.to_torch(got, like=state, **options)
  chex.assert_trees_all_equal(back, state)
  if form == 'transposed':
    trained = jax.tree.map(lambda a: a + 1, got)
    with pytest.raises(ValueError, match='shape:'):
      convert.to_torch(trained, like=state, **options)


def as_modules(tree):
  """A tree of shapes as a module of modules."""
  if not isinstance(tree, dict):
    return nnx.Param(jnp.zeros(tree.shape, tree.dtype))
  return nnx.Dict({name: as_modules(node) for name, node in tree.items()})


@pytest.mark.parametrize('form', ['linen', 'last axis', 'nnx'])
def test_layers_that_are_scanned(form):
  """Attention and a norm three times over, one layer there for each."""
  axis = -1 if form == 'last axis' else 0
  one = {**here()['params'], 'norm': {'scale': (D,)}}
  is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
  stacked = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(
      np.insert(a, len(a) if axis else 0, 3).tolist(), jnp.float32
    ),
    jax.tree.map(
      lambda a: a if is_shape(a) else a.shape, one, is_leaf=is_shape
    ),
    is_leaf=is_shape,
  )
  state, want = {}, []
  for i in range(3):
    layer = {k: v + i for k, v in fused(separate(), 'attn.qkv.{}').items()}
    scale = draw(i, D)
    layer['norm.weight'] = scale
    state |= {f'h.{i}.{name}': value for name, value in layer.items()}
    tree = jax.tree.map(lambda a, n=i: a + n, expected(separate())['params'])
    want.append(tree | {'norm': {'scale': scale}})
  state['head.bias'] = draw(9, 2)
  whole = jax.tree.map(lambda *arrays: np.stack(arrays, axis), *want)
  template = {'params': {'blocks': stacked, 'head': {'bias': jnp.ones(2)}}}
  if form == 'nnx':
    template = as_modules(template['params'])
  options = {'names': {'h': 'blocks'}}
  options['scanned'] = {'blocks': -1} if axis else ('blocks',)
  got = convert.from_torch(state, template, **options)
  blocks = (
    nnx.to_pure_dict(nnx.state(got))['blocks']
    if form == 'nnx'
    else got['params']['blocks']
  )
  chex.assert_trees_all_equal(jax.tree.map(np.asarray, blocks), whole)
  back = convert.to_torch(got, **options, like=state)
  chex.assert_trees_all_equal(back, state)
  plain = convert.to_torch(got, **options)
  np.testing.assert_array_equal(plain['h.2.norm.weight'], draw(2, D))


def test_what_is_not_scanned_is_told():
  template = {
    'params': {'a': {'kernel': jnp.ones((3, 2)), 'bias': jnp.ones(2)}}
  }
  for path in ('a', 'b'):
    with pytest.raises(ValueError, match=f"scanned: '{path}' must be the path"):
      convert.from_torch({}, template, scanned=(path,))
  with pytest.raises(TypeError, match=r"a sequence of paths: \('a',\)"):
    convert.from_torch({}, template, scanned='a')


def test_separable_convolutions_of_keras():
  """Depthwise (H, W, C, M), then pointwise: two layers here."""
  depth, point, bias = draw(0, 2, 2, 3, 2), draw(1, 1, 1, 6, 4), draw(2, 4)

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      options = {'padding': 'VALID', 'feature_group_count': 3}
      x = nn.Conv(6, (2, 2), use_bias=False, name='depth', **options)(x)
      return nn.Conv(4, (1, 1), name='point')(x)

  x = draw(3, 1, 3, 3, 3)
  template = jax.eval_shape(Model().init, jax.random.key(0), x)
  names = {'sep/depthwise': 'depth', 'sep/pointwise': 'point'}
  windows = np.lib.stride_tricks.sliding_window_view(
    np.float64(x), (2, 2), axis=(1, 2)
  )
  want = np.einsum('nhwcab,abcm->nhwcm', windows, depth).reshape(1, 2, 2, 6)
  want = want @ point[0, 0] + bias
  named = {'depthwise_kernel': depth, 'pointwise_kernel': point, 'bias': bias}
  for weights in ({'sep': [depth, point, bias]}, {'sep': named}):
    got = convert.from_keras(weights, template, names=names)
    np.testing.assert_allclose(
      Model().apply(got, x), want, rtol=1e-4, atol=1e-5
    )
