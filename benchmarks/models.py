"""ResNet-50, a UNet, transformer blocks in training, with a norm or without.

He and others, "Deep Residual Learning for Image Recognition" (2016), table 1,
with the stride in the 3x3 convolution; and the feed-forward half of a
transformer block, "pre-norm", under `lax.scan`.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from benchmarks.layers import LIBRARIES

STAGES = 3, 4, 6, 3
Step = Callable[..., Any]


def make_norm(library: str, norm: str, **options: Any) -> Callable[..., Any]:
  """A maker of modules; library 'none' gives none at all."""
  if library == 'none':
    return lambda **_: lambda x: x
  if norm == 'BatchNorm':
    options['use_running_average'] = False
  return functools.partial(getattr(LIBRARIES[library], norm), **options)


class Bottleneck(nn.Module):
  """Three convolutions and what is added to them."""

  features: int
  stride: int
  norm: Any

  @nn.compact
  def __call__(self, x):
    conv = functools.partial(nn.Conv, use_bias=False, dtype=jnp.bfloat16)
    y = conv(self.features, (1, 1))(x)
    y = nn.relu(self.norm()(y))
    y = conv(self.features, (3, 3), self.stride)(y)
    y = nn.relu(self.norm()(y))
    y = conv(4 * self.features, (1, 1))(y)
    y = self.norm()(y)
    if x.shape != y.shape:
      x = conv(4 * self.features, (1, 1), self.stride)(x)
      x = self.norm()(x)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """ResNet-50, its convolutions in bfloat16."""

  norm: Any
  stages: tuple[int, ...] = STAGES

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(64, (7, 7), 2, use_bias=False, dtype=jnp.bfloat16)(x)
    x = nn.relu(self.norm()(x))
    x = nn.max_pool(x, (3, 3), (2, 2), 'SAME')
    for index, blocks in enumerate(self.stages):
      for block in range(blocks):
        stride = 2 if index and not block else 1
        x = Bottleneck(64 * 2**index, stride, self.norm)(x)
    return nn.Dense(1000)(x.mean((1, 2)).astype(jnp.float32))


def resnet_step(
  library: str,
  norm: str,
  batch: int,
  size: int = 224,
  policy: Any = None,
  stages: tuple[int, ...] = STAGES,
) -> tuple[Step, tuple[Any, ...]]:
  """A step of gradient descent: `(params, stats, images, labels) -> ...`.

  Args:
    library: 'normkit', 'flax' or 'none'.
    norm: the name of the module.
    batch: how many images.
    size: their height and width.
    policy: what is kept for the backward; None leaves it to JAX.
    stages: how many blocks each has.

  Returns:
    The step, and the shapes of its arguments.
  """
  make = make_norm(library, norm, dtype=jnp.bfloat16)
  model = ResNet(make, stages)
  images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.bfloat16)
  labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)

  def step(params, stats, images, labels):
    def loss(params, images):
      logits, updates = model.apply(
        {'params': params, 'batch_stats': stats}, images, mutable='batch_stats'
      )
      picked = jnp.take_along_axis(
        nn.log_softmax(logits), labels[:, None], axis=1
      )
      return -picked.mean(), updates.get('batch_stats', {})

    if policy is not None:
      loss = jax.checkpoint(loss, policy=policy)
    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(
      params, images
    )
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    return params, stats, value

  stats = variables.get('batch_stats', {})
  return step, (variables['params'], stats, images, labels)


class UNet(nn.Module):
  """Norm, SiLU, convolution, twice at each resolution, down and up again."""

  norm: Any
  features: tuple[int, ...]

  @nn.compact
  def __call__(self, x):
    conv = functools.partial(nn.Conv, dtype=jnp.bfloat16)

    def residual(x, features):
      y = conv(features, (3, 3))(nn.silu(self.norm()(x)))
      y = conv(features, (3, 3))(nn.silu(self.norm()(y)))
      return y + (x if x.shape == y.shape else conv(features, (1, 1))(x))

    x = conv(self.features[0], (3, 3))(x)
    skipped = []
    for features in self.features:
      x = residual(x, features)
      skipped.append(x)
      x = conv(features, (3, 3), 2)(x)
    x = residual(x, self.features[-1])
    for features, skip in zip(self.features[::-1], skipped[::-1], strict=True):
      x = x.repeat(2, 1).repeat(2, 2)
      x = residual(jnp.concatenate([x, skip], -1), features)
    return conv(3, (3, 3))(nn.silu(self.norm()(x)))


def unet_step(
  library: str, batch: int, size: int, features: tuple[int, ...]
) -> tuple[Step, tuple[Any, ...]]:
  """Gradients of a UNet with group norms: `(params, images) -> ...`."""
  model = UNet(make_norm(library, 'GroupNorm', dtype=jnp.bfloat16), features)
  images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.bfloat16)
  params = jax.eval_shape(model.init, jax.random.key(0), images)

  def loss(params, images):
    return jnp.square(model.apply(params, images).astype(jnp.float32)).mean()

  return jax.value_and_grad(loss), (params, images)


def transformer_step(
  library: str,
  norm: str,
  tokens: int = 8192,
  width: int = 2048,
  layers: int = 12,
  policy: Any = None,
) -> tuple[Step, tuple[Any, ...]]:
  """Gradients of feed-forward blocks: `(weights, x) -> (value, gradients)`."""
  module = make_norm(library, norm, dtype=jnp.bfloat16)()
  x = jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16)

  def weight(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((layers, *shape), dtype)

  params = {}
  if library != 'none':
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    params = {
      n: weight(*p.shape, dtype=p.dtype) for n, p in variables['params'].items()
    }
  weights = params, weight(width, 4 * width), weight(4 * width, width)

  def block(x, weights):
    params, inner, outer = weights
    y = x if library == 'none' else module.apply({'params': params}, x)
    return x + nn.gelu(y @ inner) @ outer, None

  if policy is not None:
    block = jax.checkpoint(block, policy=policy, prevent_cse=False)

  def loss(weights, x):
    return jnp.sum(lax.scan(block, x, weights)[0].astype(jnp.float32))

  return jax.value_and_grad(loss, (0, 1)), (weights, x)
