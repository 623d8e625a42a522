"""What is gathered of a layer while the model runs."""

import math
from typing import Any

from jax import lax
import jax.numpy as jnp

from normkit import _types
from normkit._types import Array
from normkit.centred import Centred
from normkit.pooling import merge, pool_sum
from normkit.tools._advice import SATURATED
from normkit.tools._layers import Call, Stats, Watch


def _init(mean: Array) -> Stats:
  dtype = _types.statistics_dtype(mean.dtype)
  real = jnp.zeros(mean.shape, _types.real_dtype(dtype))
  moments = dict.fromkeys(('pivot', 'offset'), jnp.zeros(mean.shape, dtype))
  sums = dict.fromkeys(('var', 'count', 'positive', 'saturated'), real)
  least = ('elements', 'examples', 'evaluated')
  fewest = dict.fromkeys(least, real + jnp.inf)
  told = dict.fromkeys(('epsilon', 'momentum', 'debias', 'scale_offset'), real)
  return {**moments, **sums, **fewest, **told}


def _update(seen: Stats, call: Call) -> Stats:
  """Merges the moments of a layer's input, and counts its outputs."""
  new, layer = call.moments(), call.layer
  before = Centred(*(seen[name] for name in Centred._fields))
  stacked = (jnp.stack(pair) for pair in zip(before, new, strict=True))
  merged = merge(Centred(*stacked), 0)
  y = jnp.real(call.y)
  elements = jnp.where(new.count > 0, new.count, jnp.inf)
  examples = jnp.where(new.count > 0, _examples(call), jnp.inf)
  options = {
    'epsilon': getattr(layer, 'epsilon', math.nan),
    'momentum': _momentum(layer),
    'debias': float(getattr(layer, 'debias', False)),
    'scale_offset': getattr(layer, 'scale_offset', 0.0),
  }
  return {
    **{name: s[0] for name, s in merged._asdict().items()},
    **{n: jnp.full_like(seen[n], value) for n, value in options.items()},
    'positive': seen['positive'] + _number_of(y > 0, call),
    'saturated': seen['saturated'] + _number_of(jnp.abs(y) > SATURATED, call),
    'elements': jnp.minimum(seen['elements'], elements),
    'examples': jnp.minimum(seen['examples'], examples),
    'evaluated': jnp.minimum(seen['evaluated'], float(call.evaluates)),
  }


WATCH = Watch('inspect', _init, _update)


def _number_of(chosen: Array, call: Call) -> Array:
  """How many outputs of each channel are chosen, over all devices."""
  where = call.where()
  chosen = chosen if where is None else chosen & where
  layer = call.layer
  number = jnp.sum(chosen, call.reduced(), dtype=jnp.float32)
  number = pool_sum(number, layer.axis_name, layer.axis_index_groups)
  total: Array = number.reshape(call.shape)
  return total


def _momentum(layer: Any) -> float:
  momentum = getattr(layer, 'momentum', None)
  return math.nan if momentum is None else momentum


def _examples(call: Call) -> int:
  """How many examples one call normalizes together: sizes of the first axis."""
  layer = call.layer
  examples = math.prod(call.x.shape[axis] for axis in call.reduced()[:1])
  if layer.axis_index_groups is not None:
    return examples * len(layer.axis_index_groups[0])
  if layer.axis_name is not None:
    return examples * lax.axis_size(layer.axis_name)
  return examples
