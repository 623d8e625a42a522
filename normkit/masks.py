"""Which parameters decay: masks of trees, for `optax.adamw(mask=...)`."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import jax
from jax.tree_util import GetAttrKey
import numpy as np

from normkit.norm import NormParams
from normkit.norms._evonorm import EvoNormParams
from normkit.norms.derf import DerfParams
from normkit.norms.dyt import DyTParams
from normkit.norms.response import FilterResponseParams

Tree: TypeAlias = Any
Decays: TypeAlias = Callable[[str, Any], bool | None]

_SCALES = frozenset({'scale', 'scales', 'gain', 'gains'})
_BIASES = frozenset({'bias', 'offset'})
_NORMS = (
  NormParams,
  DerfParams,
  DyTParams,
  EvoNormParams,
  FilterResponseParams,
)
# What a norm has beside its scale and bias.
_OTHERS = frozenset({'alpha', 'shift', 'v', 'threshold'})


def decay_mask(params: Tree, where: Decays | None = None) -> Tree:
  """Says of each parameter whether weight decay is for it.

  Decay keeps kernels small. The scale of a norm it would draw to zero, and with
  it all that the norm lets through; a bias it has no reason to draw anywhere. A
  leaf does not decay if it is

  1. inside `NormParams` or the like, at any depth of the tree, of any rank;
  2. a scalar or a vector, whatever its name;
  3. of rank two or more, a `scale` (or `gain`), `bias` or `offset`, and so are
     all leaves of its dictionary: what lies there is a norm, or a bias alone;
  4. of rank two or more, a `bias` (or `offset`, `..._bias`), and a leaf of
     higher rank in its dictionary has its axes, in order, among its own: the
     outputs of that weight, such as the (8, 64) of a (512, 8, 64) kernel.

  All else decays: kernels, embeddings, and arrays that are no one's norm or
  bias. So (3) and (4) serve norms over several axes, attention, and layers
  stacked by `vmap` or `scan`.

  The name of a leaf is the last string on its path, behind its last '/';
  dictionaries, attributes and NamedTuple fields count alike, and the boxes of
  Flax (`nnx.Variable`, `linen.Partitioned`) not at all.

  The limits, where `where` is needed: a norm of rank two or more by other names
  (`weight`, `gamma`) decays, as does a scale beside a kernel, or a stack of
  vectors without the weight they go with; a rank-two table alone under the name
  of `bias` or `scale`, as some relative positions are, does not decay.

  Args:
    params: a pytree of parameters, arrays or their shapes: of linen, nnx
      (`nnx.state(model, nnx.Param)`, or pure), `NormParams`, or all of them.
    where: `where(path, leaf)` is asked first, by a path such as
      'Dense_0/kernel': True decays, False does not, None leaves it to the rule.

  Returns:
    A tree like `params` of booleans, True where the parameter decays.

  Raises:
    TypeError: if `where` is not a function, or returns anything else.

  References:
    He, Zhang, Zhang, Zhang, Xie and Li, "Bag of Tricks for Image Classification
    with Convolutional Neural Networks" (2019), section 3.1.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> from normkit.masks import decay_mask
    >>> params = {
    ...   'query': {'kernel': jnp.ones((6, 2, 3)), 'bias': jnp.ones((2, 3))},
    ...   'norm': nk.NormParams(scale=jnp.ones((2, 3))),
    ... }
    >>> decay_mask(params)['query']
    {'bias': False, 'kernel': True}
    >>> decay_mask(params)['norm']
    NormParams(scale=False, bias=None)

    In an optimizer, beside the clipping that NF-nets train with, which is for
    all parameters (it knows vectors from kernels by their rank):

    >>> import optax
    >>> optimizer = optax.chain(
    ...   optax.adaptive_grad_clip(0.01),
    ...   optax.adamw(1e-3, weight_decay=0.1, mask=decay_mask),
    ... )
    >>> state = optimizer.init(params)
  """
  if where is not None and not callable(where):
    raise TypeError(
      f'where must be a function of a path and a leaf, got {where!r:.60}. For '
      "example where=lambda path, leaf: True if 'table' in path else None."
    )
  is_norm = jax.tree.map(
    lambda node: jax.tree.map(lambda _: isinstance(node, _NORMS), node),
    params,
    is_leaf=lambda node: isinstance(node, _NORMS),
  )
  groups: dict[Hashable, list[tuple[str, tuple[int, ...]]]] = {}
  for path, leaf in jax.tree.leaves_with_path(params):
    place = _place(path)
    group = groups.setdefault(place[:-1], [])
    group.append((_name(place), np.shape(leaf)))

  def decays(path: Any, leaf: Any, is_norm: bool) -> bool:
    place = _place(path)
    said = None if where is None else _ask(where, place, leaf)
    if said is not None:
      return said
    shape, group = np.shape(leaf), groups[place[:-1]]
    return not (is_norm or _is_outside(_name(place), shape, group))

  return jax.tree.map_with_path(decays, params, is_norm)


def _is_outside(
  name: str, shape: tuple[int, ...], group: Sequence[tuple[str, Any]]
) -> bool:
  """Whether a leaf is a vector, of a norm, or a bias, by those beside it."""
  names = {n for n, _ in group}
  known = _SCALES | _BIASES
  if len(shape) < 2 or (names & known and names <= known | _OTHERS):
    return True
  is_bias = name in _BIASES or name.endswith('_bias')
  return is_bias and any(_has_features(weight, shape) for _, weight in group)


def _has_features(weight: tuple[int, ...], shape: tuple[int, ...]) -> bool:
  """Whether the axes of `shape` are among those of a weight, in order."""
  axes = iter(weight)
  return len(weight) > len(shape) and all(size in axes for size in shape)


def _ask(where: Decays, place: tuple[Any, ...], leaf: Any) -> bool | None:
  path = jax.tree_util.keystr(place, simple=True, separator='/')
  said = where(path, leaf)
  if said is not None and not isinstance(said, (bool, np.bool_)):
    raise TypeError(
      f'where must return True, False or None, got {said!r:.60} for the path '
      f'{path!r}. Give a bool: the mask is static.'
    )
  return None if said is None else bool(said)


def _place(path: tuple[Any, ...]) -> tuple[Any, ...]:
  """The path of a leaf, without the box that Flax may hold it in."""
  return (
    path[:-1] if len(path) > 1 and path[-1] == GetAttrKey('value') else path
  )


def _name(place: tuple[Any, ...]) -> str:
  """The last string on a path, behind its last '/'."""
  keys = (getattr(k, 'key', getattr(k, 'name', None)) for k in place)
  names = [key for key in keys if isinstance(key, str)]
  return names[-1].rpartition('/')[2] if names else ''
