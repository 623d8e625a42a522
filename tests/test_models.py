"""The networks of the examples against PyTorch's layers, and their data."""

import functools
import re

import chex
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import normkit as nk
from normkit.tools import convert

SEED = 3
N = 6  # images of a batch


@pytest.fixture(scope='module')
def models(example):
  return example('models')


@pytest.fixture(scope='module')
def data(example):
  return example('data')


@pytest.fixture(scope='module')
def photographs(data):
  return data.photographs()


@pytest.fixture(scope='module')
def torch():
  return pytest.importorskip(
    'torch', reason='PyTorch is not installed: its layers are not compared with'
  )


# Shapes and numbers of parameters, by hand: weights, biases, scales.

INPUTS = {
  'MnistNet': (28, 28, 1),
  'KerasCNN': (32, 32, 3),
  'Conv1D': (28, 3),
  'Conv2D': (28, 28, 3),
  'SmallInception': (32, 32, 3),
  'SmallResNet': (32, 32, 3),
}
NORMS = {  # channels of each norm, which has a scale and a bias of each
  'MnistNet': 20 + 50,
  'KerasCNN': 32 + 64,
  'Conv1D': 16 + 32,
  'Conv2D': 16 + 32,
  'SmallInception': 16 + 7 * (8 + 16 + 16),
  'SmallResNet': 3 * 16 + 2 * 32 + 2 * 64,
}


def inception_weights(channels, width):
  """The weights of a block: seven convolutions."""
  return width * (4 * channels + 3 * 9 * width)


WITHOUT = {  # all others, of the network without norm
  'MnistNet': (25 + 1) * 10 + (250 + 1) * 20 + (320 + 1) * 50 + (50 + 1) * 10,
  'KerasCNN': (27 + 1) * 32 + (288 + 1) * 64 + (2304 + 1) * 64 + 65 * 10,
  'Conv1D': (9 + 1) * 16 + (48 + 1) * 32 + (32 * 28 + 1) * 10,
  'Conv2D': (27 + 1) * 16 + (144 + 1) * 32 + (32 * 28 * 28 + 1) * 10,
  'SmallInception': 27 * 16
  + inception_weights(16, 8)
  + inception_weights(32, 16)
  + inception_weights(64, 16)
  + NORMS['SmallInception']
  + 65 * 10,
  'SmallResNet': 9 * (3 * 16 + 2 * 16 * 16 + 16 * 32 + 32 * 32 + 32 * 64)
  + 9 * 64 * 64
  + NORMS['SmallResNet']
  + 65 * 10,
}
NO_BIAS = ('SmallInception', 'SmallResNet')  # where there is a norm


def shapes(model, name):
  x = jax.ShapeDtypeStruct((N, *INPUTS[name]), jnp.float32)
  return jax.eval_shape(
    lambda x: model.init_with_output(jax.random.key(0), x, train=False), x
  )


