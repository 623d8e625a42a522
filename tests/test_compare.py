"""A model of PyTorch beside its twin: each fault is planted, and named."""

from typing import Any, NamedTuple

from cases import draw
from flax import linen as nn, nnx
import jax
import jax.numpy as jnp
import pytest
from tiers import second_tier

import normkit as nk
import normkit.linen
import normkit.nnx
from normkit.tools import convert

torch = pytest.importorskip(
  'torch', reason="models to compare with: pip install 'normkit[peers]'"
)
t = torch.nn

OPTIONS = convert.batch_norm_options('torch')
IMAGE, ROWS = draw((2, 6, 6, 3)), draw((4, 8)) * 2


def names(name):
  """Of layers in a sequence."""
  return f'layers_{name}'


def settled(module, shape=(8, 3, 6, 6)):
  """The module, with weights at random and statistics of a batch."""
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in module.parameters():
      if parameter.ndim == 1:
        parameter.uniform_(0.5, 1.5)
    module.train()(torch.randn(shape) * 2 + 1)
  return module


def norm(**options):
  return normkit.linen.BatchNorm(use_running_average=True, **OPTIONS | options)


def compare(there, layers, x=IMAGE, edit=None, tolerance=None, transposed=()):
  """Compares a sequence with one of linen, of converted weights."""
  here = nn.Sequential(layers)
  empty = jax.eval_shape(here.init, jax.random.key(0), x)
  options = {'names': names, 'transposed': transposed}
  variables = convert.from_torch(there.state_dict(), empty, **options)
  if edit:
    variables = jax.tree_util.tree_map_with_path(edit, variables)
  return convert.compare(
    there, here, variables, x, tolerance=tolerance, **options
  )


def codes(found):
  return [(cause.name, cause.code) for cause in found.causes]


# A right twin: no complaint.


def test_right_linen():
  there = settled(
    t.Sequential(
      t.Conv2d(3, 4, 3, 2, 1),
      t.BatchNorm2d(4),
      t.ReLU(inplace=True),
      t.MaxPool2d(3, 2, 1),
      t.Flatten(),
      t.Linear(16, 5),
    )
  )
  layers = [
    nn.Conv(4, (3, 3), 2, padding=1),
    norm(),
    nn.relu,
    lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))),
    lambda x: x.reshape(len(x), -1),
    nn.Dense(5),
  ]
  here = nn.Sequential(layers)
  empty = jax.eval_shape(here.init, jax.random.key(0), IMAGE)
  options = {'names': names, 'flatten': {'layers_5': (4, 2, 2)}}
  variables = convert.from_torch(there.state_dict(), empty, **options)
  there[1].eval()
  modes = [m.training for m in there.modules()]
  call = jax.jit(here.apply)
  for _ in range(2):  # a program that is compiled already tells again
    found = convert.compare(there, call, variables, IMAGE, **options)
    assert found.agrees and found.first is None
    assert found.causes == () and found.unseen == ()
    assert [row.name for row in found.layers] == [
      *('layers_0', 'layers_1', 'layers_5'),
      '',
    ]
    assert [row.there for row in found.layers] == ['0', '1', '5', '']
    assert 0 < found.error == found.layers[-1].error < 1e-6
    assert all(row.given < 1e-6 for row in found.layers)
  assert str(found).startswith('3 layers agree, the worst is layers_')
  assert str(found).endswith('tolerance 1e-05')
  assert [m.training for m in there.modules()] == modes
  assert not any(m._forward_hooks for m in there.modules())


class Small(nnx.Module):
  def __init__(self, **options):
    rngs = nnx.Rngs(0)
    self.conv = nnx.Conv(3, 4, (3, 3), padding=1, rngs=rngs)
    self.bn = normkit.nnx.BatchNorm(4, **OPTIONS | options, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)
    self.heads = nnx.LinearGeneral(4, (2, 3), rngs=rngs)

  def __call__(self, x):
    return self.heads(self.drop(nnx.relu(self.bn(self.conv(x)))))


def small():
  """The same in PyTorch; dropout does nothing in evaluation."""
  module = t.Sequential()
  module.add_module('conv', t.Conv2d(3, 4, 3, padding=1))
  module.add_module('bn', t.BatchNorm2d(4))
  module.add_module('relu', t.ReLU())
  module.add_module('last', Last())
  module.add_module('heads', t.Linear(4, 6))
  return settled(module)


