"""How the arrays of each framework come to lie as Flax has them."""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import TypeAlias

import numpy as np

from normkit.tools import _frameworks
from normkit.tools._template import Layout, Template, matched, matches

Shapes: TypeAlias = Mapping[str, Sequence[int]]

TRANSPOSED = ('*ConvTranspose*',)


def channels_first(
  shapes: Mapping[str, tuple[int, ...]],
  is_transposed: Callable[[str], bool] = lambda layer: False,
  inputs_first: Sequence[str] = (),
) -> Layout:
  """The layout of PyTorch, and without transposed ones of Equinox."""

  def layout(
    layer: str, leaf: str, value: np.ndarray, shape: tuple[int, ...]
  ) -> np.ndarray:
    if leaf == 'scale' and len(shape) > 1:
      if value.ndim == 1 and value.size == math.prod(shape):
        return value.reshape(shape)  # all heads together, flat there
      if value.shape == shape and len(set(shape)) == len(shape):
        return value  # in another order it would have another shape
      raise ValueError(
        f'{layer!r} is a norm over several axes, {shape}, and no file tells '
        f'which of them those of {value.shape} are. Leave it out by ignore, '
        'and put it in by hand.'
      )
    if leaf != 'kernel' or value.ndim < 2:
      return value
    if value.ndim > 2 and is_transposed(layer):
      return _frameworks.from_torch_transposed(value, shape)
    if value.ndim > 2 or not matches(layer, inputs_first):
      value = _frameworks.from_oihw(value)
    if _frameworks.without_ones(value.shape) == _frameworks.without_ones(shape):
      value = value.reshape(shape)  # of windows of one place
    if layer in shapes and value.shape == shape:
      return _frameworks.from_flat(value, shapes[layer])
    return value

  return layout


def keras(is_transposed: Callable[[str], bool]) -> Layout:
  """The layout of Keras."""

  def layout(
    layer: str, leaf: str, value: np.ndarray, shape: tuple[int, ...]
  ) -> np.ndarray:
    if leaf != 'kernel' or value.ndim < 3:
      return value
    if is_transposed(layer):
      return _frameworks.flipped(value.swapaxes(-2, -1))
    return _frameworks.from_depthwise(value, shape)

  return layout


def haiku(is_transposed: Callable[[str], bool]) -> Layout:
  """The layout of Haiku."""

  def layout(
    layer: str, leaf: str, value: np.ndarray, shape: tuple[int, ...]
  ) -> np.ndarray:
    del shape
    if leaf == 'kernel' and value.ndim > 2 and is_transposed(layer):
      return value.swapaxes(-2, -1)
    return value

  return layout


def check_inputs_first(patterns: Sequence[str], template: Template) -> None:
  """Raises for a pattern that matches no layer with a kernel."""
  matches('', patterns)
  for pattern in patterns:
    matched(pattern, 'kernel', template, 'inputs_first')


def check_flatten(
  flatten: Shapes | None, template: Template
) -> dict[str, tuple[int, ...]]:
  """Returns shapes by layer; raises where one is not that of its inputs."""
  shapes = {name: tuple(shape) for name, shape in (flatten or {}).items()}
  for layer, shape in shapes.items():
    if (layer, 'kernel') not in template.leaves:
      raise ValueError(
        f'flatten names {layer!r}, which has no kernel. Give the path of a '
        'dense layer of the model to fill.'
      )
    inputs, *_ = template.shape((layer, 'kernel'))
    if math.prod(shape) != inputs:
      raise ValueError(
        f'flatten gives {layer!r} the shape {shape}, of {math.prod(shape)} '
        f'elements, but it has {inputs} inputs. Give (C, *spatial).'
      )
  return shapes
