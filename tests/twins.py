"""Flax twins of published image models, with names of their own.

Layers have the names that linen counts, or those of lists in nnx, and lie in
other modules than there.
"""

from collections.abc import Callable, Sequence
import functools
import itertools
from typing import Any

from flax import linen as nn, nnx
import jax
import jax.numpy as jnp

Array = Any
Conv = functools.partial(nn.Conv, use_bias=False)
Norm = functools.partial(nn.BatchNorm, use_running_average=True, epsilon=1e-5)
LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-6)
gelu = functools.partial(nn.gelu, approximate=False)


class DenseNorm(nn.Module):
  """A layer, and the norm of what it gives."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return nn.LayerNorm(epsilon=1e-5)(nn.Dense(4)(x))


class Block(nn.Module):
  """Two or three convolutions and a shortcut, before them or after them."""

  width: int
  stride: int
  wide: int
  shortcut_first: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    def shortcut(x: Array) -> Array:
      if self.stride == 1 and x.shape[-1] == self.width * self.wide:
        return x
      x = Conv(self.width * self.wide, (1, 1), self.stride)(x)
      return Norm()(x)

    y, before = x, shortcut(x) if self.shortcut_first else None
    sizes = [(1, 1), (3, self.stride), (1, 1)]
    if self.wide == 1:
      sizes = [(3, self.stride), (3, 1)]
    for i, (size, stride) in enumerate(sizes):
      out = self.width * (self.wide if i + 1 == len(sizes) else 1)
      y = Conv(out, (size, size), stride, padding=size // 2)(nn.relu(y))
      y = Norm()(y)
    return nn.relu(y + (shortcut(x) if before is None else before))


class ResNet(nn.Module):
  """All blocks beside each other."""

  depths: Sequence[int]
  width: int = 64
  wide: int = 1
  classes: int = 1000
  shortcut_first: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = Conv(self.width, (7, 7), 2, padding=3)(x)
    x = nn.relu(Norm()(x))
    x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
    for i, depth in enumerate(self.depths):
      for j in range(depth):
        stride = 2 if i and not j else 1
        width = self.width * 2**i
        x = Block(width, stride, self.wide, self.shortcut_first)(x)
    return nn.Dense(self.classes)(x.mean((1, 2)))


class MBConv(nn.Module):
  """An inverted bottleneck with squeeze and excitation."""

  outs: int
  expand: int
  size: int
  stride: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    ins, y = x.shape[-1], x
    middle = ins * self.expand
    if self.expand > 1:
      y = nn.swish(Norm()(Conv(middle, (1, 1))(y)))
    window, pad = (self.size, self.size), self.size // 2
    y = Conv(
      middle, window, self.stride, padding=pad, feature_group_count=middle
    )(y)
    y = nn.swish(Norm()(y))
    gate = nn.swish(nn.Conv(ins // 4, (1, 1))(y.mean((1, 2), keepdims=True)))
    y = y * nn.sigmoid(nn.Conv(middle, (1, 1))(gate))
    y = Norm()(Conv(self.outs, (1, 1))(y))
    return x + y if self.stride == 1 and ins == self.outs else y


class EfficientNet(nn.Module):
  """`stages`: expand, size, stride, outs and depth of each."""

  stages: Sequence[tuple[int, int, int, int, int]] = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
  )
  stem: int = 32
  head: int = 1280
  classes: int = 1000

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = Conv(self.stem, (3, 3), 2, padding=1, name='stem_conv')(x)
    x = nn.swish(Norm(name='stem_bn')(x))
    for expand, size, stride, outs, depth in self.stages:
      for j in range(depth):
        x = MBConv(outs, expand, size, 1 if j else stride)(x)
    x = Conv(self.head, (1, 1), name='head_conv')(x)
    x = nn.swish(Norm(name='head_bn')(x))
    return nn.Dense(self.classes, name='logits')(x.mean((1, 2)))


class MlpBlock(nn.Module):
  hidden: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    width = x.shape[-1]
    return nn.Dense(width)(gelu(nn.Dense(self.hidden)(x)))


class EncoderBlock(nn.Module):
  heads: int
  hidden: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    y = LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(self.heads)(y, y)
    return x + MlpBlock(self.hidden)(LayerNorm()(x))


class AddPositions(nn.Module):
  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = (1, *x.shape[1:])
    init = nn.initializers.normal(0.02)
    return x + self.param('pos_embedding', init, shape)


class Encoder(nn.Module):
  depth: int
  heads: int
  hidden: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = AddPositions(name='posembed_input')(x)
    for i in range(self.depth):
      block = EncoderBlock(self.heads, self.hidden, name=f'encoderblock_{i}')
      x = block(x)
    return LayerNorm(name='encoder_norm')(x)


class ViT(nn.Module):
  patch: int = 16
  width: int = 192
  depth: int = 12
  heads: int = 3
  hidden: int = 768
  classes: int = 1000

  @nn.compact
  def __call__(self, x: Array) -> Array:
    window = self.patch, self.patch
    x = nn.Conv(self.width, window, window, 'VALID', name='embedding')(x)
    x = x.reshape(len(x), -1, self.width)
    cls = self.param('cls', nn.initializers.zeros, (1, 1, self.width))
    x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], 1)
    x = Encoder(self.depth, self.heads, self.hidden, name='Transformer')(x)
    return nn.Dense(self.classes, name='head')(x[:, 0])


class ConvNeXtBlock(nnx.Module):
  def __init__(self, width: int, rngs: nnx.Rngs) -> None:
    self.dwconv = nnx.Conv(
      width, width, (7, 7), feature_group_count=width, rngs=rngs
    )
    self.norm = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
    self.pwconv1 = nnx.Linear(width, 4 * width, rngs=rngs)
    self.pwconv2 = nnx.Linear(4 * width, width, rngs=rngs)
    self.layer_scale = nnx.Param(jnp.ones(width))

  def __call__(self, x: Array) -> Array:
    y = self.pwconv1(self.norm(self.dwconv(x)))
    scale = self.layer_scale[...].reshape(1, 1, 1, -1)
    return x + self.pwconv2(gelu(y)) * scale


class ConvNeXt(nnx.Module):
  """What lies between the stages is in a list of its own."""

  def __init__(
    self,
    depths: Sequence[int],
    widths: Sequence[int],
    rngs: nnx.Rngs,
    classes: int = 1000,
  ) -> None:
    def norm(width: int) -> nnx.LayerNorm:
      return nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)

    def conv(ins: int, outs: int, size: int) -> nnx.Conv:
      window = size, size
      return nnx.Conv(ins, outs, window, window, padding='VALID', rngs=rngs)

    between = [nnx.Sequential(conv(3, widths[0], 4), norm(widths[0]))]
    for ins, outs in itertools.pairwise(widths):
      between.append(nnx.Sequential(norm(ins), conv(ins, outs, 2)))
    self.downsample_layers = nnx.List(between)
    self.stages = nnx.List(
      [
        nnx.Sequential(*[ConvNeXtBlock(width, rngs) for _ in range(depth)])
        for depth, width in zip(depths, widths, strict=True)
      ]
    )
    self.norm = norm(widths[-1])
    self.head = nnx.Linear(widths[-1], classes, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    for between, stage in zip(self.downsample_layers, self.stages, strict=True):
      x = stage(between(x))
    return self.head(self.norm(x.mean((1, 2))))


def empty(model: nn.Module, x: Any) -> Any:
  """The variables of a linen model, as shapes."""
  return jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros_like(x))
  )


def abstract(make: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
  """An nnx model, as shapes."""
  return nnx.eval_shape(lambda: make(nnx.Rngs(0)))