class Last(t.Module):
  def forward(self, x):
    return x.movedim(1, -1)


def test_right_nnx():
  there = small()
  model = convert.from_torch(there.state_dict(), Small())
  found = convert.compare(there, model, None, IMAGE)
  assert found.agrees and found.causes == () and len(found.layers) == 4
  assert type(model.bn) is normkit.nnx.BatchNorm
  assert not model.bn.use_running_average  # a copy ran
  called = convert.compare(there, lambda m, x: m(x), model, IMAGE)
  assert called.layers == found.layers


def test_wrong_nnx():
  there = small()
  model = convert.from_torch(
    there.state_dict(), Small(epsilon=1e-3, momentum=0.99)
  )
  found = convert.compare(there, model, None, IMAGE)
  assert codes(found) == [('bn', 'epsilon'), ('bn', 'momentum')]
  assert found.first.name == 'bn' and found.first.given < 1e-6
  assert not found.agrees


# Each fault alone.


class Fault(NamedTuple):
  there: Any
  here: Any
  name: str  # the layer that is named
  code: str
  said: str
  x: Any = IMAGE
  agrees: bool = False
  transposed: Any = ()


def linear(*between):
  return t.Sequential(t.Linear(8, 8), *between, t.Linear(8, 5))


def conv(pool):
  return t.Sequential(t.Conv2d(3, 4, 1), pool, t.Conv2d(4, 4, 1))


def pooled(pool, padding):
  def call(x):
    return pool(x, (3, 3), (2, 2), padding)

  return [nn.Conv(4, (1, 1)), call, nn.Conv(4, (1, 1))]


def one(module):
  return t.Sequential(module)


FAULTS = {
  'SAME at even sizes': Fault(
    one(t.Conv2d(3, 4, 3, 2, 1)),
    [nn.Conv(4, (3, 3), 2)],
    'layers_0',
    'padding',
    r'\(\(0, 1\), \(0, 1\)\) of zeros to a size of \(6, 6\).* padding=1$',
  ),
  'VALID': Fault(
    one(t.Conv2d(3, 4, 3, padding=1)),
    [nn.Conv(4, (3, 3), padding='VALID')],
    'layers_0',
    'padding',
    'padding=1$',
  ),
  'transposed': Fault(
    one(t.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1)),
    [nn.ConvTranspose(4, (3, 3), (2, 2), padding='VALID')],
    'layers_0',
    'padding',
    r'padding=\(\(1, 2\), \(1, 2\)\)$',
    transposed=('layers_0',),
  ),
  'another mode': Fault(
    one(t.Conv2d(3, 4, 3, padding=1, padding_mode='circular')),
    [nn.Conv(4, (3, 3), padding=1)],
    'layers_0',
    'padding',
    'circular',
  ),
  'strides': Fault(
    one(t.Conv2d(3, 4, 1, 2)),
    [nn.Conv(4, (1, 1))],
    'layers_0',
    'strides',
    r'\(1, 1\) here, and \(2, 2\) there',
  ),
  'dilation': Fault(
    one(t.Conv2d(3, 4, 3, padding=2, dilation=2)),
    [nn.Conv(4, (3, 3), padding=2)],
    'layers_0',
    'dilation',
    r'\(2, 2\) there',
  ),
  'pool': Fault(
    conv(t.MaxPool2d(3, 2, 1)),
    pooled(nn.max_pool, 'SAME'),
    'layers_2',
    'padding',
    r"pads 'SAME'.*padding=\(\(1, 1\), \(1, 1\)\)",
  ),
  'pool of means': Fault(
    conv(t.AvgPool2d(3, 2, 1)),
    pooled(nn.avg_pool, 'VALID'),
    'layers_2',
    'padding',
    "pads 'VALID'",
  ),
  'epsilon': Fault(
    one(t.LayerNorm(8, eps=1e-5)),
    [nn.LayerNorm()],
    'layers_0',
    'epsilon',
    '1e-06 here, and 1e-05 there',
    draw((4, 8)) / 30,
  ),
  'epsilon that is not seen': Fault(
    one(t.LayerNorm(8, eps=1e-5)),
    [nn.LayerNorm()],
    'layers_0',
    'epsilon',
    '1e-06 here',
    draw((4, 8)) * 30,
    agrees=True,
  ),
  'epsilon of a transform': Fault(
    one(t.RMSNorm(8)),
    [
      lambda x: normkit.linen.Norm(nk.RMSNorm(epsilon=1e-6), name='layers_0')(
        x, train=False
      )
    ],
    'layers_0',
    'epsilon',
    '1e-06 here, and 1.19209e-07 there',
    draw((4, 8)) / 300,
  ),
  'momentum': Fault(
    one(t.BatchNorm2d(3)),
    [norm(momentum=0.99)],
    'layers_0',
    'momentum',
    '0.99 here, and that there is 0.9 here',
    agrees=True,
  ),
  'exact gelu': Fault(
    linear(t.GELU()),
    [nn.Dense(8), nn.gelu, nn.Dense(5)],
    'layers_2',
    'activation',
    r"'layers_0' comes gelu\(approximate=False\) there, and gelu\(appr.*True",
    ROWS,
  ),
  'gelu by tanh': Fault(
    linear(t.GELU('tanh')),
    [nn.Dense(8), lambda x: nn.gelu(x, approximate=False), nn.Dense(5)],
    'layers_2',
    'activation',
    r'gelu\(approximate=True\) there',
    ROWS,
  ),
  'no activation': Fault(
    linear(t.SiLU()),
    [nn.Dense(8), lambda x: x, nn.Dense(5)],
    'layers_2',
    'activation',
    'silu there, and nothing here',
    ROWS,
  ),
  'rounding': Fault(
    one(t.Linear(8, 5)),
    [nn.Dense(5, dtype=jnp.bfloat16)],
    'layers_0',
    'rounding',
    'bfloat16 here, and in float32 there',
    ROWS,
  ),
  'something between': Fault(
    linear(t.LogSigmoid()),
    [nn.Dense(8), jnp.sin, nn.Dense(5)],
    'layers_2',
    'between',
    'after layers_0.*than LogSigmoid there',
    ROWS,
  ),
  'something after': Fault(
    t.Sequential(t.Linear(8, 5), t.ReLU()),
    [nn.Dense(5)],
    '',
    'activation',
    "after 'layers_0' comes relu there, and nothing here",
    ROWS,
  ),
  'a layer of its own': Fault(
    one(type('Own', (t.Linear,), {'forward': lambda self, x: x[:, :5]})(8, 5)),
    [nn.Dense(5)],
    'layers_0',
    'layer',
    'computes something else',
    ROWS,
  ),
  'something else': Fault(
    one(t.Linear(8, 5)),
    [lambda x: 2 * nn.Dense(5, name='layers_0')(x)],
    '',
    'between',
    'after layers_0',
    ROWS,
  ),
}


