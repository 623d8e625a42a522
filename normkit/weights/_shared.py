"""What norms of weights share: options, chosen weights, lengths and axes."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from normkit import _types
from normkit._types import Array, Axes, DType, Scalar
from normkit.centred import square
from normkit.kernels.rows import reciprocal_root

Tree: TypeAlias = Any
Where: TypeAlias = Callable[[str, Any], bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """The options of all transforms, checked when the transform is made."""

  epsilon: Scalar | None = None
  param_dtype: DType = jnp.float32
  dtype: DType | None = None
  where: Where | None = None

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value, check = getattr(self, field.name), _FIELD_CHECKS.get(field.name)
      if check and (value is not None or field.default is not None):
        object.__setattr__(self, field.name, check(value))


def unit(
  x: Array, epsilon: Scalar, axes: tuple[int, ...] | None = None
) -> Array:
  """x over its length along the axes; None means all."""
  squared = jnp.sum(square(x), axes, keepdims=True)
  return x * reciprocal_root(squared, epsilon)


def check_features(feature_axes: Axes | None, ndim: int) -> tuple[int, ...]:
  """Returns the axes that have norms of their own, counted from zero."""
  if feature_axes is None:
    return ()
  return _types.check_axes(feature_axes, ndim, 'feature_axes')


def features_of(weight: Any, feature_axes: Axes | None) -> tuple[int, ...]:
  """The feature axes of a weight, an array or its shape, both checked."""
  _types.check_dtype(weight.dtype, 'weight')
  return check_features(feature_axes, len(weight.shape))


def choose(where: Where | None, weights: Tree) -> Tree:
  """A tree like the weights of booleans: which are normalized."""

  def choose(path: Any, weight: Any) -> bool:
    if where is None:
      return np.ndim(weight) > 1 and jnp.issubdtype(weight.dtype, jnp.inexact)
    return bool(where(_name(path), weight))

  chosen = jax.tree.map_with_path(choose, weights)
  if not any(jax.tree.leaves(chosen)):
    paths = [_name(path) for path, _ in jax.tree.leaves_with_path(weights)]
    raise ValueError(
      f'where={where} chooses none of the weights, whose paths are '
      f'{paths!s:.200}. Give where=lambda path, weight: ..., True for the '
      'weights to normalize; None chooses those of rank two or more.'
    )
  return chosen


def _name(path: Any) -> str:
  """A path as 'Dense_0/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def map_chosen(
  function: Callable[..., Any], chosen: Tree, weights: Tree, *others: Tree
) -> Tree:
  """Maps the chosen weights, with what `others` hold beside; None elsewhere."""

  def mapped(path: Any, is_chosen: bool, *leaves: Any) -> Any:
    with note_path(_name(path)):
      return function(*leaves) if is_chosen else None

  return jax.tree.map_with_path(mapped, chosen, weights, *others)


def replace_chosen(chosen: Tree, weights: Tree, new: Tree) -> Tree:
  """The weights, with the chosen ones new."""
  return jax.tree.map(lambda c, w, n: n if c else w, chosen, weights, new)


def check_tree(tree: Tree, wanted: Tree, name: str) -> None:
  """Raises unless `tree` holds an array just where `wanted` is True."""
  structure: Any = jax.tree.structure(wanted)
  try:
    held = [leaf is not None for leaf in structure.flatten_up_to(tree)]
  except ValueError:
    held = None
  if held != jax.tree.leaves(wanted):
    form = jax.tree.map(lambda array: '*' if array else None, wanted)
    raise ValueError(
      f'{name} must be {form!s:.300}, an array at each *, got '
      f'{jax.tree.structure(tree)!s:.300}. Take it from init of this '
      'transform, for these weights.'
    )


def check_steps(n_steps: Any) -> int:
  """Returns the number of steps of the power iteration."""
  if not _types.is_integer(n_steps):
    raise TypeError(
      f'n_steps must be a Python integer, got {type(n_steps).__name__}: '
      f'{n_steps!r:.60}.'
    )
  if n_steps < 1:
    raise ValueError(
      f'n_steps must be 1 or more, got {n_steps}: sigma comes from the last '
      'step. To leave a weight as it is, do not normalize it.'
    )
  return int(n_steps)


def _check_where(where: Any) -> Where | None:
  if where is not None and not callable(where):
    raise TypeError(
      f'where must be a function of a path and a weight, got {where!r:.60}. '
      "For example where=lambda path, weight: 'kernel' in path."
    )
  checked: Where | None = where
  return checked


def _check_feature_axes(feature_axes: Any) -> Axes | None:
  """Returns the axes, hashable; None and an integer stay what they are."""
  if feature_axes is None or _types.is_integer(feature_axes):
    axes: Axes | None = feature_axes
    return axes
  return _types.as_axes(feature_axes, 'feature_axes')


_FIELD_CHECKS: dict[str, Callable[[Any], Any]] = {
  'epsilon': _types.check_epsilon,
  'param_dtype': lambda dtype: _types.check_dtype(dtype, 'param_dtype'),
  'dtype': _types.check_dtype,
  'where': _check_where,
  'feature_axes': _check_feature_axes,
  'n_steps': check_steps,
  'scaled': lambda flag: _types.check_flag(flag, 'scaled'),
  'use_gain': lambda flag: _types.check_flag(flag, 'use_gain'),
}


def is_matrix(weight: Any, only: bool) -> bool:
  """Whether a weight has singular values; `only` refuses a higher rank."""
  if only and len(weight.shape) > 2:
    raise ValueError(
      f'error_on_non_matrix=True, and a weight has shape {weight.shape}. Wrap '
      'a layer whose weights are matrices, or give False: then the leading '
      'axes are taken together.'
    )
  return len(weight.shape) > 1


def is_bias(path: str) -> bool:
  """Whether a parameter is no matrix, whatever its rank: a layer's bias.

  An attention layer stores that of its heads as (heads, features).
  """
  return path.rpartition('/')[-1] == 'bias'


def check_layer(layer: Any, module: type, example: str) -> None:
  """Raises unless `layer` is an instance of a class of modules."""
  if not isinstance(layer, module):
    raise TypeError(
      f'layer_instance must be a module, got {layer!r:.60}. Give the layer '
      f'itself, for example {example}.'
    )


@contextlib.contextmanager
def note_path(path: str) -> Iterator[None]:
  """Adds to an error which weight it is about."""
  try:
    yield
  except (TypeError, ValueError) as error:
    error.add_note(f'The path of this weight is {path!r}.')
    raise
