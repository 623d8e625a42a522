"""Layer and batch norm of the peers, as functions of float32 arrays.

Each takes x, (rows, features), and epsilon, and returns the normalized values
without scale and bias: layer norm of each row, batch norm of each column. The
libraries are imported when they are asked for; one that is not installed is
left out by name.
"""

from collections.abc import Callable
import importlib.util
from typing import Any

import flax.linen as nn
import jax
import numpy as np

Norm = Callable[[np.ndarray, float], Any]


def flax_norms(fast: bool) -> tuple[Norm, Norm]:
  plain = {
    'use_scale': False,
    'use_bias': False,
    'use_fast_variance': fast,
  }

  def layer(x, epsilon):
    return nn.LayerNorm(epsilon=epsilon, **plain).apply({}, x)

  def batch(x, epsilon):
    norm = nn.BatchNorm(use_running_average=False, epsilon=epsilon, **plain)
    variables = norm.init(jax.random.key(0), x)
    return norm.apply(variables, x, mutable=['batch_stats'])[0]

  return layer, batch


def haiku_norms() -> tuple[Norm, Norm]:
  import haiku as hk

  def run(function, x):
    transformed = hk.transform_with_state(function)
    params, state = transformed.init(None, x)
    return transformed.apply(params, state, None, x)[0]

  def layer(x, epsilon):
    return run(lambda x: hk.LayerNorm(-1, False, False, epsilon)(x), x)

  def batch(x, epsilon):
    return run(
      lambda x: hk.BatchNorm(False, False, 0.9, epsilon)(x, is_training=True), x
    )

  return layer, batch


def equinox_norms() -> tuple[Norm, Norm]:
  import equinox as eqx

  def layer(x, epsilon):
    norm = eqx.nn.LayerNorm(
      x.shape[-1], eps=epsilon, use_weight=False, use_bias=False
    )
    return jax.vmap(norm)(x)

  def batch(x, epsilon):
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
      x.shape[-1], 'batch', epsilon, channelwise_affine=False, mode='batch'
    )
    apply = jax.vmap(
      norm, axis_name='batch', in_axes=(0, None), out_axes=(0, None)
    )
    return apply(x, state)[0]

  return layer, batch


def torch_norms() -> tuple[Norm, Norm]:
  import torch
  from torch.nn import functional

  def layer(x, epsilon):
    x = torch.from_numpy(np.asarray(x))
    return functional.layer_norm(x, x.shape[-1:], eps=epsilon).numpy()

  def batch(x, epsilon):
    x = torch.from_numpy(np.asarray(x))
    return functional.batch_norm(
      x, None, None, training=True, eps=epsilon
    ).numpy()

  return layer, batch


def available() -> dict[str, tuple[Norm, Norm]]:
  """(layer norm, batch norm) of each peer that is installed."""
  norms = {
    'flax': flax_norms(True),
    'flax slow': flax_norms(False),
  }
  optional = {
    'haiku': haiku_norms,
    'equinox': equinox_norms,
    'torch': torch_norms,
  }
  for name, make in optional.items():
    if importlib.util.find_spec(name):
      norms[name] = make()
    else:
      print(f'{name} is not installed and is left out')
  return norms
