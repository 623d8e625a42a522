"""Image models of timm and torchvision into twins whose names are others.

Each kind as published by one, with fewer blocks of a kind by the other. Random
weights; the names match themselves, from sorted names as a file has them
and from the module. Outputs agree, and the weights come back bit by bit.
"""

import importlib
from typing import Any

from flax import linen, nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twins

from normkit.tools import convert

WHY = "models as published: pip install 'normkit[peers]'"
pytestmark = pytest.mark.second_tier
SIZE = 64


def timm(name: str, **options: Any) -> Any:
  return published('timm').create_model(name, **options)


def torchvision(name: str, *given: Any, **options: Any) -> Any:
  return getattr(published('torchvision.models'), name)(*given, **options)


def published(name: str) -> Any:
  pytest.importorskip('torch', reason=WHY)
  try:
    return importlib.import_module(name)
  except (ImportError, RuntimeError) as error:  # of another torch
    pytest.skip(f'{WHY}: {error}')


def convnext(depths, widths):
  return lambda rngs: twins.ConvNeXt(depths, widths, rngs)


def few_convnext():
  there = published('torchvision.models.convnext')
  ends = zip(FEW[1], [*FEW[1][1:], None], FEW[0], strict=True)
  return there.ConvNeXt([there.CNBlockConfig(*end) for end in ends])


def few_efficientnet():
  there = published('torchvision.models.efficientnet')
  ins, settings = twins.EfficientNet.stem, []
  for expand, size, stride, outs, depth in STAGES:
    one = there.MBConvConfig(expand, size, stride, ins, outs, depth)
    settings.append(one)
    ins = outs
  return there.EfficientNet(settings, dropout=0)


ATTO = (2, 2, 6, 2), (40, 80, 160, 320)
FEW = (1, 2, 1, 1), (24, 48, 96, 192)
BOTTLENECKS = 1, 2, 1, 1
STAGES = (
  (1, 3, 1, 16, 1),
  (6, 3, 2, 24, 2),
  (6, 5, 2, 40, 1),
  (6, 3, 1, 320, 1),
)
MODELS = {
  'timm-resnet18': (
    lambda: timm('resnet18'),
    twins.ResNet((2, 2, 2, 2), shortcut_first=True),
  ),
  'timm-resnet26': (
    lambda: timm('resnet26'),
    twins.ResNet((2, 2, 2, 2), wide=4),
  ),
  'timm-efficientnet_b0': (
    lambda: timm('efficientnet_b0'),
    twins.EfficientNet(),
  ),
  'timm-convnext_atto': (lambda: timm('convnext_atto'), convnext(*ATTO)),
  'timm-vit_tiny': (
    lambda: timm('vit_tiny_patch16_224', img_size=SIZE),
    twins.ViT(),
  ),
  'torchvision-resnet': (
    lambda: torchvision(
      'ResNet', published('torchvision.models.resnet').Bottleneck, BOTTLENECKS
    ),
    twins.ResNet(BOTTLENECKS, wide=4, shortcut_first=True),
  ),
  'torchvision-efficientnet': (few_efficientnet, twins.EfficientNet(STAGES)),
  'torchvision-convnext': (few_convnext, convnext(*FEW)),
  'torchvision-vit': (
    lambda: torchvision(
      'VisionTransformer',
      image_size=SIZE,
      patch_size=16,
      num_layers=3,
      num_heads=3,
      hidden_dim=192,
      mlp_dim=768,
    ),
    twins.ViT(depth=3),
  ),
}


def settled(module):
  """The module in evaluation, no array of it like another."""
  import torch  # noqa: PLC0415

  torch.manual_seed(0)
  with torch.no_grad():
    for name, array in module.state_dict().items():
      if array.ndim > 1:
        fan = array[0].numel()
        array.normal_(std=fan**-0.5)
      elif name.endswith('running_var') or name.endswith('weight'):
        array.uniform_(0.5, 1.5)
      elif array.is_floating_point():
        array.normal_(std=0.2)
  return module.eval()


def test_a_module_tells_more_than_its_names():
  """Numbers that fall, a norm before each layer, gates by name alone."""
  torch = published('torch')

  class Module(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.norm = torch.nn.LayerNorm(4)
      self.blocks = torch.nn.ModuleList(
        [
          torch.nn.ModuleDict(
            {
              'fc': torch.nn.Linear(4, 4),
              'norm': torch.nn.LayerNorm(4),
            }
          )
          for _ in range(2)
        ]
      )
      self.up = torch.nn.Linear(4, 4)
      self.gate = torch.nn.Linear(4, 4)

    def forward(self, x):
      for block in reversed(self.blocks):
        x = block['fc'](block['norm'](x))
      x = self.norm(x)
      return torch.nn.functional.silu(self.gate(x)) * self.up(x)

  class Twin(linen.Module):
    names: tuple[str, str]

    @linen.compact
    def __call__(self, x):
      x = linen.LayerNorm(epsilon=1e-5)(x)
      for _ in range(2):
        x = twins.DenseNorm()(x)
      first, second = (linen.Dense(4, name=name)(x) for name in self.names)
      return linen.silu(first) * second

  module, x = settled(Module()), np.float32([[1, -2, 0.5, 3]])
  twin = Twin(('gate', 'up'))
  template = twins.empty(twin, x)
  names = convert.match(module, template, twin.apply, x)
  assert names['blocks.1.norm'] == 'LayerNorm_0'
  assert names['norm'] == 'DenseNorm_1/LayerNorm_0'
  state = module.state_dict()
  y = twin.apply(convert.from_torch(state, template, names=names), x)
  want = module(torch.tensor(x)).detach().numpy()
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
  twin = Twin(('a', 'b'))
  with pytest.raises(ValueError, match=r"'up', 'gate' may each be any of"):
    convert.match(module, twins.empty(twin, x), twin.apply, x)


@pytest.mark.parametrize(('make', 'twin'), MODELS.values(), ids=MODELS)
def test_published(make, twin):
  module = settled(make())
  import torch  # noqa: PLC0415

  state = dict(sorted(module.state_dict().items()))
  x = np.random.default_rng(0).normal(size=(1, SIZE, SIZE, 3))
  x = np.float32(x)
  if hasattr(twin, 'init'):
    template, call = twins.empty(twin, jnp.asarray(x)), twin.apply
  else:
    template, call = twins.abstract(twin), lambda model, x: model(x)
  names = convert.match(state, template, call, x)
  assert convert.match(module, template, call, x) == names
  filled = convert.from_torch(state, template, names=names)
  if isinstance(filled, nnx.Module):
    graph, arrays = nnx.split(filled)
    y = jax.jit(lambda a, x: nnx.merge(graph, a)(x))(arrays, x)
  else:
    y = jax.jit(call)(filled, x)
  with torch.no_grad():
    want = module(torch.tensor(x).movedim(-1, 1)).numpy()
  error = np.abs(np.asarray(y) - want).max() / np.abs(want).max()
  print(f'{error:.1e}')
  assert error < 5e-6
  back = convert.to_torch(filled, names=names, like=state)
  for name, array in state.items():
    if 'num_batches' not in name:
      np.testing.assert_array_equal(back[name], array.numpy())
