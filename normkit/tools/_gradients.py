"""Parameters and their gradients, and the weights that norms come after."""

from collections.abc import Callable, Iterator, Mapping
import math
import re
from typing import Any, TypeAlias

from flax import nnx, traverse_util
from flax.core import meta
import jax
import jax.numpy as jnp
import numpy as np

from normkit.tools import _layers
from normkit.tools._advice import INVARIANT, Floats
from normkit.tools._inspection import Weight
from normkit.tools._layers import Model, Path

Loss: TypeAlias = Callable[[Model, Any], Any]
Tree: TypeAlias = dict[Path, Any]


def gradient_of(loss: Loss, model: Model, batch: Any) -> Tree:
  """The gradient of the loss, by the paths of the parameters."""

  def checked(model: Model) -> Any:
    value = loss(model, batch)
    if jnp.shape(value):
      raise ValueError(
        'loss must return one number, got an array of shape '
        f'{jnp.shape(value)}. Take the mean.'
      )
    return value

  if isinstance(model, nnx.Module):
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  else:
    params = model['params']
  gradient = jax.grad(lambda p: checked(_layers.with_params(model, p)))
  return _flat(gradient(params))


def values_of(model: Model) -> Tree:
  """The parameters by their paths."""
  if isinstance(model, nnx.Module):
    return _flat(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
  return _flat(model.get('params', {}))


def _flat(tree: Any) -> Tree:
  flat = _layers.flat_tree(meta.unbox(tree)).items()
  return {p: wide(v) for p, v in flat if v is not traverse_util.empty_node}


def wide(value: Any) -> Floats:
  """A value as a NumPy array of float64, or complex128."""
  array = np.asarray(value)
  return array.astype(np.promote_types(array.dtype, np.float64))


def shares_of(gradients: Tree) -> dict[Path, float]:
  """The share of each parameter in the squared norm of the gradient."""
  squares = {p: float(np.sum(np.abs(g) ** 2)) for p, g in gradients.items()}
  total = sum(squares.values())
  return {p: s / total if total else math.nan for p, s in squares.items()}


def weights_of(
  values: Tree,
  gradients: Tree,
  shares: Mapping[Path, float],
  learning_rate: float | None,
) -> Iterator[Weight]:
  """The weights at right angles to their gradients, output by output."""
  for path in sorted(gradients, key=natural):
    value, gradient = values[path], gradients[path]
    if value.ndim < 2 or not gradient.any():
      continue
    w, g = (a.reshape(-1, a.shape[-1]) for a in (value, gradient))
    lengths = np.linalg.norm(w, axis=0) * np.linalg.norm(g, axis=0)
    along = np.linalg.norm(np.sum(w * g, axis=0))
    if along <= INVARIANT * np.linalg.norm(lengths):
      norm = float(np.linalg.norm(w))
      rate = math.nan if learning_rate is None else learning_rate / norm**2
      yield Weight(_layers.name(path), norm, shares[path], rate)


def natural(path: Path) -> list[tuple[bool, int, str]]:
  """A key that sorts BatchNorm_2 before BatchNorm_10."""
  parts = re.split(r'(\d+)', _layers.name(path))
  return [
    (part.isdecimal(), int(part) if part.isdecimal() else 0, part)
    for part in parts
  ]
