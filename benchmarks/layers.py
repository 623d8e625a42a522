"""The norms that the benchmarks measure, as normkit's and Flax's modules."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

import normkit.linen

LIBRARIES = {'normkit': normkit.linen, 'flax': nn}
NORMS = 'LayerNorm', 'RMSNorm', 'BatchNorm', 'GroupNorm', 'InstanceNorm'
DTYPES = 'bfloat16', 'float32'
ROWS = 'LayerNorm', 'RMSNorm'
Program = tuple[Callable[..., Any], tuple[Any, ...]]


def shapes(
  rows: tuple[int, ...], images: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
  """The input of each norm: rows of features, or images, channels last."""
  return {norm: rows if norm in ROWS else images for norm in NORMS}


class Layer(NamedTuple):
  """A norm in training, by one library.

  Attributes:
    apply: `(params, x) -> (y, updates)`.
    params: shapes of the parameters.
    x: shape of the input, which the output shares.
  """

  apply: Callable[[Any, Any], tuple[Any, Any]]
  params: Any
  x: jax.ShapeDtypeStruct

  @property
  def bytes(self) -> int:
    """The size of the input: n, the unit of all tables."""
    return self.x.size * self.x.dtype.itemsize


def make(
  library: str, norm: str, shape: tuple[int, ...], dtype: str, **options: Any
) -> Layer:
  """A norm of a library, its output in the dtype of its input."""
  if norm == 'BatchNorm':
    options['use_running_average'] = False
  module = getattr(LIBRARIES[library], norm)(dtype=dtype, **options)
  x = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
  variables = dict(jax.eval_shape(module.init, jax.random.key(0), x))
  params = variables.pop('params')

  def apply(params: Any, x: Any) -> tuple[Any, Any]:
    stats = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), variables)
    return module.apply({'params': params, **stats}, x, mutable=['batch_stats'])

  return Layer(apply, params, x)


def residuals(layer: Layer) -> Any:
  """Shapes of what a forward of its own hands to its backward."""
  pull = jax.eval_shape(pullback(layer), layer.params, layer.x)[1]
  return pull


def pullback(layer: Layer) -> Callable[..., Any]:
  def run(params, x):
    y, pull, _ = jax.vjp(layer.apply, params, x, has_aux=True)
    return y, pull

  return run


def programs(layer: Layer) -> dict[str, Program]:
  """The programs that are measured: functions, and shapes of what they take."""

  def backward(pull, dy):
    return pull(dy)

  def step(params, x, dy):
    y, pull, updates = jax.vjp(layer.apply, params, x, has_aux=True)
    return y, updates, pull(dy)

  given = layer.params, layer.x
  return {
    'forward': (layer.apply, given),
    'backward': (backward, (residuals(layer), layer.x)),
    'step': (step, (*given, layer.x)),
  }
