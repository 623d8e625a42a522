"""The networks of the examples, with any norm of normkit as a field.

Four are those of articles on batch normalization, for PyTorch and for Keras,
layer for layer. Two follow papers, made small. One is as deep as it is told to
be. Each takes a transform, such as `nk.BatchNorm()` or `nk.LayerNorm()`, or
None for no normalization, and gives the logits of its classes, or their
log-softmax, where a docstring says so. Cross entropy is the same of both.

Initial weights are Flax's, not those of PyTorch or Keras.
"""

from collections.abc import Callable

from flax import linen as nn
import jax
import jax.numpy as jnp

import normkit as nk
import normkit.linen

# Batch norm with the defaults of the two frameworks. PyTorch's momentum of 0.1
# is the share of the new value, Keras's 0.99 that of the old one, as in Flax.
TORCH = nk.BatchNorm(momentum=0.9, epsilon=1e-5, unbiased=True)
KERAS = nk.BatchNorm(momentum=0.99, epsilon=1e-3)


class MnistNet(nn.Module):
  """PyTorch's network for MNIST, with batch norm: (n, 28, 28, 1).

  The log-softmax of ten classes. With `last_relu` there is a ReLU before it,
  which leaves no negative logits; the article has it.
  """

  norm: nk.Norm | None = TORCH
  last_relu: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = nn.Conv(10, (5, 5), padding='VALID', name='conv1')(x)
    x = nn.relu(halve(x))
    x = nn.Conv(20, (5, 5), padding='VALID', name='conv2')(x)
    x = normalize(x, self.norm, train, 'conv2_bn')
    x = flatten(nn.relu(halve(x)))
    x = nn.Dense(50, name='dense1')(x)
    x = nn.relu(normalize(x, self.norm, train, 'dense1_bn'))
    x = nn.Dense(10, name='dense2')(x)
    return nn.log_softmax(nn.relu(x) if self.last_relu else x)


class KerasCNN(nn.Module):
  """A convolutional network for CIFAR-10 in Keras: (n, 32, 32, 3).

  Batch norm follows the ReLU, and convolutions are unpadded, as is Keras's
  default. The article's softmax is left to the loss.
  """

  norm: nk.Norm | None = KERAS

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = nn.relu(nn.Conv(32, (3, 3), padding='VALID', name='conv1')(x))
    x = halve(normalize(x, self.norm, train, 'bn1'))
    x = nn.relu(nn.Conv(64, (3, 3), padding='VALID', name='conv2')(x))
    x = halve(normalize(x, self.norm, train, 'bn2'))
    x = nn.relu(nn.Dense(64, name='dense1')(x.reshape(len(x), -1)))
    return nn.Dense(10, name='dense2')(x)


class Conv1D(nn.Module):
  """Two convolutions along a sequence, in PyTorch: (n, 28, 3)."""

  norm: nk.Norm | None = TORCH

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    return two_convolutions(x, (3,), self.norm, train)


class Conv2D(nn.Module):
  """Two convolutions of an image, in PyTorch: (n, 28, 28, 3)."""

  norm: nk.Norm | None = TORCH

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    return two_convolutions(x, (3, 3), self.norm, train)


class SmallInception(nn.Module):
  """Batch-normalized Inception in small: (n, height, width, channels).

  A stem, a block for each of the `widths` and the mean over all positions. Each
  convolution is normalized before its ReLU, and has a bias only where there is
  no norm.

  References:
    Ioffe and Szegedy, "Batch Normalization" (2015), section 4.2 and figure 5.
  """

  norm: nk.Norm | None = TORCH
  classes: int = 10
  widths: tuple[int, ...] = (8, 16, 16)

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = ConvNorm(16, 3, 2, self.norm, name='stem')(x, train=train)
    x = nn.relu(x)
    for number, width in enumerate(self.widths, 1):
      x = Inception(width, self.norm, name=f'block{number}')(x, train=train)
      if number == 1:
        x = halve(x)
    return nn.Dense(self.classes, name='dense')(x.mean((1, 2)))


