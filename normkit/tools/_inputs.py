"""Inputs of models for the command line: shapes, and arrays from files."""

import argparse
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from normkit.tools import files


def parse_shape(text: str) -> tuple[int, ...]:
  """A shape of an example, its sizes with an x between them."""
  try:
    shape = tuple(map(int, text.split('x')))
  except ValueError:
    shape = ()
  if not shape or min(shape) < 1 or math.prod(shape) > 2**31:
    raise argparse.ArgumentTypeError(f'{text!r} is no shape, such as 1x32x32x3')
  return shape


def parse(text: str) -> jax.ShapeDtypeStruct:
  """A shape, and after a colon a dtype other than float32."""
  shape, colon, name = text.partition(':')
  try:
    dtype = jnp.dtype(name if colon else 'float32')
    if not jnp.issubdtype(dtype, jnp.number):
      raise TypeError
    return jax.ShapeDtypeStruct(parse_shape(shape), dtype)
  except TypeError as error:
    raise argparse.ArgumentTypeError(
      f'{text!r}: {name!r} is no dtype of numbers, such as int32'
    ) from error


def drawn(x: jax.ShapeDtypeStruct) -> Any:
  """Inputs at random; integers are 0 or 1, which all tables have."""
  key = jax.random.key(0)
  if jnp.issubdtype(x.dtype, jnp.integer):
    return jax.random.randint(key, x.shape, 0, 2, x.dtype)
  return jax.random.normal(key, x.shape, x.dtype)


def batches(path: pathlib.Path, x: jax.ShapeDtypeStruct) -> list[Any]:
  """The data of a file, in batches like x; the rest is left out."""
  shape = x.shape
  arrays = files.load_arrays(path)
  if not arrays:
    raise ValueError(f'{str(path)!r} holds no array.')
  names = [n for n in ('images', 'x', *arrays) if n in arrays]
  if len(arrays) > 1 and names[0] not in ('images', 'x'):
    raise ValueError(
      f"{str(path)!r} holds {', '.join(arrays)}: name the inputs 'images' or "
      "'x'."
    )
  data: Any = arrays[names[0]]
  if jnp.issubdtype(x.dtype, jnp.integer) and data.dtype.kind not in 'biu':
    raise ValueError(
      f'{str(path)!r} holds {names[0]} of {data.dtype}, where --input asks for '
      f'{x.dtype}.'
    )
  data = jnp.asarray(data, x.dtype)
  size = shape[0]
  if data.shape[1:] != shape[1:] or len(data) < size:
    raise ValueError(
      f'{str(path)!r} holds {names[0]} of shape {data.shape}, where --input '
      f'{"x".join(map(str, shape))} needs {size} or more of {shape[1:]}.'
    )
  whole = len(data) // size * size
  return list(data[:whole].reshape(-1, *shape))