def size(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize('name', INPUTS)
def test_parameters_are_those_counted_by_hand(models, name):
  network = getattr(models, name)
  y, variables = shapes(network(norm=None), name)
  assert y.shape == (N, 10)
  assert set(variables) == {'params'}
  assert size(variables) == WITHOUT[name]

  y, variables = shapes(network(), name)
  biases = NORMS[name] if name in NO_BIAS else 0
  assert y.shape == (N, 10)
  assert size(variables['params']) == WITHOUT[name] + 2 * NORMS[name] - biases
  assert size(variables['batch_stats']) == 3 * NORMS[name]

  _, variables = shapes(network(norm=nk.LayerNorm()), name)
  assert set(variables) == {'params'}


def test_more_blocks_make_the_residual_network_deeper(models):
  _, variables = shapes(models.SmallResNet(blocks=3), 'SmallResNet')
  kernels = [a for a in jax.tree.leaves(variables['params']) if a.ndim > 1]
  assert len(kernels) == 6 * 3 + 2


# The same layers in PyTorch, as the articles have them: names and their inputs.


def layers(torch, name):
  """PyTorch's modules by name, and a function that applies them."""
  nn, f = torch.nn, torch.nn.functional
  if name == 'MnistNet':
    modules = nn.ModuleDict(
      {
        'conv1': nn.Conv2d(1, 10, 5),
        'conv2': nn.Conv2d(10, 20, 5),
        'conv2_bn': nn.BatchNorm2d(20),
        'dense1': nn.Linear(320, 50),
        'dense1_bn': nn.BatchNorm1d(50),
        'dense2': nn.Linear(50, 10),
      }
    )

    def apply(x, m):
      x = f.relu(f.max_pool2d(m['conv1'](x), 2))
      x = f.relu(f.max_pool2d(m['conv2_bn'](m['conv2'](x)), 2))
      x = f.relu(m['dense1_bn'](m['dense1'](x.flatten(1))))
      return f.log_softmax(f.relu(m['dense2'](x)), 1)

  elif name == 'KerasCNN':
    # Keras's moving average keeps 0.99, and its epsilon is 0.001.
    modules = nn.ModuleDict(
      {
        'conv1': nn.Conv2d(3, 32, 3),
        'bn1': nn.BatchNorm2d(32, eps=1e-3, momentum=0.01),
        'conv2': nn.Conv2d(32, 64, 3),
        'bn2': nn.BatchNorm2d(64, eps=1e-3, momentum=0.01),
        'dense1': nn.Linear(2304, 64),
        'dense2': nn.Linear(64, 10),
      }
    )

    def apply(x, m):
      x = f.max_pool2d(m['bn1'](f.relu(m['conv1'](x))), 2)
      x = f.max_pool2d(m['bn2'](f.relu(m['conv2'](x))), 2)
      x = x.permute(0, 2, 3, 1).flatten(1)  # channels last, as in Keras
      return f.softmax(m['dense2'](f.relu(m['dense1'](x))), 1)

  else:
    conv = nn.Conv1d if name == 'Conv1D' else nn.Conv2d
    norm = nn.BatchNorm1d if name == 'Conv1D' else nn.BatchNorm2d
    modules = nn.ModuleDict(
      {
        'conv1': conv(3, 16, 3, padding=1),
        'bn1': norm(16),
        'conv2': conv(16, 32, 3, padding=1),
        'bn2': norm(32),
        'dense': nn.Linear(32 * 28 ** (1 if name == 'Conv1D' else 2), 10),
      }
    )

    def apply(x, m):
      x = f.relu(m['bn1'](m['conv1'](x)))
      return m['dense'](f.relu(m['bn2'](m['conv2'](x))).flatten(1))

  return modules.double(), apply


def randomize(torch, modules):
  """Scales, biases and running statistics that are neither zero nor one."""
  generator = torch.Generator().manual_seed(SEED)
  for name, value in modules.state_dict().items():
    if 'bn' in name and value.ndim:
      value.uniform_(0.5, 1.5, generator=generator)


def variables_of(modules):
  """The variables of the Flax network with the weights of the modules."""
  params, stats = {}, {}
  for name, module in modules.items():
    weight, bias = (
      np.float32(p.detach()) for p in (module.weight, module.bias)
    )
    if weight.ndim == 1:
      params[name] = {'scale': weight, 'bias': bias}
      stats[name] = statistics(module, np.float32)
      stats[name]['count'] = np.zeros(len(bias), np.int32)
    else:
      kernel = np.moveaxis(weight, (0, 1), (-1, -2))
      params[name] = {'kernel': kernel, 'bias': bias}
  return {'params': params, 'batch_stats': stats}


def statistics(module, dtype=np.float64):
  mean, var = module.running_mean, module.running_var
  return {'mean': dtype(mean.clone()), 'var': dtype(var.clone())}


def outputs(modules, apply, x, train):
  """The output of each of PyTorch's layers, channels last, and the last."""
  found = {}
  hooks = [
    module.register_forward_hook(
      lambda _, __, y, name=name: found.update({name: y})
    )
    for name, module in modules.items()
  ]
  y = apply(x, modules.train(train))
  for hook in hooks:
    hook.remove()
  return {
    name: np.moveaxis(a.detach().numpy(), 1, -1)
    for name, a in (found | {'': y}).items()
  }


def batch(name):
  """A batch for a network, channels last."""
  rng = np.random.default_rng(SEED)
  return rng.uniform(size=(N, *INPUTS[name])).astype(np.float32)


@pytest.fixture(params=['MnistNet', 'KerasCNN', 'Conv1D', 'Conv2D'])
def pair(request, models, torch):
  """A name, the Flax network, PyTorch's modules and how they are applied."""
  name = request.param
  torch.manual_seed(SEED)
  modules, apply = layers(torch, name)
  randomize(torch, modules)
  options = {'last_relu': True} if name == 'MnistNet' else {}
  return name, getattr(models, name)(**options), modules, apply


@pytest.mark.parametrize('train', [False, True])
def test_every_layer_is_that_of_pytorch(pair, torch, train):
  name, model, modules, apply = pair
  x, variables = batch(name), variables_of(modules)
  wanted = outputs(
    modules, apply, torch.tensor(np.moveaxis(x, -1, 1)).double(), train
  )
  y, updated = jax.jit(
    lambda v, x: model.apply(
      v, x, train=train, capture_intermediates=True, mutable=['batch_stats']
    )
  )(variables, x)
  found = {
    layer: value['__call__'][0]
    for layer, value in updated['intermediates'].items()
    if layer in modules
  }
  found[''] = jax.nn.softmax(y) if name == 'KerasCNN' else y
  chex.assert_trees_all_close(found, wanted, atol=1e-5, rtol=1e-5)
  if train:
    check_statistics(name, modules, variables, updated['batch_stats'])


def check_statistics(name, modules, variables, updated):
  """The new running statistics; Keras's variance is not corrected for n."""
  for layer, old in variables['batch_stats'].items():
    wanted = statistics(modules[layer])
    if name == 'KerasCNN':
      n = N * {'bn1': 30 * 30, 'bn2': 13 * 13}[layer]
      kept = 0.99 * old['var']
      wanted['var'] = kept + (wanted['var'] - kept) * (n - 1) / n
    found = {key: updated[layer][key] for key in wanted}
    chex.assert_trees_all_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_the_last_relu_leaves_no_logit_below_zero(models):
  x, bias = batch('MnistNet'), np.arange(10) - 5.0
  _, shaped = shapes(models.MnistNet(norm=None), 'MnistNet')
  variables = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shaped)
  variables['params']['dense2']['bias'] = np.float32(bias)  # the logits
  for last_relu, logits in ((False, bias), (True, np.maximum(bias, 0))):
    model = models.MnistNet(norm=None, last_relu=last_relu)
    y = jax.jit(functools.partial(model.apply, train=False))(variables, x)
    wanted = logits - np.log(np.exp(logits).sum())
    chex.assert_trees_all_close(y, np.tile(wanted, (N, 1)), rtol=1e-5)


