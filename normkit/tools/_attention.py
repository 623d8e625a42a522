"""Attention: kernels with heads, and projections that share an array."""

from collections.abc import Collection, Mapping
import math
from typing import Any

import numpy as np

# What the projections are called, Flax's names first.
_ROLES = (
  ('query', 'q_proj', 'query_proj', 'query_dense', 'q', 'to_q', 'wq'),
  ('key', 'k_proj', 'key_proj', 'key_dense', 'k', 'to_k', 'wk'),
  ('value', 'v_proj', 'value_proj', 'value_dense', 'v', 'to_v', 'wv'),
)
_OUT = (
  *('out', 'out_proj', 'output_proj', 'proj', 'c_proj', 'o_proj', 'linear'),
  *('output_dense', 'attention_output'),
)
# Those that hold query, key and value one after the other. In others, such as
# the `query_key_value` of GPT-NeoX, each head has its three, which no file
# tells.
_FUSED = ('in_proj', 'qkv', 'qkv_proj', 'Wqkv', 'to_qkv', 'c_attn')
_INWARD = frozenset(name for role in _ROLES for name in role) | {*_FUSED}


def heads(leaves: Mapping[tuple[str, str], Any]) -> dict[str, int]:
  """The layers whose kernels have heads: how many axes are of inputs.

  A bias of several axes tells; without one the name, if a layer beside it takes
  the heads back. Of that layer, one beside it that makes them tells.
  """
  shapes = {leaf: tuple(array.shape) for leaf, array in leaves.items()}
  kernels = {
    layer: shape
    for (layer, leaf), shape in shapes.items()
    if leaf == 'kernel' and len(shape) > 2
  }
  found = {}
  named = {}
  for layer, shape in kernels.items():
    bias = shapes.get((layer, 'bias'))
    if bias is None and layer.rpartition('/')[2] in _INWARD:
      named[layer] = shape
    elif bias and 1 < len(bias) < len(shape) and shape[-len(bias) :] == bias:
      found[layer] = len(shape) - len(bias)
  taken = {
    (_parent(layer), shape[:-1])
    for layer, shape in kernels.items()
    if layer not in named
  }
  whole = {
    _parent(layer)
    for layer, shape in named.items()
    if (_parent(layer), shape[-2:]) in taken
  }
  found |= {layer: 1 for layer in named if _parent(layer) in whole}
  made = {(_parent(layer), kernels[layer][-2:]) for layer in found}
  for layer, shape in kernels.items():
    if (_parent(layer), shape[:-1]) in made:
      found.setdefault(layer, len(shape) - 1)
  return found


def _parent(layer: str) -> str:
  return layer.rpartition('/')[0]


def matrix(shape: tuple[int, ...], inputs: int) -> tuple[int, int]:
  """The shape (in, out) of a kernel whose first axes are of inputs."""
  return math.prod(shape[:inputs]), math.prod(shape[inputs:])


def with_heads(
  leaf: str, value: np.ndarray, shape: tuple[int, ...], inputs: int
) -> np.ndarray:
  """A matrix or a bias with the axes of heads, where it fits."""
  if leaf == 'kernel' and value.shape == matrix(shape, inputs):
    return value.reshape(shape)
  if leaf == 'bias' and value.shape == (math.prod(shape),):
    return value.reshape(shape)
  return value


def without_heads(leaf: str, value: np.ndarray, inputs: int) -> np.ndarray:
  """The inverse of `with_heads`."""
  if leaf == 'kernel':
    return value.reshape(matrix(value.shape, inputs))
  return value.reshape(-1) if leaf == 'bias' else value


def targets(layer: str, layers: Collection[str]) -> tuple[str, ...]:
  """Where the arrays for a layer go: to it, or to what an attention has.

  Three where query, key and value are one array there and not here, and one
  where a projection has another of its usual names.
  """
  if layer in layers:
    return (layer,)
  parent, _, last = layer.rpartition('/')
  if both := projections(layer, layers):
    return both
  inward = projections(parent, layers)
  if not inward:
    return (layer,)
  if last in _FUSED:
    return inward
  for names, here in zip(_ROLES, inward, strict=True):
    if last in names:
      return (here,)
  outward = [path for name in _OUT if (path := _join(parent, name)) in layers]
  return (outward[0],) if last in _OUT and outward else (layer,)


def is_fused(name: str) -> bool:
  """Whether a layer of that name has query, key and value in turn."""
  return name in _FUSED


def projections(
  parent: str, layers: Collection[str], separator: str = '/'
) -> tuple[str, ...]:
  """The layers of query, key and value in an attention, or none."""
  found = [
    [
      path
      for name in names
      if (path := _join(parent, name, separator)) in layers
    ]
    for names in _ROLES
  ]
  return tuple(paths[0] for paths in found) if all(found) else ()


def _join(parent: str, name: str, separator: str = '/') -> str:
  return f'{parent}{separator}{name}' if parent else name