class SmallResNet(nn.Module):
  """The residual network for CIFAR-10, 6 n + 2 layers: (n, 32, 32, 3).

  Three stages of `blocks` blocks, where n is `blocks`, or one for each of the
  `widths`. A stage halves the image and doubles the channels; the shortcut has
  no parameters (option A).

  References:
    He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition"
    (2015), section 4.2.
  """

  norm: nk.Norm | None = TORCH
  blocks: int = 1
  classes: int = 10
  widths: tuple[int, ...] = (16, 32, 64)

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = nn.relu(ConvNorm(16, 3, 1, self.norm, name='stem')(x, train=train))
    for stage, width in enumerate(self.widths, 1):
      for number in range(1, self.blocks + 1):
        stride = 2 if stage > 1 and number == 1 else 1
        name = f'stage{stage}_block{number}'
        x = Residual(width, stride, self.norm, name=name)(x, train=train)
    return nn.Dense(self.classes, name='dense')(x.mean((1, 2)))


class DeepNet(nn.Module):
  """Dense layers, one for each of the norms, and ten classes.

  A norm is before the activation, or `after` it. The initial weights are those
  of He et al. (2015), made for plain networks with ReLUs.
  """

  norms: tuple[nk.Norm | None, ...]
  width: int = 64
  activation: Callable[[jax.Array], jax.Array] = nn.relu
  after: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = x.reshape(len(x), -1)
    for number, norm in enumerate(self.norms, 1):
      x = nn.Dense(
        self.width,
        use_bias=norm is None or self.after,
        kernel_init=nn.initializers.he_normal(),
        name=f'dense{number}',
      )(x)
      if self.after:
        x = self.activation(x)
      x = normalize(x, norm, train, f'norm{number}')
      if not self.after:
        x = self.activation(x)
    return nn.Dense(10, name='logits')(x)


class ConvNorm(nn.Module):
  """A square convolution and its norm."""

  features: int
  size: int
  stride: int
  norm: nk.Norm | None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = nn.Conv(
      self.features,
      (self.size, self.size),
      self.stride,
      padding=self.size // 2,
      # The bias of a norm does what the bias of the convolution would do.
      use_bias=self.norm is None,
      name='conv',
    )(x)
    return normalize(x, self.norm, train, 'norm')


class Inception(nn.Module):
  """Four branches side by side: 1x1, 3x3, two 3x3, and a pool."""

  width: int
  norm: nk.Norm | None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    def branch(x: jax.Array, name: str, *sizes: int) -> jax.Array:
      for number, size in enumerate(sizes):
        conv = ConvNorm(self.width, size, 1, self.norm, name=f'{name}_{number}')
        x = nn.relu(conv(x, train=train))
      return x

    branches = [
      branch(x, 'one', 1),
      branch(x, 'three', 1, 3),
      branch(x, 'double', 1, 3, 3),
      branch(nn.avg_pool(x, (3, 3), padding='SAME'), 'pool', 1),
    ]
    return jnp.concatenate(branches, -1)


class Residual(nn.Module):
  """Two 3x3 convolutions beside a shortcut, and a ReLU after the sum."""

  width: int
  stride: int
  norm: nk.Norm | None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    first = ConvNorm(self.width, 3, self.stride, self.norm, name='first')
    second = ConvNorm(self.width, 3, 1, self.norm, name='second')
    y = second(nn.relu(first(x, train=train)), train=train)
    shortcut = x[:, :: self.stride, :: self.stride]
    new = self.width - x.shape[-1]
    return nn.relu(y + jnp.pad(shortcut, ((0, 0),) * 3 + ((0, new),)))


def two_convolutions(
  x: jax.Array, size: tuple[int, ...], norm: nk.Norm | None, train: bool
) -> jax.Array:
  """3 to 16 to 32 channels, a norm and a ReLU after each, and ten classes."""
  x = nn.Conv(16, size, padding=1, name='conv1')(x)
  x = nn.relu(normalize(x, norm, train, 'bn1'))
  x = nn.Conv(32, size, padding=1, name='conv2')(x)
  x = nn.relu(normalize(x, norm, train, 'bn2'))
  return nn.Dense(10, name='dense')(flatten(x))


def normalize(
  x: jax.Array, norm: nk.Norm | None, train: bool, name: str | None = None
) -> jax.Array:
  """x normalized by a layer of that name, or as it is without a norm."""
  if norm is None:
    return x
  return normkit.linen.Norm(norm, name=name)(x, train=train)


def halve(x: jax.Array) -> jax.Array:
  """The largest of each 2x2 pixels."""
  return nn.max_pool(x, (2, 2), (2, 2))


def flatten(x: jax.Array) -> jax.Array:
  """One row an example, channels first, the order of PyTorch's weights."""
  return jnp.moveaxis(x, -1, 1).reshape(len(x), -1)
