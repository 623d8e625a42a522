"""The way back: the weights of a Flax model as Keras, Haiku, Equinox hold them.

What lays an array out here is not inverted by hand. It is given numbers in
place of the elements, and where each comes to lie is where it is taken from.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from normkit.tools import _frameworks, _layouts
from normkit.tools._frameworks import Source
from normkit.tools._layouts import TRANSPOSED, Shapes
from normkit.tools._names import Names, renamer_of
from normkit.tools._template import (
  Layout,
  Leaf,
  Rename,
  Template,
  check_added,
  matches,
  placed,
  report,
  template_of,
  value_of,
  without,
)

Arrays = dict[str, np.ndarray]
# Updates after which no average remembers what it began with.
_MANY = 2**30


def to_keras(
  variables: Any,
  like: Mapping[str, Any],
  *,
  names: Names = None,
  transposed: Sequence[str] = TRANSPOSED,
  ignore: Sequence[str] = (),
  add_to_scale: Mapping[str, float] | None = None,
) -> dict[str, Any]:
  """Gives the arrays of a Flax model as the weights of a Keras 3 model.

  The inverse of `from_keras`, given the same arguments. Of lists by layer:
  `model.get_layer(name).set_weights(weights[name])`.

  Args:
    variables: linen variables or an `nnx.Module`. It is not changed.
    like: the weights that these came from, or those of the model that they go
      to, in any form that `from_keras` takes: their names, shapes and dtypes
      are taken.
    names: as in `from_keras`.
    transposed: as in `from_keras`.
    ignore: patterns of names in `like`, whose arrays stay.
    add_to_scale: as in `from_keras`, and is subtracted here.

  Returns:
    NumPy arrays in the form of `like`.

  Raises:
    TypeError: if `variables` is not a model, or holds no arrays.
    ValueError: if an array is missing, left over, of another shape, or not to
      be held by the dtype there, all of them in one message.

  Examples:
    >>> import jax.numpy as jnp, numpy as np
    >>> from normkit.tools import convert
    >>> dense = {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)}
    >>> variables = {'params': {'dense': dense}}
    >>> like = {'dense': [np.zeros((2, 3)), np.zeros(3)]}
    >>> weights = convert.to_keras(variables, like)
    >>> weights['dense'][1].tolist()
    [1.0, 1.0, 1.0]
  """
  template = template_of(variables)
  layout = _layouts.keras(template.is_transposed(transposed))
  sources = _frameworks.read_keras(without(like, ignore))
  found = _given(template, sources, names, '/', layout, add_to_scale)

  def array(key: str, value: Any) -> np.ndarray:
    return found.get(key, np.asarray(value))

  def layer(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
      return {k: array(f'{name}/{k}', v) for k, v in value.items()}
    if isinstance(value, list | tuple):
      return [array(f'{name}[{i}]', v) for i, v in enumerate(value)]
    return array(name, value)

  return {name: layer(name, value) for name, value in like.items()}


def to_haiku(
  variables: Any,
  like: tuple[Mapping[str, Any], Mapping[str, Any] | None],
  *,
  names: Names = None,
  transposed: Sequence[str] = TRANSPOSED,
  ignore: Sequence[str] = (),
  add_to_scale: Mapping[str, float] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Gives the arrays of a Flax model as parameters and state of a Haiku model.

  The inverse of `from_haiku`, given the same arguments. An average of a batch
  norm that is not that of `like` counts as that of very many updates, so that
  training goes on from it.

  Args:
    variables: linen variables or an `nnx.Module`. It is not changed.
    like: the parameters and the state that these came from, or those of the
      model that they go to, `net.init(...)`; or their shapes.
    names: as in `from_haiku`.
    transposed: as in `from_haiku`.
    ignore: patterns of modules in `like`, whose arrays stay.
    add_to_scale: as in `from_haiku`, and is subtracted here.

  Returns:
    `(params, state)`, NumPy arrays by module and name.

  Raises:
    TypeError, ValueError: as `to_keras` does.

  Examples:
    >>> import jax.numpy as jnp, numpy as np
    >>> from normkit.tools import convert
    >>> dense = {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)}
    >>> variables = {'params': {'linear': dense}}
    >>> like = {'linear': {'w': np.zeros((2, 3)), 'b': np.zeros(3)}}, {}
    >>> params, state = convert.to_haiku(variables, like)
    >>> params['linear']['b'].tolist()
    [1.0, 1.0, 1.0]
  """
  template = template_of(variables)
  layout = _layouts.haiku(template.is_transposed(transposed))
  params, state = (jax.tree.map(_zeros_of, dict(t or {})) for t in like)
  kept = (without(tree, ignore) for tree in (params, state))
  sources = _frameworks.read_haiku(*kept)
  found = _given(template, sources, names, '/', layout, add_to_scale)

  def module(path: str, held: Mapping[str, Any]) -> dict[str, Any]:
    new = {n: found.get(f'{path}/{n}', np.asarray(a)) for n, a in held.items()}
    if 'hidden' in held and not np.array_equal(new['average'], held['average']):
      new['hidden'] = new['average']
      new['counter'] = np.full_like(new['counter'], _MANY)
    return new

  return (
    {path: module(path, held) for path, held in params.items()},
    {path: module(path, held) for path, held in state.items()},
  )


