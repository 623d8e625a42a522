"""The wider family beside timm's layers, where torch and timm are installed.

test_conformance.py holds the same norms to float64 references everywhere.
"""

from cases import draw
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
