"""Names that match themselves: what decides a pair, and what is refused.

State dicts are names and shapes, as PyTorch's models have them; what runs in
PyTorch is in test_names_of_peers.py.
"""

import functools
import json

from flax import linen as nn, nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twins

from normkit.tools import cli, convert, files

IMAGE = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
zeros = functools.partial(np.zeros, dtype=np.float32)
ROW = jax.ShapeDtypeStruct((1, 4), jnp.float32)


def conv(name, outs, ins, size=1):
  return {f'{name}.weight': (outs, ins, size, size)}


def linear(name, outs, ins):
  return {f'{name}.weight': (outs, ins), f'{name}.bias': (outs,)}


def norm(name, width):
  return {f'{name}.weight': (width,), f'{name}.bias': (width,)}


def batch_norm(name, width):
  stats = {f'{name}.running_{n}': (width,) for n in ('mean', 'var')}
  return norm(name, width) | stats | {f'{name}.num_batches_tracked': ()}


def bottleneck(name, ins, width, shortcut):
  layers = {
    **conv(f'{name}.conv1', width, ins),
    **batch_norm(f'{name}.bn1', width),
    **conv(f'{name}.conv2', width, width, 3),
    **batch_norm(f'{name}.bn2', width),
    **conv(f'{name}.conv3', 4 * width, width),
    **batch_norm(f'{name}.bn3', 4 * width),
  }
  if shortcut:
    layers |= conv(f'{name}.downsample.0', 4 * width, ins)
    layers |= batch_norm(f'{name}.downsample.1', 4 * width)
  return layers


RESNET = {
  **conv('conv1', 4, 3, 7),
  **batch_norm('bn1', 4),
  **bottleneck('layer1.0', 4, 4, True),
  **bottleneck('layer1.1', 16, 4, False),
  **bottleneck('layer2.0', 16, 8, True),
  **linear('fc', 5, 32),
}


def vit(depth=2, width=4):
  layers = {
    'cls_token': (1, 1, width),
    'pos_embed': (1, 5, width),
    **linear('patch_embed.proj', width, 0),
    'patch_embed.proj.weight': (width, 3, 8, 8),
  }
  for i in range(depth):
    layers |= norm(f'blocks.{i}.norm1', width)
    layers |= linear(f'blocks.{i}.attn.qkv', 3 * width, width)
    layers |= linear(f'blocks.{i}.attn.proj', width, width)
    layers |= norm(f'blocks.{i}.norm2', width)
    layers |= linear(f'blocks.{i}.mlp.fc1', 8, width)
    layers |= linear(f'blocks.{i}.mlp.fc2', width, 8)
  return layers | norm('norm', width) | linear('head', 5, width)