FIRST = (
  *('SAME at even sizes', 'transposed', 'pool', 'epsilon', 'momentum'),
  *('exact gelu', 'rounding', 'something between'),
)


@pytest.mark.parametrize(
  'fault', [n if n in FIRST else second_tier(n) for n in FAULTS]
)
def test_fault_is_named(fault):
  fault = FAULTS[fault]
  x = fault.x
  shape = (8, 3, 6, 6) if x.ndim > 2 else (8, 8)
  there = settled(fault.there, shape)
  found = compare(there, fault.here, x, transposed=fault.transposed)
  assert codes(found) == [(fault.name, fault.code)]
  with pytest.raises(AssertionError, match=fault.said):
    raise AssertionError(found.causes[0].message)
  assert found.agrees == fault.agrees
  if not fault.agrees:
    assert found.first.name == fault.name
    assert found.first.error > 1e-5


TRAINING = {
  'given': (normkit.linen.BatchNorm(False, **OPTIONS), {}),
  'at the call': (nn.BatchNorm(momentum=0.9), {'use_running_average': False}),
  'of a transform': (
    normkit.linen.Norm(nk.BatchNorm(momentum=0.9)),
    {'train': True},
  ),
}


@pytest.mark.parametrize(('here', 'call'), TRAINING.values(), ids=TRAINING)
def test_statistics_of_the_batch(here, call):
  there = settled(t.BatchNorm2d(3))
  empty = jax.eval_shape(lambda: here.init(jax.random.key(0), IMAGE, **call))

  def train(variables, x):
    return here.apply(variables, x, **call, mutable=['batch_stats'])

  variables = convert.from_torch(there.state_dict(), empty)
  found = convert.compare(there, train, variables, IMAGE)
  assert codes(found) == [('', 'training')]
  assert 'use_running_average=True' in found.causes[0].message