# The networks that follow papers, of PyTorch's layers under the same names.


def conv_norm(torch, channels, features, size=3, stride=1):
  nn = torch.nn
  return nn.ModuleDict(
    {
      'conv': nn.Conv2d(
        channels, features, size, stride, size // 2, bias=False
      ),
      'norm': nn.BatchNorm2d(features),
    }
  )


def inception(torch):
  """`SmallInception`: its modules, and a function that applies them."""
  nn, f = torch.nn, torch.nn.functional
  branches = {'one': (1,), 'three': (1, 3), 'double': (1, 3, 3), 'pool': (1,)}
  modules = nn.ModuleDict({'stem': conv_norm(torch, 3, 16, 3, 2)})
  channels = 16
  for number, width in ((1, 8), (2, 16), (3, 16)):
    block = nn.ModuleDict()
    for name, sizes in branches.items():
      inputs = [channels] + [width] * (len(sizes) - 1)
      for i, size in enumerate(sizes):
        block[f'{name}_{i}'] = conv_norm(torch, inputs[i], width, size)
    modules[f'block{number}'] = block
    channels = 4 * width
  modules['dense'] = nn.Linear(channels, 10)

  def apply(x, m):
    x = f.relu(m['stem']['norm'](m['stem']['conv'](x)))
    for number in (1, 2, 3):
      outputs = []
      for name, sizes in branches.items():
        y = f.avg_pool2d(x, 3, 1, 1) if name == 'pool' else x
        for i in range(len(sizes)):
          layer = m[f'block{number}'][f'{name}_{i}']
          y = f.relu(layer['norm'](layer['conv'](y)))
        outputs.append(y)
      x = torch.cat(outputs, 1)
      x = f.max_pool2d(x, 2) if number == 1 else x
    return m['dense'](x.mean((2, 3)))

  return modules.double(), apply


