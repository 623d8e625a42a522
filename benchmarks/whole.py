"""What norms cost a whole model before it runs: init, trace, compile."""

from collections.abc import Callable
import functools
import statistics
import time
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from rich.progress import track

from benchmarks import models, traffic

BLOCKS = 12


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
  """Seconds that a call takes, and what it gives."""
  start = time.perf_counter()
  result = function()
  return time.perf_counter() - start, result


class Block(nn.Module):
  """Attention and two dense layers, a norm before each."""

  norm: Any

  @nn.compact
  def __call__(self, x):
    x = x + nn.MultiHeadDotProductAttention(4)(self.norm()(x))
    y = nn.gelu(nn.Dense(4 * x.shape[-1])(self.norm()(x)))
    return x + nn.Dense(x.shape[-1])(y)


class Model(NamedTuple):
  """A model by one library, and what its input is."""

  module: nn.Module
  x: jax.ShapeDtypeStruct


def transformer(library: str, width: int) -> Model:
  norm = models.make_norm(library, 'LayerNorm')
  module = nn.Sequential([*(Block(norm) for _ in range(BLOCKS)), norm()])
  return Model(module, jax.ShapeDtypeStruct((2, 64, width), jnp.float32))


def resnet(library: str) -> Model:
  norm = models.make_norm(library, 'BatchNorm', dtype=jnp.bfloat16)
  x = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.bfloat16)
  return Model(models.ResNet(norm), x)


def unet(library: str) -> Model:
  norm = models.make_norm(library, 'GroupNorm', dtype=jnp.bfloat16)
  x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.bfloat16)
  return Model(models.UNet(norm, (32, 64, 128, 256)), x)


MODELS: dict[str, Callable[[str], Model]] = {
  'ResNet-50': resnet,
  f'{BLOCKS} transformer blocks, 256 wide': functools.partial(
    transformer, width=256
  ),
  f'{BLOCKS} transformer blocks, 1,024 wide': functools.partial(
    transformer, width=1024
  ),
  'UNet': unet,
}


def step(module: nn.Module) -> Callable[..., Any]:
  """Gradients of all variables, and the updated statistics."""

  def run(variables: Any, x: Any) -> Any:
    def loss(variables: Any) -> Any:
      y, updates = module.apply(variables, x, mutable='batch_stats')
      return jnp.square(y.astype(jnp.float32)).mean(), updates

    return jax.grad(loss, has_aux=True)(variables)

  return run


def measure(model: Model) -> dict[str, float]:
  """Seconds of init, trace and compile, and instructions of the program."""
  jax.clear_caches()
  x = jnp.zeros(model.x.shape, model.x.dtype)
  init, variables = timed(lambda: model.module.init(jax.random.key(0), x))
  jax.clear_caches()
  run = jax.jit(step(model.module))
  tracing, lowered = timed(lambda: run.lower(variables, x))
  compiling, compiled = timed(lowered.compile)
  computations, _ = traffic.parse(compiled.as_text())
  return {
    'trace': tracing,
    'compile': compiling,
    'init': init,
    'instructions': sum(map(len, computations.values())),
  }


def table(runs: int) -> list[list[str]]:
  """Flax's medians, and normkit's over them.

  The libraries in turn, another first in each round; of which the first, where
  JAX and the compiler start, is left out.
  """
  rows = []
  for name, make in track(MODELS.items(), 'models'):
    found: dict[str, list[dict[str, float]]] = {n: [] for n in models.LIBRARIES}
    for index in range(runs + 1):
      for library in sorted(found, reverse=bool(index % 2)):
        found[library].append(measure(make(library)))
    medians = {
      library: {k: statistics.median(f[k] for f in each[1:]) for k in each[0]}
      for library, each in found.items()
    }
    ours, theirs = (medians[n].values() for n in ('normkit', 'flax'))
    rows.append([name, *map(_cell, ours, theirs)])
  return rows


def _cell(ours: float, theirs: float) -> str:
  is_count = theirs == int(theirs)
  number = f'{theirs:,.0f}' if is_count else f'{theirs:.1f} s'
  return f'{ours / theirs:.2f} ({number})'