def test_statistics_that_were_not_converted():
  there = settled(one(t.BatchNorm2d(3)))

  def initial(path, leaf):
    start = {'mean': 0.0, 'var': 1.0}.get(path[-1].key)
    return leaf if start is None else jnp.full_like(leaf, start)

  found = compare(there, [norm()], edit=initial)
  assert codes(found) == [('layers_0', 'statistics')]
  assert 'mean, var are as they began' in found.causes[0].message


def test_statistics_that_are_not_there():
  there = one(t.BatchNorm2d(3, track_running_stats=False))
  here = nn.Sequential([norm()])
  variables = here.init(jax.random.key(0), IMAGE)
  found = convert.compare(there, here, variables, IMAGE, names=names)
  assert codes(found) == [('layers_0', 'statistics')]
  assert 'track_running_stats=False' in found.causes[0].message
  assert found.first.name == 'layers_0'


def test_weights_that_are_others():
  there = settled(linear(), (8, 8))

  def trained(path, leaf):
    return leaf * (1.01 if path[-1].key == 'kernel' else 1)

  found = compare(there, [nn.Dense(8), nn.Dense(5)], ROWS, edit=trained)
  assert codes(found) == [('layers_0', 'weights'), ('layers_1', 'weights')]
  assert found.causes[0].message.startswith('kernel are not as there')
  assert '(and 1 more)' in str(found)


def test_causes_of_the_first_come_first():
  there = settled(
    t.Sequential(t.BatchNorm2d(3), t.Conv2d(3, 4, 3, 2, 1)), (8, 3, 6, 6)
  )
  layers = [norm(momentum=0.5), nn.Conv(4, (3, 3), 2)]
  found = compare(there, layers)
  assert codes(found) == [('layers_1', 'padding'), ('layers_0', 'momentum')]
  text = str(found).splitlines()
  assert text[0].startswith('1 layer agrees, the worst is layers_0: ')
  assert text[1].startswith('the first that parts is layers_1 (1 there): ')
  assert text[3].startswith('padding: layers_1 (1 there): ')


# How layers lie.


class Block(t.Module):
  """Attention, of fused projections or by PyTorch's, twice a shared layer."""

  def __init__(self, fused):
    super().__init__()
    self.fused, self.heads = fused, 2
    if fused:
      self.qkv, self.proj = t.Linear(8, 24), t.Linear(8, 8)
    else:
      self.attn = t.MultiheadAttention(8, 2, batch_first=True)
    self.fc = t.Linear(8, 8)

  def forward(self, x, *, twice=True):
    if self.fused:
      q, k, v = (
        a.unflatten(-1, (2, 4)).transpose(1, 2)
        for a in self.qkv(x).chunk(3, -1)
      )
      y = t.functional.scaled_dot_product_attention(q, k, v)
      x = self.proj(y.transpose(1, 2).flatten(2))
    else:
      x = self.attn(x, x, x)[0]
    return {'y': self.fc(self.fc(x)) if twice else self.fc(x)}