def residual(torch):
  """`SmallResNet` with two blocks a stage."""
  nn, f = torch.nn, torch.nn.functional
  modules = nn.ModuleDict({'stem': conv_norm(torch, 3, 16)})
  channels = 16
  for stage, width in ((1, 16), (2, 32), (3, 64)):
    for number in (1, 2):
      stride = 2 if stage > 1 and number == 1 else 1
      modules[f'stage{stage}_block{number}'] = nn.ModuleDict(
        {
          'first': conv_norm(torch, channels, width, 3, stride),
          'second': conv_norm(torch, width, width),
        }
      )
      channels = width
  modules['dense'] = nn.Linear(channels, 10)

  def apply(x, m):
    x = f.relu(m['stem']['norm'](m['stem']['conv'](x)))
    for name, block in m.items():
      if 'block' in name:
        first, second = block['first'], block['second']
        y = f.relu(first['norm'](first['conv'](x)))
        y = second['norm'](second['conv'](y))
        stride = first['conv'].stride[0]
        shortcut = x[:, :, ::stride, ::stride]
        new = y.shape[1] - shortcut.shape[1]
        x = f.relu(y + f.pad(shortcut, (0, 0, 0, 0, 0, new)))
    return m['dense'](x.mean((2, 3)))

  return modules.double(), apply


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('name', ['SmallInception', 'SmallResNet'])
def test_every_layer_of_the_papers_networks(models, torch, name, train):
  torch.manual_seed(SEED)
  is_inception = name == 'SmallInception'
  modules, apply = (inception if is_inception else residual)(torch)
  for key, value in modules.state_dict().items():
    if '.norm.' in key and value.ndim:
      value.uniform_(0.5, 1.5)
  model = getattr(models, name)(**({} if is_inception else {'blocks': 2}))
  x = batch(name)
  _, empty = shapes(model, name)
  state = {
    key: (value.float() if value.ndim else value).numpy().copy()
    for key, value in modules.state_dict().items()
  }
  variables = convert.from_torch(state, empty)
  named = {
    key.replace('.', '/'): module
    for key, module in modules.named_modules()
    if not isinstance(module, torch.nn.ModuleDict)
  }
  wanted = outputs(
    _Named(modules, named),
    lambda x, m: apply(x, m.modules),
    torch.tensor(np.moveaxis(x, -1, 1)).double(),
    train,
  )
  y, updated = jax.jit(
    lambda v, x: model.apply(
      v, x, train=train, capture_intermediates=True, mutable=['batch_stats']
    )
  )(variables, x)
  found = flatten_dict(updated['intermediates'], sep='/')
  found = {key.removesuffix('/__call__'): v[0] for key, v in found.items()}
  for key in named:
    chex.assert_trees_all_close(found[key], wanted[key], rtol=1e-3, atol=1e-4)
  chex.assert_trees_all_close(y, wanted[''], rtol=1e-3, atol=1e-4)
  if train:
    for key, value in flatten_dict(updated['batch_stats'], sep='/').items():
      layer, _, kind = key.rpartition('/')
      if kind in ('mean', 'var'):
        after = getattr(named[layer], f'running_{kind}').numpy()
        chex.assert_trees_all_close(value, after, rtol=1e-3, atol=1e-5)


class _Named:
  """Modules by their whole names, for `outputs`."""

  def __init__(self, modules, named):
    self.modules, self.items = modules, named.items

  def train(self, mode):
    self.modules.train(mode)
    return self


# The data.


def enlarge(data):
  """The digits in each form that a network takes, by shape."""
  digits = data.digits()
  return {
    (28, 28, 1): data.as_images(digits, (28, 28, 1)),
    (28, 28, 3): data.as_images(digits, (28, 28, 3)),
    (28, 3): data.as_sequences(digits),
  }


@pytest.fixture(scope='module')
def enlarged(data):
  return enlarge(data)


