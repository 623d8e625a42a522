"""Public models in Flax's layers and normkit's norms, as others publish them.

Names are those of timm, with '/' for '.', but for BERT. Options are what the
publishers differ in.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from normkit import linen

Make = Callable[..., Any]
POOL = ((1, 1), (1, 1))  # of PyTorch's nets
gelu = functools.partial(jax.nn.gelu, approximate=False)


class Chain(nn.Module):
  """Modules one after the other, named by numbers from `start`."""

  makers: Sequence[Make]
  start: int = 0

  @nn.compact
  def __call__(self, x):
    for i, make in enumerate(self.makers, self.start):
      x = make(name=str(i))(x)
    return x


class Images(nn.Module):
  """What nets for images share: convolutions, and a norm in evaluation."""

  norm: Make

  def conv(self, features, size, stride=1, groups=1, bias=False, same=False):
    return functools.partial(
      nn.Conv,
      features,
      (size, size),
      stride,
      padding='SAME' if same else (size - 1) // 2,
      feature_group_count=groups,
      use_bias=bias,
    )


class Residual(Images):
  """Two convolutions, or three, the first stride in the last 3x3 but one."""

  features: int
  stride: int
  bottleneck: bool
  same: bool

  @nn.compact
  def __call__(self, x):
    conv = functools.partial(self.conv, same=self.same)
    f, s = self.features, self.stride
    shapes = [(f, 1, 1), (f, 3, s), (4 * f, 1, 1)]
    y = x
    shapes = shapes if self.bottleneck else [(f, 3, s), (f, 3, 1)]
    for i, shape in enumerate(shapes, 1):
      y = nn.relu(y) if i > 1 else y
      y = self.norm(name=f'bn{i}')(conv(*shape)(name=f'conv{i}')(y))
    if x.shape != y.shape:
      shortcut = conv(y.shape[-1], 1, self.stride), self.norm
      x = Chain(shortcut, name='downsample')(x)
    return nn.relu(x + y)


class ResNet(Images):
  """He and others, "Deep Residual Learning for Image Recognition" (2016)."""

  layers: Sequence[int] = (2, 2, 2, 2)
  widths: Sequence[int] = (64, 128, 256, 512)
  bottleneck: bool = False
  same: bool = False
  classes: int = 1000

  @nn.compact
  def __call__(self, x):
    x = self.conv(64, 7, 2, same=self.same)(name='conv1')(x)
    x = nn.relu(self.norm(name='bn1')(x))
    x = nn.max_pool(x, (3, 3), (2, 2), 'SAME' if self.same else POOL)
    for i, (number, width) in enumerate(
      zip(self.layers, self.widths, strict=True), 1
    ):
      options = {
        'features': width,
        'bottleneck': self.bottleneck,
        'same': self.same,
      }
      blocks = [
        functools.partial(
          Residual, self.norm, stride=2 if i > 1 and not j else 1, **options
        )
        for j in range(number)
      ]
      x = Chain(blocks, name=f'layer{i}')(x)
    return nn.Dense(self.classes, name='fc')(x.mean((1, 2)))


class MobileNet(Images):
  """Howard and others, "MobileNets" (2017)."""

  widths: Sequence[int]
  strides: Sequence[int]
  first: int
  padding: Any = 1
  first_padding: Any = 1
  activation: Make = nn.relu
  by_conv: bool = False
  classes: int = 1000

  @nn.compact
  def __call__(self, x):
    def conv(features, size, stride, padding, name, groups=1):
      make = self.conv(features, size, stride, groups)
      return make(padding=padding, name=name)

    x = conv(self.first, 3, 2, self.first_padding, 'conv')(x)
    x = self.activation(self.norm(name='bn')(x))
    for i, (width, stride) in enumerate(
      zip(self.widths, self.strides, strict=True)
    ):
      wide = x.shape[-1]
      x = conv(wide, 3, stride, self.padding, f'depthwise_{i}', wide)(x)
      x = self.activation(self.norm(name=f'depthwise_bn_{i}')(x))
      x = conv(width, 1, 1, 0, f'pointwise_{i}')(x)
      x = self.activation(self.norm(name=f'pointwise_bn_{i}')(x))
    x = x.mean((1, 2), keepdims=True)
    if not self.by_conv:
      x = x.reshape(len(x), -1)
      return nn.Dense(self.classes, name='logits')(x)
    x = nn.Conv(self.classes, (1, 1), name='logits')(x)
    return x.reshape(len(x), -1)


class Squeeze(nn.Module):
  """Hu and others, "Squeeze-and-Excitation Networks" (2018)."""

  features: int

  @nn.compact
  def __call__(self, x):
    y = x.mean((1, 2), keepdims=True)
    y = nn.silu(nn.Conv(self.features, (1, 1), name='conv_reduce')(y))
    return x * nn.sigmoid(nn.Conv(x.shape[-1], (1, 1), name='conv_expand')(y))


class Inverted(Images):
  """A block of EfficientNet: wide, depthwise, squeezed, narrow."""

  features: int
  ratio: int
  size: int
  stride: int

  @nn.compact
  def __call__(self, x):
    narrow, y = x.shape[-1], x
    wide, last = narrow * self.ratio, 'conv_pw'
    if self.ratio > 1:
      y = self.conv(wide, 1)(name='conv_pw')(y)
      y, last = nn.silu(self.norm(name='bn1')(y)), 'conv_pwl'
    number = 2 if self.ratio > 1 else 1
    y = self.conv(wide, self.size, self.stride, wide)(name='conv_dw')(y)
    y = nn.silu(self.norm(name=f'bn{number}')(y))
    y = Squeeze(narrow // 4, name='se')(y)
    y = self.conv(self.features, 1)(name=last)(y)
    y = self.norm(name=f'bn{number + 1}')(y)
    return x + y if x.shape == y.shape else y


class EfficientNet(Images):
  """Tan and Le, "EfficientNet" (2019), table 1: B0."""

  classes: int = 1000

  @nn.compact
  def __call__(self, x):
    x = nn.silu(self.norm(name='bn1')(self.conv(32, 3, 2)(name='conv_stem')(x)))
    stages = [
      *((1, 16, 1, 3, 1), (2, 24, 6, 3, 2), (2, 40, 6, 5, 2)),
      *((3, 80, 6, 3, 2), (3, 112, 6, 5, 1), (4, 192, 6, 5, 2)),
      (1, 320, 6, 3, 1),
    ]
    chains = []
    for number, width, ratio, size, stride in stages:
      blocks = [
        functools.partial(
          Inverted, self.norm, width, ratio, size, stride if not j else 1
        )
        for j in range(number)
      ]
      chains.append(functools.partial(Chain, blocks))
    x = Chain(chains, name='blocks')(x)
    x = nn.silu(self.norm(name='bn2')(self.conv(1280, 1)(name='conv_head')(x)))
    return nn.Dense(self.classes, name='classifier')(x.mean((1, 2)))


class MLP(nn.Module):
  """Two dense layers, or convolutions of one place."""

  features: int
  by_conv: bool = False

  @nn.compact
  def __call__(self, x):
    conv = functools.partial(nn.Conv, kernel_size=(1, 1))
    layer = conv if self.by_conv else nn.Dense
    y = gelu(layer(self.features, name='fc1')(x))
    return layer(x.shape[-1], name='fc2')(y)


class ConvNeXtBlock(Images):
  """Depthwise convolution, norm, MLP, scale."""

  @nn.compact
  def __call__(self, x):
    width = x.shape[-1]
    y = self.conv(width, 7, 1, width, bias=True)(name='conv_dw')(x)
    y = MLP(4 * width, by_conv=True, name='mlp')(self.norm(name='norm')(y))
    gamma = self.param('gamma', nn.initializers.ones, (width,))
    return x + y * gamma[None, None, None]


class Stage(Images):
  """Blocks of ConvNeXt, after fewer places and more channels."""

  width: int
  depth: int

  @nn.compact
  def __call__(self, x):
    if x.shape[-1] != self.width:
      down = functools.partial(nn.Conv, self.width, (2, 2), 2, padding='VALID')
      x = Chain((self.norm, down), name='downsample')(x)
    blocks = [functools.partial(ConvNeXtBlock, self.norm)] * self.depth
    return Chain(blocks, name='blocks')(x)


class Head(nn.Module):
  """Norm and classes."""

  norm: Make
  classes: int

  @nn.compact
  def __call__(self, x):
    return nn.Dense(self.classes, name='fc')(self.norm(name='norm')(x))


class ConvNeXt(Images):
  """Liu and others, "A ConvNet for the 2020s" (2022)."""

  depths: Sequence[int] = (2, 2, 6, 2)
  widths: Sequence[int] = (40, 80, 160, 320)
  classes: int = 1000

  @nn.compact
  def __call__(self, x):
    patches = functools.partial(
      nn.Conv, self.widths[0], (4, 4), 4, padding='VALID'
    )
    x = Chain((patches, self.norm), name='stem')(x)
    stages = [
      functools.partial(Stage, self.norm, width, depth)
      for width, depth in zip(self.widths, self.depths, strict=True)
    ]
    x = Chain(stages, name='stages')(x)
    return Head(self.norm, self.classes, name='head')(x.mean((1, 2)))


class Block(nn.Module):
  """Attention and MLP, a norm before each, or after each as in BERT."""

  norm: Make
  heads: int
  features: int
  post: bool = False

  @nn.compact
  def __call__(self, x):
    attend = nn.MultiHeadDotProductAttention(num_heads=self.heads, name='attn')
    norms = self.norm(name='norm1'), self.norm(name='norm2')
    parts = attend, MLP(self.features, name='mlp')
    for part, norm in zip(parts, norms, strict=True):
      x = norm(x + part(x)) if self.post else x + part(norm(x))
    return x


class ViT(nn.Module):
  """Dosovitskiy and others, "An Image is Worth 16x16 Words" (2021)."""

  patch: int
  width: int
  depth: int
  heads: int
  epsilon: float = 1e-6
  classes: int | None = 1000
  positions: str = 'pos_embed'

  @nn.compact
  def __call__(self, x):
    norm = functools.partial(linen.LayerNorm, epsilon=self.epsilon)
    x = Patches(self.patch, self.width, name='patch_embed')(x)
    normal = nn.initializers.normal()
    token = self.param('cls_token', normal, (1, 1, self.width))
    token = jnp.broadcast_to(token, (len(x), 1, self.width))
    x = jnp.concatenate([token, x], 1)
    x = x + self.param(self.positions, normal, (1, *x.shape[1:]))
    block = functools.partial(Block, norm, self.heads, 4 * self.width)
    x = Chain([block] * self.depth, name='blocks')(x)
    x = norm(name='norm')(x)
    if self.classes is None:
      return x
    return nn.Dense(self.classes, name='head')(x[:, 0])


class Patches(nn.Module):
  """An image as tokens."""

  patch: int
  width: int

  @nn.compact
  def __call__(self, x):
    size = (self.patch, self.patch)
    x = nn.Conv(self.width, size, size, padding='VALID', name='proj')(x)
    return x.reshape(len(x), -1, self.width)


class BERT(nn.Module):
  """Devlin and others, "BERT" (2019): hidden states, and those of the first."""

  words: int
  places: int
  width: int
  depth: int
  heads: int

  @nn.compact
  def __call__(self, x):
    norm = functools.partial(linen.LayerNorm, epsilon=1e-12)
    y = nn.Embed(self.words, self.width, name='word')(x)
    y = y + nn.Embed(2, self.width, name='type')(jnp.zeros_like(x))
    places = jnp.arange(x.shape[1])[None]
    y = y + nn.Embed(self.places, self.width, name='position')(places)
    y = norm(name='norm')(y)
    block = functools.partial(Block, norm, self.heads, 4 * self.width, True)
    y = Chain([block] * self.depth, name='blocks')(y)
    return y, nn.tanh(nn.Dense(self.width, name='pooler')(y[:, 0]))