class Twin(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.MultiHeadDotProductAttention(num_heads=2, name='attn')(x)
    fc = nn.Dense(8, name='fc')
    return fc(fc(x))


@pytest.mark.parametrize('fused', [True, False])
def test_attention_and_a_layer_that_runs_twice(fused):
  there, here, x = Block(fused), Twin(), draw((2, 5, 8))
  empty = jax.eval_shape(here.init, jax.random.key(0), x)
  given = {'qkv': 'attn/qkv', 'proj': 'attn/proj'} if fused else None
  variables = convert.from_torch(there.state_dict(), empty, names=given)
  found = convert.compare(there, here, variables, x, names=given)
  assert found.agrees and found.causes == ()
  rows = [(row.name, row.call) for row in found.layers]
  attention = [('attn/query + attn/key + attn/value', 0), ('attn/out', 0)]
  first = attention if fused else [('attn', 0)]
  assert rows == [*first, ('fc', 0), ('fc', 1), ('', 0)]
  assert found.unseen == (() if fused else ('attn/out',))


def test_inputs_by_name():
  there, here = Block(True), Twin()
  x = draw((2, 5, 8))
  empty = jax.eval_shape(here.init, jax.random.key(0), x)
  given = {'qkv': 'attn/qkv', 'proj': 'attn/proj'}
  variables = convert.from_torch(there.state_dict(), empty, names=given)
  inputs = {'x': x, 'twice': torch.tensor(True)}
  found = convert.compare(there, here, variables, x, there=inputs, names=given)
  assert found.agrees


class Layer(nn.Module):
  """One of a stack."""

  @nn.compact
  def __call__(self, x, _):
    return nn.tanh(nn.remat(nn.Dense)(8, name='fc')(x)), None


class Stack(nn.Module):
  @nn.compact
  def __call__(self, x):
    kind = nn.scan(
      Layer,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=3,
    )
    return kind(name='blocks')(x, None)[0]


def test_scanned_layers():
  there = t.Sequential()
  blocks = t.Sequential()
  for i in range(3):
    block = t.Sequential()
    block.add_module('fc', t.Linear(8, 8))
    block.add_module('tanh', t.Tanh())
    blocks.add_module(str(i), block)
  there.add_module('blocks', blocks)
  here = Stack()
  empty = jax.eval_shape(here.init, jax.random.key(0), ROWS)
  options = {'scanned': ('blocks',)}
  variables = convert.from_torch(there.state_dict(), empty, **options)
  found = convert.compare(there, here, variables, ROWS, **options)
  assert found.agrees and found.causes == ()
  layers = [row.name for row in found.layers]
  assert layers == [f'blocks/{i}/fc' for i in range(3)] + ['']


class Own(t.Module):
  """With an array of its own, and two outputs."""

  def __init__(self):
    super().__init__()
    self.token = t.Parameter(torch.arange(8.0))
    self.fc, self.pool = t.Linear(8, 8), t.Linear(8, 3)

  def forward(self, x):
    x = self.fc(x + self.token)
    return x, self.pool(x)


class OwnTwin(nn.Module):
  @nn.compact
  def __call__(self, x):
    token = self.param('token', nn.initializers.zeros, (8,))
    x = nn.Dense(8, name='fc')(x + token[None])
    return x, nn.Dense(3, name='pool')(x)


def test_an_array_of_its_own_and_two_outputs():
  there, here = Own(), OwnTwin()
  empty = jax.eval_shape(here.init, jax.random.key(0), ROWS)
  variables = convert.from_torch(there.state_dict(), empty)
  found = convert.compare(there, here, variables, ROWS)
  assert found.agrees and found.causes == () and found.unseen == ()
  assert [row.name for row in found.layers] == ['fc', 'pool', '']


class NormAct(t.BatchNorm2d):
  """As those of timm: an activation inside of the norm."""

  def __init__(self, features):
    super().__init__(features)
    self.act = t.ReLU()

  def forward(self, x):
    return self.act(super().forward(x))


def convolved(x):
  return nn.Conv(4, (1, 1), name='layers_1')(nn.relu(x))


def test_an_activation_inside_of_a_norm():
  there = settled(t.Sequential(NormAct(3), t.Conv2d(3, 4, 1)))
  found = compare(there, [norm(), convolved])
  assert found.agrees and found.causes == ()


def test_half_precision_there():
  there = one(t.Linear(8, 5, dtype=torch.bfloat16))
  x = jnp.asarray(ROWS, jnp.bfloat16)
  types = {'dtype': jnp.bfloat16, 'param_dtype': jnp.bfloat16}
  found = compare(there, [nn.Dense(5, **types)], x)
  assert found.agrees and found.tolerance == 3e-2
  assert (
    compare(there, [nn.Dense(5, **types)], x, tolerance=0.5).tolerance == 0.5
  )


# What is refused.


def test_what_is_no_model():
  linear = t.Linear(8, 5)
  variables = nn.Dense(5).init(jax.random.key(0), ROWS)
  with pytest.raises(TypeError, match=r'torch\.nn\.Module, got dict.*a file'):
    convert.compare(dict(linear.state_dict()), nn.Dense(5), variables, ROWS)
  with pytest.raises(TypeError, match=r'model must be a linen or an nnx .*int'):
    convert.compare(linear, 3, variables, ROWS)
  model = nnx.Linear(8, 5, rngs=nnx.Rngs(0))
  with pytest.raises(TypeError, match=r'variables must be None.*got dict'):
    convert.compare(linear, model, variables, ROWS)
  with pytest.raises(ValueError, match=r'no layer of both models ran.*Mend'):
    convert.compare(linear, nn.Dense(5), variables, ROWS, names={'': 'fc'})