def test_digits_keep_their_labels_and_range(data, enlarged):
  small, again = data.digits(), enlarge(data)
  for shape, large in enlarged.items():
    for part in ('train', 'test'):
      images = getattr(large, f'{part}_images')
      labels = getattr(large, f'{part}_labels')
      assert images.shape == (len(labels), *shape)
      assert images.dtype == np.float32
      assert images.min() >= 0 and images.max() <= 1
      np.testing.assert_array_equal(labels, getattr(small, f'{part}_labels'))
      np.testing.assert_array_equal(
        images, getattr(again[shape], f'{part}_images')
      )


def test_enlarged_digits_are_the_same_digits(data, enlarged):
  small = data.digits().test_images
  large = enlarged[28, 28, 1].test_images
  # The mean of 7x7 pixels is that of 2x2 pixels before, nearly.
  means = large.reshape(-1, 4, 7, 4, 7).mean((2, 4))
  chex.assert_trees_all_close(
    means, small.reshape(-1, 4, 2, 4, 2).mean((2, 4)), atol=0.15
  )
  rgb = enlarged[28, 28, 3].test_images
  for channel in range(3):
    np.testing.assert_array_equal(rgb[..., channel], large[..., 0])


def test_sequences_are_rows_of_the_digits(data, enlarged):
  rows = data.digits().test_images[:, 2:5, :, 0]
  means = enlarged[28, 3].test_images.reshape(-1, 4, 7, 3).mean(2)
  wanted = rows.reshape(-1, 3, 4, 2).mean(3).transpose(0, 2, 1)
  chex.assert_trees_all_close(means, wanted, atol=0.15)


def test_images_of_the_right_shape_stay_and_colors_are_averaged(
  data, photographs
):
  assert data.as_images(photographs, (32, 32, 3)) is photographs
  grey = data.as_images(photographs, (32, 32, 1))
  assert grey.name == 'patches of ten photographs, 32x32x1'
  wanted = np.float64(photographs.test_images).mean(-1, keepdims=True)
  chex.assert_trees_all_close(grey.test_images, wanted, atol=1e-6)


def test_photographs_are_patches_in_equal_shares(data, photographs):
  _, train_images, train_labels, test_images, test_labels = photographs
  assert train_images.shape == (3600, 32, 32, 3)
  assert test_images.shape == (900, 32, 32, 3)
  assert train_images.dtype == test_images.dtype == np.float32
  assert train_labels.dtype == test_labels.dtype == np.int32
  assert (np.bincount(train_labels) == 360).all()
  assert (np.bincount(test_labels) == 90).all()
  assert (train_images.min(), train_images.max()) == (0, 1)
  for first, second in zip(
    photographs[1:], data.photographs()[1:], strict=True
  ):
    np.testing.assert_array_equal(first, second)


def test_no_pixel_is_in_training_and_test(data, monkeypatch):
  """Photographs whose pixels are their own places, in place of the real."""
  real = data.load_photographs()

  def numbered(label, shape):
    rows, columns = np.indices(shape[:2])
    place = (label << 22) + (rows << 11) + columns
    return np.stack([place, np.full_like(place, label)], -1)

  places = {n: numbered(i, p.shape) for i, (n, p) in enumerate(real.items())}
  monkeypatch.setattr(data, 'load_photographs', lambda: places)
  monkeypatch.setattr(data, 'to_float', lambda images: images)
  _, train_images, train_labels, test_images, test_labels = data.photographs()
  train, test = np.zeros((2, 10 << 22), bool)
  train[train_images[..., 0]] = test[test_images[..., 0]] = True
  assert train.sum() == 10 * 40 * 64 * 64
  assert test.sum() == 10 * 10 * 64 * 64
  assert not (train & test).any()
  np.testing.assert_array_equal(train_images[:, 0, 0, 1], train_labels)
  np.testing.assert_array_equal(test_images[:, 0, 0, 1], test_labels)


# Training and figures.


def test_training_repeats_with_its_seed_and_learns(example, data, models):
  training = example('training')
  dataset = data.as_sequences(data.digits())
  optimizer = optax.adam(0.01)

  def fit(seed):
    return training.fit(
      models.Conv1D(), dataset, optimizer, steps=25, seed=seed, tests=4
    )

  first, again, other = fit(0), fit(0), fit(1)
  chex.assert_trees_all_equal(first, again)
  assert first.losses.shape == (25,)
  assert first.steps.tolist() == [6, 12, 18, 25]
  assert first.accuracies[-1] > 40  # guessing gives 10
  assert not np.array_equal(first.losses, other.losses)


