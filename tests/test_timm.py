"""The wider family beside timm's layers, where torch and timm are installed.

test_conformance.py holds the same norms to float64 references everywhere.
"""

from cases import draw
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import normkit as nk
from normkit.weights import weight_standardize

WHY = 'for comparison: pip install timm'
torch = pytest.importorskip('torch', reason=WHY)
layers = pytest.importorskip('timm.layers', reason=WHY)

LAYERS = {
  'evonorm_s0': (
    lambda: layers.EvoNorm2dS0(8, groups=2, eps=1e-5),
    nk.EvoNormS0(num_groups=2),
  ),
  'evonorm_b0': (lambda: layers.EvoNorm2dB0(8, eps=1e-5), nk.EvoNormB0()),
  'filter_response_norm': (
    lambda: layers.FilterResponseNormTlu2d(8, eps=1e-6),
    nk.FilterResponseNorm(),
  ),
}


def to_torch(x):
  return torch.tensor(np.moveaxis(np.asarray(x), -1, 1))


def to_jax(y):
  return np.moveaxis(y.detach().numpy(), 1, -1)


@pytest.mark.parametrize(('make', 'norm'), LAYERS.values(), ids=LAYERS)
def test_training_and_evaluation(make, norm):
  x, layer = draw((4, 5, 6, 8)), make().train()
  params, state = norm.init(x)
  y, state = norm.apply(params, state, x, train=True)
  np.testing.assert_allclose(y, to_jax(layer(to_torch(x))), atol=5e-6)
  if hasattr(layer, 'running_var'):  # its momentum counts the other way
    layer.running_var.copy_(torch.tensor(np.asarray(state.var)))
  z, _ = norm.apply(params, state, x, train=False)
  np.testing.assert_allclose(z, to_jax(layer.eval()(to_torch(x))), atol=5e-6)


def filled(layer, seed=0):
  """The layer with parameters unlike those that it starts with."""
  torch.manual_seed(seed)
  with torch.no_grad():
    for parameter in layer.parameters():
      parameter.normal_()
  return layer


def numpy(tensor):
  return tensor.detach().numpy()


CHANNELS_FIRST = {
  'global_response_norm': (
    lambda: layers.grn.GlobalResponseNorm(8, channels_last=False),
    lambda x, *params: nk.global_response_norm(x, *params, axis=1),
  ),
  'layer_norm_2d': (
    lambda: layers.LayerNorm2d(8),
    lambda x, *params: nk.layer_norm(x, *params, axis=1),
  ),
}


@pytest.mark.parametrize(
  ('make', 'norm'), CHANNELS_FIRST.values(), ids=CHANNELS_FIRST
)
def test_channels_first(make, norm):
  """Values and gradients, of x and of both parameters."""
  layer = filled(make())
  x, dy = draw((4, 8, 5, 6)), draw((4, 8, 5, 6), seed=1)
  given = torch.tensor(np.asarray(x), requires_grad=True)
  want = layer(given)
  want.backward(torch.tensor(np.asarray(dy)))
  params = jnp.asarray(numpy(layer.weight)), jnp.asarray(numpy(layer.bias))
  y, pull = jax.vjp(norm, x, *params)
  np.testing.assert_allclose(y, numpy(want), rtol=1e-5, atol=2e-5)
  tensors = given.grad, layer.weight.grad, layer.bias.grad
  for found, tensor in zip(pull(dy), tensors, strict=True):
    np.testing.assert_allclose(found, tensor.numpy(), rtol=1e-4, atol=1e-4)


@jax.numpy_rank_promotion('allow')
def test_block_of_convnext_v2():
  """Its norms as one writes them here, its products from its weights."""
  convnext = pytest.importorskip('timm.models.convnext', reason=WHY)
  block = filled(convnext.ConvNeXtBlock(8, use_grn=True, ls_init_value=None))
  x = draw((2, 6, 5, 8))
  weights = {n: jnp.asarray(numpy(p)) for n, p in block.named_parameters()}
  highest = lax.Precision.HIGHEST

  def dense(x, name):
    product = jnp.matmul(x, weights[f'{name}.weight'].T, precision=highest)
    return product + weights[f'{name}.bias']

  y = lax.conv_general_dilated(
    x,
    weights['conv_dw.weight'],
    (1, 1),
    [(3, 3), (3, 3)],
    dimension_numbers=('NHWC', 'OIHW', 'NHWC'),
    feature_group_count=8,
    precision=highest,
  )
  y = y + weights['conv_dw.bias']
  y = nk.layer_norm(y, weights['norm.weight'], weights['norm.bias'])
  y = jax.nn.gelu(dense(y, 'mlp.fc1'), approximate=False)
  grn = weights['mlp.grn.weight'], weights['mlp.grn.bias']
  y = x + dense(nk.global_response_norm(y, *grn), 'mlp.fc2')
  want = to_jax(block.eval()(to_torch(x)))
  size = np.abs(want).max()
  np.testing.assert_allclose(y / size, want / size, atol=2e-6)


@pytest.mark.parametrize('scaled', [False, True])
def test_standardized_convolution(scaled):
  """Their epsilon is added, ours is a floor when scaled: both nearly zero."""
  x = draw((4, 5, 6, 8))
  if scaled:
    layer = layers.ScaledStdConv2d(8, 4, 3, bias=False, gamma=1.7, eps=1e-12)
  else:
    layer = layers.StdConv2d(8, 4, 3, bias=False, eps=1e-12)
  weight = jnp.asarray(layer.weight.detach().numpy().transpose(2, 3, 1, 0))
  kernel = weight_standardize(
    weight, 1.7 if scaled else None, scaled=scaled, epsilon=1e-12
  )
  y = lax.conv_general_dilated(
    x,
    kernel,
    (1, 1),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    precision=lax.Precision.HIGHEST,
  )
  want = to_jax(layer(to_torch(x)))
  np.testing.assert_allclose(y, want, atol=1e-4)