def arrays(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return {
    k: np.asarray(abs(rng.normal(size=s)), np.float32)
    for k, s in shapes.items()
  }


def in_file(shapes):
  """As safetensors has them: sorted."""
  return dict(sorted(arrays(shapes).items()))


def match(shapes, model, x, **options):
  return convert.match(shapes, twins.empty(model, x), model.apply, x, **options)


def why(names):
  return {pair.there: pair.why for pair in names.pairs}


@pytest.mark.parametrize('shortcut_first', [False, True])
def test_residual_network(shortcut_first):
  """A shortcut of the same shape as the last convolution is told by flow."""
  twin = twins.ResNet((2, 1), 4, 4, 5, shortcut_first)
  names = match(in_file(RESNET), twin, IMAGE)
  places = [1, 2, 3, 0] if shortcut_first else [0, 1, 2, 3]
  want = {'conv1': 'Conv_0', 'bn1': 'BatchNorm_0', 'fc': 'Dense_0'}
  for block, here in (('1.0', 0), ('1.1', 1), ('2.0', 2)):
    for i, place in enumerate(places if here != 1 else [0, 1, 2]):
      there = f'layer{block}'
      pair = (f'{there}.conv{i + 1}', f'{there}.bn{i + 1}')
      if i == 3:
        pair = f'{there}.downsample.0', f'{there}.downsample.1'
      want[pair[0]] = f'Block_{here}/Conv_{place}'
      want[pair[1]] = f'Block_{here}/BatchNorm_{place}'
  assert dict(names) == want
  assert match(arrays(RESNET), twin, IMAGE) == names


def test_vision_transformer():
  """Fused attention, arrays of no layer, and the way back."""
  twin = twins.ViT(8, 4, 2, 2, 8, 5)
  state = in_file(vit())
  names = match(state, twin, IMAGE)
  block = 'Transformer/encoderblock_1/'
  assert names['blocks.1.attn.qkv'] == (
    f'{block}MultiHeadDotProductAttention_0/qkv'
  )
  assert names['blocks.1.norm2'] == f'{block}LayerNorm_1'
  assert names['norm'] == 'Transformer/encoder_norm'
  assert names['pos_embed'] == 'Transformer/posembed_input/pos_embedding'
  assert names['cls_token'] == 'cls'
  filled = convert.from_torch(state, twins.empty(twin, IMAGE), names=names)
  np.testing.assert_array_equal(filled['params']['cls'], state['cls_token'])
  back = convert.to_torch(filled, names=names, like=state)
  assert back.keys() == state.keys()
  for name, array in state.items():
    np.testing.assert_array_equal(back[name], array)


class Flat(nn.Module):
  """Norms of one shape beside each other, the last after a loop."""

  @nn.compact
  def __call__(self, x):
    for _ in range(2):
      x = x + nn.Dense(4)(nn.LayerNorm()(x))
    return nn.LayerNorm()(x)


FLAT = {
  **norm('embed.norm', 4),
  **linear('embed.fc', 4, 4),
  **norm('body.norm', 4),
  **linear('body.fc', 4, 4),
  **norm('norm', 4),
}


def test_definition_orders_what_flows():
  names = match(arrays(FLAT), Flat(), ROW)
  norms = [f'LayerNorm_{i}' for i in range(3)]
  assert [names[n] for n in ('embed.norm', 'body.norm', 'norm')] == norms
  assert why(names)['norm'] == 'definition'


def test_sorted_names_are_no_order():
  with pytest.raises(ValueError, match=r"'norm'.* may each be any of"):
    match(in_file(FLAT), Flat(), ROW)
  given = {'embed.norm': 'LayerNorm_0', 'embed.fc': 'Dense_0'}
  given['norm'] = 'LayerNorm_2'
  names = match(in_file(FLAT), Flat(), ROW, names=given)
  assert names['body.norm'] == 'LayerNorm_1'
  assert why(names)['norm'] == 'given'
  assert why(names)['body.fc'] == 'shape'


class Gated(nn.Module):
  """Two layers side by side, which only their names tell apart."""

  names: tuple[str | None, str | None] = (None, None)

  @nn.compact
  def __call__(self, x):
    first, second = (nn.Dense(4, name=name)(x) for name in self.names)
    return nn.silu(first) * second


@pytest.mark.parametrize(
  ('there', 'here'),
  [
    (('gate_proj', 'up_proj'), (None, None)),
    (('w1', 'w3'), (None, None)),  # numbers of what is side by side
    (('heads.0', 'heads.1'), (None, None)),
    (('heads.1', 'heads.2'), ('heads_0', 'heads_1')),
  ],
)
def test_side_by_side_is_no_order(there, here):
  state = arrays(linear(there[0], 4, 4) | linear(there[1], 4, 4))
  with pytest.raises(ValueError, match=f"'{there[0]}', '{there[1]}' may each"):
    match(state, Gated(here), ROW)


@pytest.mark.parametrize(
  ('there', 'here'),
  [
    (('gate_proj', 'up_proj'), ('up_proj', 'gate_proj')),
    (('up', 'gate'), ('gate', 'up')),
    (('mlp.heads.1', 'mlp.heads.0'), ('heads_0', 'heads_1')),
  ],
)
def test_equal_names(there, here):
  state = arrays(linear(there[0], 4, 4) | linear(there[1], 4, 4))
  names = match(state, Gated(here), ROW)
  assert dict(names) == dict(zip(there, reversed(here), strict=True))
  assert {*why(names).values()} == {'name'}


class Attention(nn.Module):
  """Query, key and value by name, called in another order."""

  @nn.compact
  def __call__(self, x):
    v, k, q = (nn.Dense(4, name=name)(x) for name in ('value', 'key', 'query'))
    return nn.Dense(4, name='out')(q * k + v)


def test_attention_goes_by_name():
  state = {}
  for name in ('q_proj', 'k_proj', 'v_proj', 'o_proj'):
    state |= linear(f'attn.{name}', 4, 4)
  names = match(in_file(state), Attention(), ROW)
  assert [names[f'attn.{n}_proj'] for n in 'qkvo'] == [
    *('query', 'key', 'value', 'out')
  ]
  given = {'attn.q_proj': 'query', 'attn.o_proj.': 'out'}
  assert match(in_file(state), Attention(), ROW, names=given) == names
  with pytest.raises(ValueError, match=r"to 'key', but query.* is 'query'"):
    match(in_file(state), Attention(), ROW, names={'attn.q_proj': 'key'})


def test_attention_that_is_joined_here_alone_is_refused():
  class Joined(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(4, name='out')(nn.Dense(12, name='qkv')(x)[:, :4])

  state = {}
  for name in ('q_proj', 'k_proj', 'v_proj', 'o_proj'):
    state |= linear(f'attn.{name}', 4, 4)
  with pytest.raises(ValueError, match='are one array here'):
    match(in_file(state), Joined(), ROW)


class Reversed(nn.Module):
  """Layers of one shape in a row, called by numbers that fall."""

  @nn.compact
  def __call__(self, x):
    for i in (2, 1):
      x = nn.relu(nn.Dense(4, name=f'fc{i}')(x))
    return x


def test_numbers_there_are_the_order_of_use():
  names = match(
    in_file(linear('a.1', 4, 4) | linear('a.10', 4, 4)), Reversed(), ROW
  )
  assert dict(names) == {'a.1': 'fc2', 'a.10': 'fc1'}
  assert {*why(names).values()} == {'numbers'}


def test_numbers_that_fall_are_no_order():
  """The first is used last, as its shape tells: no number is believed."""

  class Decoder(nn.Module):
    @nn.compact
    def __call__(self, x):
      for width in (4, 4, 3):
        x = nn.Dense(width)(x)
      return x

  state = linear('up.0', 3, 4) | linear('up.1', 4, 4) | linear('up.2', 4, 4)
  with pytest.raises(ValueError, match=r"'up.1', 'up.2' may each be any of"):
    match(arrays(state), Decoder(), ROW)


def test_beginnings_that_are_given_keep_to_their_paths():
  class Both(nn.Module):
    @nn.compact
    def __call__(self, x):
      left, right = (twins.MlpBlock(8, name=name)(x) for name in 'ab')
      return left * right

  state = {
    k: v
    for name in ('encoder', 'decoder')
    for k, v in (
      linear(f'{name}.fc1', 8, 4) | linear(f'{name}.fc2', 4, 8)
    ).items()
  }
  with pytest.raises(ValueError, match='may each be any of'):
    match(in_file(state), Both(), ROW)
  names = match(in_file(state), Both(), ROW, names={'encoder.': 'b/'})
  assert names['encoder.fc1'] == 'b/Dense_1'
  assert names['decoder.fc2'] == 'a/Dense_0'
  with pytest.raises(ValueError, match=r"'encoder.fc1' to 'c'"):
    match(in_file(state), Both(), ROW, names={'encoder': 'c'})
  with pytest.raises(ValueError, match="nothing there is called 'encode'"):
    match(in_file(state), Both(), ROW, names={'encode': 'a'})


class Nested(nn.Module):
  """A module, and the same layers loose beside it."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(twins.DenseNorm()(nn.LayerNorm()(nn.Dense(4)(x))))


def test_a_module_that_others_could_make_up_tells_nothing():
  """The one here is a part of 'second', not what holds the same there."""
  state = linear('first.fc', 4, 4) | norm('first.norm', 4)
  state |= linear('second.fc', 4, 4) | norm('second.norm', 4)
  state |= linear('second.out', 3, 4)
  with pytest.raises(ValueError, match=r"'first.fc', 'second.fc' may each"):
    match(in_file(state), Nested(), ROW)
  names = match(arrays(state), Nested(), ROW)
  assert names['first.fc'] == 'Dense_1'  # the outer one is made first
  assert why(names)['first.fc'] == 'definition'


class AfterNorm(nn.Module):
  """Blocks of a layer and the norm that follows, which cut those there."""

  @nn.compact
  def __call__(self, x):
    x = nn.LayerNorm()(x)
    for _ in range(2):
      x = twins.DenseNorm()(x)
    return x


def test_an_order_of_definition_that_is_turned_round_is_refused():
  state = {}
  for i in range(2):
    state |= norm(f'blocks.{i}.norm', 4) | linear(f'blocks.{i}.fc', 4, 4)
  state |= norm('norm', 4)
  with pytest.raises(ValueError, match=r"contradicts itself at 'blocks\.0"):
    match(arrays(state), AfterNorm(), ROW)


def test_what_has_no_peer_is_listed():
  state = in_file(linear('fc1', 4, 4) | linear('fc2', 3, 4))
  with pytest.raises(ValueError, match='no peer') as error:
    match(state, Reversed(), ROW)
  assert 'kernel (4, 3) of 2 arrays: 1 there (fc2), 0 here (none)' in str(
    error.value
  )
  assert '1 there (fc1), 2 here (fc1, fc2)' in str(error.value)


def test_ignored_and_wrapped():
  state = linear('a.1', 4, 4) | linear('a.2', 4, 4) | linear('aux', 9, 4)
  state = {'state_dict': arrays({f'module.{k}': s for k, s in state.items()})}
  names = match(state, Reversed(), ROW, ignore=['*aux*'])
  assert dict(names) == {'a.1': 'fc2', 'a.2': 'fc1'}


def test_arguments():
  state = in_file(linear('fc', 4, 4))
  template = twins.empty(Reversed(), ROW)
  with pytest.raises(TypeError, match='call must be a function'):
    convert.match(state, template, None, ROW)
  with pytest.raises(ValueError, match='framework must be one of'):
    match(state, Reversed(), ROW, framework='caffe')
  with pytest.raises(ValueError, match='names must be None, a mapping'):
    match(state, Reversed(), ROW, names='order')


def test_nnx_and_keras():
  """Layers of lists, which Keras' names tell by their numbers too."""

  class Model(nnx.Module):
    def __init__(self, rngs):
      layers = [nnx.Linear(4, 4, rngs=rngs) for _ in range(2)]
      self.layers = nnx.List([*layers, nnx.BatchNorm(4, rngs=rngs)])

    def __call__(self, x):
      first, second, bn = self.layers
      return bn(first(nnx.relu(second(x))))

  model = Model(nnx.Rngs(0))
  model.eval()
  rng = np.random.default_rng(0)
  weights = {
    'body/dense': [rng.normal(size=(4, 4)), np.ones(4)],
    'body/dense_1': [rng.normal(size=(4, 4)), np.zeros(4)],
    'body/batch_normalization': [np.ones(4) * i for i in range(4)],
  }
  given = {'body/dense': 'layers/1'}
  names = convert.match(
    weights, model, lambda m, x: m(x), ROW, framework='keras', names=given
  )
  assert names['body/dense_1'] == 'layers/0'
  filled = convert.from_keras(weights, model, names=names)
  want = np.float32(weights['body/dense_1'][0])
  np.testing.assert_array_equal(filled.layers[0].kernel[...], want)


@pytest.mark.parametrize('shortcut_first', [False, True])
def test_keras_writes_modules_into_names(shortcut_first):
  """Its applications number the shortcut first, whatever is called first."""
  weights = {}

  def add(name, ins, outs, size):
    weights[f'{name}_conv'] = [zeros((size, size, ins, outs))]
    weights[f'{name}_bn'] = [zeros(outs) for _ in range(4)]

  add('conv1', 3, 4, 7)
  for stage, block, ins in ((2, 1, 4), (2, 2, 16), (3, 1, 16)):
    width, name = 4 * (stage - 1), f'conv{stage}_block{block}'
    if block == 1:
      add(f'{name}_0', ins, 4 * width, 1)
    add(f'{name}_1', ins, width, 1)
    add(f'{name}_2', width, width, 3)
    add(f'{name}_3', width, 4 * width, 1)
  weights['predictions'] = [zeros((32, 5)), zeros(5)]
  twin = twins.ResNet((2, 1), 4, 4, 5, shortcut_first)
  names = match(weights, twin, IMAGE, framework='keras')
  places = [0, 1, 2, 3] if shortcut_first else [3, 0, 1, 2]
  for i, place in enumerate(places):
    assert names[f'conv2_block1_{i}_conv'] == f'Block_0/Conv_{place}'
    assert names[f'conv2_block1_{i}_bn'] == f'Block_0/BatchNorm_{place}'
  assert names['conv2_block2_3_bn'] == 'Block_1/BatchNorm_2'


def test_table_of_pairs():
  names = match(in_file(linear('fc', 4, 4)), nn.Dense(4), ROW)
  assert str(names) == 'there  here  by\nfc           shape'
  assert repr(names).startswith('Matches([Pair(')
  assert convert.Matches(names.pairs) == names


# Names that are given.


def test_patterns_and_arrays_of_their_own():
  template = {
    'params': {
      'Block_0': {'Dense_0': {'kernel': zeros((4, 2))}},
      'Block_1': {'Dense_0': {'kernel': zeros((4, 2))}},
      'Block_12': {'fc': {'kernel': zeros((4, 2))}},
      'top': {'cls': zeros((1, 3))},
      'gain': zeros(3),
    }
  }
  state = arrays(
    {
      'layers.0.mlp.weight': (2, 4),
      'layers.1.mlp.weight': (2, 4),
      'layers.12.fc.weight': (2, 4),
      'cls_token': (1, 3),
      'norm.weight': (3,),
    }
  )
  names = {
    'layers.*': 'Block_*',
    'layers.*.mlp.': 'Block_*/Dense_0/',
    'cls_token': 'top/cls',
    'norm.weight': 'gain',
  }
  filled = convert.from_torch(state, template, names=names)['params']
  for i, last in (('0', 'mlp'), ('1', 'mlp'), ('12', 'fc')):
    here = filled[f'Block_{i}']['fc' if last == 'fc' else 'Dense_0']
    np.testing.assert_array_equal(
      here['kernel'], state[f'layers.{i}.{last}.weight'].T
    )
  np.testing.assert_array_equal(filled['top']['cls'], state['cls_token'])
  np.testing.assert_array_equal(filled['gain'], state['norm.weight'])
  for like in (None, state):
    back = convert.to_torch({'params': filled}, names=names, like=like)
    for name, array in state.items():
      np.testing.assert_array_equal(back[name], array)
  with pytest.raises(ValueError, match=r'as many \*'):
    convert.from_torch(state, template, names={'layers.*': 'Block'})


@pytest.mark.parametrize('like', [False, True])
def test_dense_layers_are_convolutions_of_one_place(like):
  template = {'params': {'a': {'kernel': zeros((4, 2))}}}
  template['params']['b'] = {'kernel': zeros((1, 1, 3, 5))}
  state = arrays({'a.weight': (2, 4, 1, 1), 'b.weight': (5, 3)})
  filled = convert.from_torch(state, template)
  want = state['a.weight'][..., 0, 0].T
  np.testing.assert_array_equal(filled['params']['a']['kernel'], want)
  back = convert.to_torch(filled, like=state if like else None)
  shapes = [(2, 4, 1, 1), (5, 3)] if like else [(2, 4), (5, 3, 1, 1)]
  assert [back[f'{n}.weight'].shape for n in 'ab'] == shapes
  for name, array in back.items():
    np.testing.assert_array_equal(array.ravel(), state[name].ravel())


# The command line.

ZOO = """
from flax import linen as nn

class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    for _ in range(2):
      x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x)))
    return nn.Dense(4)(x)

def net():
  return Net()
"""


def test_command_line(importable, capsys):
  folder = importable('zoo_of_names', ZOO)
  shapes = {}
  for i in range(2):
    shapes |= linear(f'body.{i}.fc', 4, 4) | batch_norm(f'body.{i}.bn', 4)
  state = arrays(shapes | linear('head', 4, 4))
  files.save_arrays(folder / 'net.safetensors', state)
  command = ['convert', 'net.safetensors', 'flax.safetensors']
  command += ['--model', 'zoo_of_names:net', '--input', '1x4', '--names']
  assert cli.main([*command, 'use']) == 2
  assert "'head'" in capsys.readouterr().err
  (folder / 'some.json').write_text(json.dumps({'head': 'Dense_2'}))
  assert cli.main([*command, 'use:some.json']) == 0
  assert 'body.1.bn  BatchNorm_1  numbers' in capsys.readouterr().out
  got = files.load_arrays(folder / 'flax.safetensors')
  np.testing.assert_array_equal(
    got['Dense_1/kernel'], state['body.1.fc.weight'].T
  )