def to_equinox(
  variables: Any,
  like: Any,
  *,
  state: Any = None,
  names: Names = None,
  flatten: Shapes | None = None,
  ignore: Sequence[str] = (),
  add_to_scale: Mapping[str, float] | None = None,
) -> tuple[Any, Any]:
  """Gives the arrays of a Flax model as an Equinox module and its state.

  The inverse of `from_equinox`, given the same arguments. Statistics of a batch
  norm that are not those of `state` count as those of very many updates, so
  that training goes on from them.

  Args:
    variables: linen variables or an `nnx.Module`. It is not changed.
    like: the module that these came from, or the one that they go to.
    state: its `equinox.nn.State`, if it has batch norms.
    names: as in `from_equinox`.
    flatten: as in `from_equinox`.
    ignore: patterns of arrays in `like`, which stay.
    add_to_scale: as in `from_equinox`, and is subtracted here.

  Returns:
    `(model, state)`, the second None where `state` is.

  Raises:
    TypeError, ValueError: as `to_keras` does; if the state is missing.

  Examples:
    >>> import equinox, jax, jax.numpy as jnp
    >>> from normkit.tools import convert
    >>> like = equinox.nn.Linear(2, 3, key=jax.random.key(0))
    >>> params = {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)}
    >>> linear, _ = convert.to_equinox({'params': params}, like)
    >>> linear.weight.shape
    (3, 2)
  """
  template = template_of(variables)
  layout = _layouts.channels_first(_layouts.check_flatten(flatten, template))
  sources = _frameworks.read_equinox(like, state, is_trained=False)
  sources = [s for s in sources if not matches(s.key, ignore)]
  found = _given(template, sources, names, '.', layout, add_to_scale)
  return _frameworks.write_equinox(like, state, found, _MANY)


def _zeros_of(value: Any) -> Any:
  """An array for a shape."""
  if isinstance(value, jax.ShapeDtypeStruct):
    return np.zeros(value.shape, value.dtype)
  return value


def _given(
  template: Template,
  sources: Sequence[Source],
  names: Names,
  separator: str,
  layout: Layout,
  add_to_scale: Mapping[str, float] | None,
) -> Arrays:
  added = check_added(add_to_scale, template)
  rename = renamer_of(template, sources, names, separator)
  return unfilled(template, sources, rename, layout, added)


def unfilled(
  template: Template,
  sources: Sequence[Source],
  rename: Rename,
  layout: Layout,
  added: Mapping[str, float],
) -> Arrays:
  """The arrays here by the keys of the sources; raises unless all fit.

  Counts are left to whoever asks.
  """
  found: Arrays = {}
  faults: list[str] = []
  left = {leaf for leaf in template.leaves if leaf[1] != 'count'}
  for source in sources:
    if source.leaf == 'count':
      continue
    size, shape = source.value.size, source.value.shape
    numbers = np.arange(1, size + 1).reshape(shape)
    numbered = dataclasses.replace(source, value=numbers)
    parts = placed(numbered, rename(source), template, layout)
    left -= {leaf for leaf, _ in parts}
    if wrong := _misplaced(source, parts, template):
      faults += wrong
      continue
    values = [value_of(leaf, template, added) for leaf, _ in parts]
    array = np.zeros(size, np.result_type(*values))
    for (_, places), value in zip(parts, values, strict=True):
      array[places[places > 0] - 1] = value[places > 0]
    faults += _lost(source, array)
    with np.errstate(over='ignore'):
      found[source.key] = array.astype(source.value.dtype).reshape(shape)
  faults += [f'extra: {"/".join(leaf)!r}' for leaf in left]
  if faults:
    raise ValueError(report(faults))
  return found


def _misplaced(
  source: Source, parts: Sequence[tuple[Leaf, np.ndarray]], template: Template
) -> list[str]:
  """Why an array there is not made of leaves here."""
  faults = []
  for leaf, places in parts:
    name, there = '/'.join(leaf), f'{source.key!r} {source.value.shape}'
    if leaf not in template.leaves:
      faults.append(f'missing: {name!r}, for {there}')
    elif places.shape != template.shape(leaf):
      shape = template.shape(leaf)
      faults.append(f'shape: {name!r} {shape}, but {there} is {places.shape}')
  return faults


def _lost(source: Source, array: np.ndarray) -> list[str]:
  """What the dtype there cannot hold."""
  with np.errstate(over='ignore'):
    narrow = array.astype(source.value.dtype)
  if np.any(np.isfinite(array) & ~np.isfinite(narrow)):
    return [f'range: {source.key!r} {source.value.dtype} is too narrow']
  return []