@pytest.mark.parametrize('size', [0, 1438])
def test_training_refuses_a_batch_that_is_not_there(
  example, data, models, size
):
  training = example('training')
  options = {'steps': 1, 'seed': 0, 'batch_size': size}
  message = rf'batch_size is {size}, but digits has 1437 .* from 1 to 1437'
  with pytest.raises(ValueError, match=message):
    training.fit(models.MnistNet(), data.digits(), optax.sgd(1.0), **options)


def test_each_look_is_another(example):
  figures = example('figures')
  looks = [figures.look(i) for i in range(8)]
  for part in ('color', 'marker'):
    assert len({look[part] for look in looks}) == 8
  assert figures.look('batch') == looks[0]


def test_band_is_a_standard_deviation_each_way(example):
  figures = example('figures')
  _, axes = figures.make('title')
  figures.draw(axes[0, 0], [1, 2], [[1.0, 4.0], [3.0, 4.0]], 'batch')
  (line,) = axes[0, 0].lines
  np.testing.assert_array_equal(line.get_ydata(), [2, 4])
  band = axes[0, 0].collections[0].get_paths()[0].vertices
  assert np.isclose(band[:, 1].min(), 2 - 2**0.5)
  figures.draw(axes[0, 0], [1, 2], [[1.0, 4.0]], 'one run', 'layer')
  assert len(axes[0, 0].collections) == 1


@pytest.mark.second_tier
def test_articles_run_small(example, run_small):
  printed = run_small(example('articles'), 'articles', 'articles_last_relu')
  rows = re.findall(r'(MnistNet|Conv1D) +\S (.+?) +\S +([\d.]+) ±', printed)
  assert [row[:2] for row in rows] == [
    ('MnistNet', 'batch'),
    ('MnistNet', 'none'),
    ('MnistNet', 'batch, last ReLU'),
    ('MnistNet', 'none, last ReLU'),
    ('Conv1D', 'batch'),
    ('Conv1D', 'none'),
  ]
  assert all(0 < float(accuracy) <= 100 for *_, accuracy in rows)
  assert 'To PyTorch and back, all arrays are equal' in printed


@pytest.mark.second_tier
def test_numbers_of_articles_are_those_of_the_images_given(
  example, takes_images, digits_folder
):
  takes_images(example('articles'), digits_folder)


def test_weights_of_the_article_reach_pytorch(example, torch, models):
  """What the example says of them, and of others."""
  articles = example('articles')
  rng = np.random.default_rng(SEED)
  images = np.float32(rng.uniform(size=(N, 28, 28, 1)))
  _, variables = shapes(models.MnistNet(), 'MnistNet')
  variables = jax.tree.map(
    lambda a: np.asarray(rng.uniform(0.02, 0.05, a.shape), a.dtype), variables
  )
  told = articles.to_torch_and_back(variables, images)
  (off,) = re.findall(r'are equal; its log-prob.* differ by (\S+)\.$', told)
  assert float(off) < 1e-4
  state = articles.convert.to_torch(variables)
  state['conv1.bias'] = state['conv1.bias'] + 1
  others = articles.torch_outputs(state, images)
  y = models.MnistNet().apply(variables, images, train=False)
  assert np.abs(others - y).max() > 1e-3


# What is said of numbers.


@pytest.fixture(scope='module')
def summary(example):
  return example('summary')


def test_spread_and_difference_by_hand(summary):
  assert summary.spread([1.0, 3.0]) == '2.0 ± 1.4'
  assert summary.spread([2.0], 2) == '2.00'
  assert summary.reach([3.0, 1.0, 2.0]) == '1.0 to 3.0'
  # Differences of 2 and 4: a mean of 3, a standard error of 1.
  found = summary.difference([3.0, 6.0], [1.0, 2.0], 2)
  assert found == '+3.00 ± 1.00 points, not clear'
  found = summary.difference([1.0, 2.0], [3.0, 6.0])
  assert found == '-3.0 ± 1.0 points, not clear'
  found = summary.difference([1.0, 2.0], [4.0, 5.2])
  assert found == '-3.1 ± 0.1 points, clear'
