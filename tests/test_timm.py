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


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
  ('make', 'norm'), CHANNELS_FIRST.values(), ids=CHANNELS_FIRST
)
def test_channels_first(make, norm, dtype):
  """Values and gradients, of x and of both parameters.

  test_blocks.py has a block of ConvNeXt V2.
  """
  layer = filled(make()).to(getattr(torch, dtype))
  x, dy = (draw((4, 8, 5, 6), dtype, seed=i) for i in range(2))

  def numpy(tensor):
    return tensor.detach().float().numpy()

  given, gradient = (
    torch.tensor(np.asarray(a, np.float32)).to(getattr(torch, dtype))
    for a in (x, dy)
  )
  want = layer(given.requires_grad_())
  want.backward(gradient)
  params = (jnp.asarray(numpy(p), dtype) for p in (layer.weight, layer.bias))
  y, pull = jax.vjp(norm, x, *params)
  tensors = want, given.grad, layer.weight.grad, layer.bias.grad
  # Theirs rounds each step of what timm writes out, and so does its gradient.
  error = 5e-6 if dtype == 'float32' else 2**-6
  for found, tensor in zip((y, *pull(dy)), tensors, strict=True):
    assert found.dtype == dtype
    size = np.abs(numpy(tensor)).max()
    np.testing.assert_allclose(
      np.float32(found) / size, numpy(tensor) / size, rtol=0, atol=error
    )


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
