"""Weights of other frameworks into Flax's layers and normkit's, and back.

Files and trees of weights hold arrays by name and nothing else. So the model
that receives them tells what each layer is, every array of both sides is
accounted for, and the options that no file holds (epsilon, momentum) come from
`batch_norm_options`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from normkit.tools import _frameworks, _layouts, _torch
from normkit.tools._back import to_equinox, to_haiku, to_keras
from normkit.tools._compare import compare
from normkit.tools._comparison import Cause, Compared, Comparison
from normkit.tools._frameworks import Source
from normkit.tools._layouts import TRANSPOSED, Shapes
from normkit.tools._names import Names, renamer, renamer_of, without_prefix
from normkit.tools._options import batch_norm_options
from normkit.tools._stacked import Scanned, unstacked
from normkit.tools._template import (
  Layout,
  Template,
  check_added,
  fill,
  matches,
  template_of,
  without,
)
from normkit.tools.files import load_arrays, save_arrays
from normkit.tools.matching import Matches, match

__all__ = [
  'Cause',
  'Compared',
  'Comparison',
  'Matches',
  'as_tensors',
  'batch_norm_options',
  'compare',
  'from_equinox',
  'from_haiku',
  'from_keras',
  'from_torch',
  'load_arrays',
  'match',
  'save_arrays',
  'to_equinox',
  'to_haiku',
  'to_keras',
  'to_torch',
]

Model: TypeAlias = Any


def from_torch(
  state: Mapping[str, Any],
  variables: Model,
  *,
  names: Names = None,
  flatten: Shapes | None = None,
  transposed: Sequence[str] = TRANSPOSED,
  inputs_first: Sequence[str] = (),
  scanned: Scanned = (),
  ignore: Sequence[str] = (),
  count: int | None = None,
  add_to_scale: Mapping[str, float] | None = None,
) -> Model:
  """Fills a Flax model with the arrays of a PyTorch state dict.

  Converted are linear layers, convolutions of any rank (grouped, depthwise,
  transposed), embeddings, and norms: batch, layer, RMS, gated, group, instance,
  global response (whose gamma and beta may have axes of one element), DyT and
  Derf. Any other parameter goes as it is to one of the same name and shape.
  Not converted are recurrent layers, which pack several kernels in one.

  Attention: a linear layer goes to a kernel with heads, (D, heads, head_dim) or
  (heads, head_dim, D). `MultiheadAttention`, and query, key and value one after
  the other in a layer called `qkv`, `in_proj`, `c_attn` and the like, go to
  Flax's `MultiHeadDotProductAttention` (nnx: `MultiHeadAttention`), or to
  layers of such names beside each other. Some names go without being given: to
  `out` goes what is called `out_proj`, `proj` or `c_proj` there.

  A linear layer that follows a flatten sees its inputs in another order where
  channels are last: `flatten={'fc1': (C, H, W)}` gives the shape before it.
  Flax pads a transposed convolution by its own rule: for PyTorch's padding p
  and kernel size k give `padding=((k - 1 - p, k - 1 - p), ...)`, and the
  output_padding in addition to the second. One in groups fills a kernel that is
  zero between groups, since Flax has none.

  Args:
    state: arrays by name: `model.state_dict()`, or what `load_arrays` gives;
      also a checkpoint that holds one, {'state_dict': {...}, 'epoch': 3}. The
      prefix that a wrapper gave to all names ('module.', 'model.') is dropped,
      unless `names` or the model here has it.
    variables: the model to fill: linen variables, of arrays or of
      `jax.ShapeDtypeStruct` as `jax.eval_shape` gives them, or an
      `nnx.Module`. It is not changed.
    names: where the layers go. None: 'a.b' to 'a/b'. A mapping of names or
      their beginnings, {'layer1.0': 'Block_0', 'layers.*': 'Layer_*'}, or of
      arrays, {'cls_token': 'embed/cls'}, where what is not named goes as with
      None; what `match` found; or a function of the name of a layer. 'order':
      the layers of each kind (batch norms, other norms, matrices, kernels by
      rank), in natural order of their names on both sides, go to each other;
      refused where names of layers of one shape differ in more than numbers.
    flatten: by the layer's path here, the (C, *spatial) flattened before it.
    transposed: patterns of the paths here that are transposed convolutions
      (with `transpose_kernel=False`), which no array tells; in an
      `nnx.Module` they are seen.
    inputs_first: patterns of the paths here whose matrices are (in, out) there,
      as those of `Conv1D` in Hugging Face's GPT-2, where PyTorch's linear
      layers have (out, in). Of a square one no array tells.
    scanned: the paths here of modules that `nn.scan` or `nnx.scan` runs, whose
      arrays have a first axis of layers (or a mapping to that axis). Each layer
      is one there, 'blocks.0.fc' to 'blocks/0/fc', of which the other options
      speak.
    ignore: patterns of names in `state` that are left out on purpose.
    count: the number of updates to store where a batch norm here counts them
      and the other framework did not.
    add_to_scale: by patterns of the paths here, what is added to the scales of
      those norms: the `scale_offset` of the norm there less the one here, which
      no array tells. {'*norm': 1.0} for Gemma's weights, which lie around zero,
      in norms whose scales lie around one; nothing where the norm here is made
      with `scale_offset=1.0`.

  Returns:
    The model filled, of the kind of `variables`: a tree of the same dicts
    and boxes (`nn.Partitioned`), or a new module. Arrays are placed where those
    of `variables` are, or as the sharding of a `jax.ShapeDtypeStruct` says.

  Raises:
    TypeError: if something is not an array of numbers, or not a model.
    ValueError: if an array is missing, left over, of the wrong shape, not to
      be held by the dtype here, or of integers where floats are held, or a
      variance is negative or NaN, all of them in one message; if two go to
      one place; or if a layer is of a kind that is not converted.

  Examples:
    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from flax import linen as nn
    >>> from normkit.tools import convert
    >>> model = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu])
    >>> x = jnp.ones((1, 5, 5, 2))
    >>> empty = jax.eval_shape(model.init, jax.random.key(0), x)
    >>> state = {'0.weight': np.ones((8, 2, 3, 3)), '0.bias': np.ones(8)}
    >>> variables = convert.from_torch(state, empty, names={'0': 'layers_0'})
    >>> variables['params']['layers_0']['kernel'].shape
    (3, 3, 2, 8)
  """
  template = unstacked(template_of(variables), scanned)
  shapes = _layouts.check_flatten(flatten, template)
  _layouts.check_inputs_first(inputs_first, template)
  layout = _layouts.channels_first(
    shapes, template.is_transposed(transposed), inputs_first
  )
  kept = without(_frameworks.unwrapped(state), ignore)
  sources = _frameworks.read_torch(kept)
  sources = without_prefix(sources, names, template)
  return _fill(template, sources, names, '.', layout, count, add_to_scale)


def to_torch(
  variables: Model,
  *,
  names: Names = None,
  flatten: Shapes | None = None,
  transposed: Sequence[str] = TRANSPOSED,
  inputs_first: Sequence[str] = (),
  scanned: Scanned = (),
  add_to_scale: Mapping[str, float] | None = None,
  like: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
  """Gives the arrays of a Flax model as a PyTorch state dict.

  The inverse of `from_torch`, given the same arguments. Without `like`, every
  kernel and scale becomes a `weight`, also one that is a `kernel` or a `gamma`
  in PyTorch, and has the dtype and the axes that it has here; what is in one
  array there, as query, key and value of `MultiheadAttention`, comes apart.
  Kernels with heads become matrices. Load it by
  `model.load_state_dict(convert.as_tensors(state))`.

  Args:
    variables: linen variables or an `nnx.Module`. It is not changed.
    names: None: 'a/b' to 'a.b'. The mapping that `from_torch` takes, of names
      there to paths here; or a function of the path here. With `like`, whatever
      `from_torch` takes.
    flatten: as in `from_torch`.
    transposed: as in `from_torch`.
    inputs_first: as in `from_torch`.
    scanned: as in `from_torch`.
    add_to_scale: as in `from_torch`, and is subtracted here.
    like: the state dict that the weights came from, or that of the model they
      go to: its names, shapes and dtypes are taken.

  Returns:
    NumPy arrays by name. `num_batches_tracked` is the count of a batch norm
    that has one, and 0 of another.

  Raises:
    TypeError: if `variables` is not a model, or holds no arrays.
    ValueError: if two layers get one name, a shape in `flatten` is wrong,
      `add_to_scale` matches no scale, or what is here does not fit `like`.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from normkit.tools import convert
    >>> model = nn.Sequential([nn.Dense(3), nn.relu])
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
    >>> state = convert.to_torch(variables, names={'0': 'layers_0'})
    >>> state['0.weight'].shape
    (3, 2)
  """
  template = unstacked(template_of(variables), scanned)
  shapes = _layouts.check_flatten(flatten, template)
  added = check_added(add_to_scale, template)
  is_transposed = template.is_transposed(transposed)
  _layouts.check_inputs_first(inputs_first, template)
  arrays = _torch.unfilled(template, is_transposed, shapes, added, inputs_first)
  if like is not None:
    sources = _frameworks.read_torch(_frameworks.unwrapped(like))
    sources = without_prefix(sources, names, template)
    rename = renamer_of(template, sources, names, '.')
    return _torch.alike(
      template, arrays, sources, rename, is_transposed, inputs_first
    )
  if isinstance(names, Mapping):
    names = {path: name for name, path in names.items()}
  return _torch.named(template, arrays, renamer(names, '/', '.'))


def as_tensors(arrays: Mapping[str, Any]) -> dict[str, Any]:
  """Gives arrays as tensors of PyTorch, on the CPU.

  Also those of bfloat16 and of float8, which `torch.from_numpy` refuses.

  Args:
    arrays: arrays by name, as `to_torch` and `load_arrays` give them.

  Returns:
    Tensors by name, of the same shapes, dtypes and bits, which share no memory
    with the arrays.

  Raises:
    ModuleNotFoundError: if PyTorch is not installed.
    TypeError: if one is no array of numbers.

  Examples:
    >>> import jax.numpy as jnp
    >>> from normkit.tools import convert
    >>> state = {'weight': jnp.ones((3, 2), jnp.bfloat16)}
    >>> try:
    ...   print(convert.as_tensors(state)['weight'].dtype)
    ... except ModuleNotFoundError:  # without PyTorch
    ...   print('torch.bfloat16')
    torch.bfloat16
  """
  return {name: _torch.tensor(name, value) for name, value in arrays.items()}


def from_keras(
  weights: Mapping[str, Any],
  variables: Model,
  *,
  names: Names = None,
  transposed: Sequence[str] = TRANSPOSED,
  ignore: Sequence[str] = (),
  count: int | None = None,
  add_to_scale: Mapping[str, float] | None = None,
) -> Model:
  """Fills a Flax model with the weights of a Keras 3 model.

  A layer's arrays have no names in a file of Keras 3, only an order (in a `.h5`
  file they have). They go to
  the leaves that the layer has here, in the order kernel (embedding, scale),
  bias, mean, var. A norm with one of scale and bias is refused, since no order
  tells gamma from beta: give its arrays by name,
  `{**weights, 'norm': {'beta': ..., 'moving_mean': ...}}`, or add the ones or
  zeros that are missing. Arrays of the optimizer and of random seeds are left
  out.

  Args:
    weights: what `load_arrays` gives of a `.keras`, `.weights.h5` or `.h5`
      file; or by layer
      lists of arrays, `{layer.name: layer.get_weights() for ...}`, or arrays
      by name, `{layer.name: {v.name: v for v in layer.weights} for ...}`.
    variables: the model to fill, as in `from_torch`. It is not changed.
    names: as in `from_torch`, of layers there such as 'dense_1', or
      'functional/dense_1' in a file where models are nested.
    transposed: as in `from_torch`.
    ignore: patterns of names in `weights` that are left out on purpose.
    count: as in `from_torch`.
    add_to_scale: as in `from_torch`.

  Returns:
    The model filled, of the kind of `variables`.

  Raises:
    TypeError: if something is not an array of numbers, or not a model.
    ValueError: as `from_torch` raises it.

  Examples:
    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from flax import linen as nn
    >>> from normkit.tools import convert
    >>> model = nn.Sequential([nn.Dense(3)])
    >>> empty = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2)))
    >>> weights = {'dense': [np.ones((2, 3)), np.ones(3)]}
    >>> variables = convert.from_keras(weights, empty, names='order')
    >>> variables['params']['layers_0']['bias'].shape
    (3,)
  """
  template = template_of(variables)
  layout = _layouts.keras(template.is_transposed(transposed))
  sources = _frameworks.read_keras(without(weights, ignore))
  return _fill(template, sources, names, '/', layout, count, add_to_scale)


def from_haiku(
  params: Mapping[str, Any],
  state: Mapping[str, Any] | None,
  variables: Model,
  *,
  names: Names = None,
  transposed: Sequence[str] = TRANSPOSED,
  ignore: Sequence[str] = (),
  add_to_scale: Mapping[str, float] | None = None,
) -> Model:
  """Fills a Flax model with the parameters and the state of a Haiku model.

  Of the averages of a batch norm the debiased one is taken, and the counter
  where a batch norm here counts.

  Args:
    params: the parameters, `{module: {name: array}}`.
    state: the state, or None.
    variables: the model to fill, as in `from_torch`. It is not changed.
    names: as in `from_torch`, of modules there such as 'net/~/conv_1'.
    transposed: as in `from_torch`.
    ignore: patterns of modules that are left out on purpose.
    add_to_scale: as in `from_torch`.

  Returns:
    The model filled, of the kind of `variables`.

  Raises:
    TypeError: if something is not an array of numbers, or not a model.
    ValueError: as `from_torch` raises it.

  Examples:
    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from flax import linen as nn
    >>> from normkit.tools import convert
    >>> model = nn.Sequential([nn.Dense(3)])
    >>> empty = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2)))
    >>> params = {'linear': {'w': np.ones((2, 3)), 'b': np.ones(3)}}
    >>> names = {'linear': 'layers_0'}
    >>> variables = convert.from_haiku(params, None, empty, names=names)
    >>> variables['params']['layers_0']['kernel'].shape
    (2, 3)
  """
  template = template_of(variables)
  layout = _layouts.haiku(template.is_transposed(transposed))
  kept = without(params, ignore), without(state or {}, ignore)
  sources = _frameworks.read_haiku(*kept)
  return _fill(template, sources, names, '/', layout, None, add_to_scale)


def from_equinox(
  model: Any,
  variables: Model,
  *,
  state: Any = None,
  names: Names = None,
  flatten: Shapes | None = None,
  ignore: Sequence[str] = (),
  count: int | None = None,
  add_to_scale: Mapping[str, float] | None = None,
) -> Model:
  """Fills a Flax model with the arrays of an Equinox module.

  Args:
    model: the module.
    variables: the model to fill, as in `from_torch`. It is not changed.
    state: the `equinox.nn.State` of a module with batch norms; of one with
      `mode='batch'` the debiased averages are taken.
    names: as in `from_torch`, of attributes there such as 'layers.0'.
    flatten: as in `from_torch`.
    ignore: patterns of arrays there, such as 'layers.0.weight', that are left
      out on purpose.
    count: as in `from_torch`.
    add_to_scale: as in `from_torch`.

  Returns:
    The model filled, of the kind of `variables`.

  Raises:
    TypeError: if something is not an array of numbers, or not a model.
    ValueError: as `from_torch` raises it; if the state is missing, or holds no
      statistics yet.

  Examples:
    >>> import equinox, jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from normkit.tools import convert
    >>> there = equinox.nn.Linear(2, 3, key=jax.random.key(0))
    >>> here = nn.Dense(3)
    >>> empty = jax.eval_shape(here.init, jax.random.key(0), jnp.ones((1, 2)))
    >>> variables = convert.from_equinox(there, empty)
    >>> variables['params']['kernel'].shape
    (2, 3)
  """
  template = template_of(variables)
  layout = _layouts.channels_first(_layouts.check_flatten(flatten, template))
  sources = _frameworks.read_equinox(model, state)
  sources = [s for s in sources if not matches(s.key, ignore)]
  return _fill(template, sources, names, '.', layout, count, add_to_scale)


def _fill(
  template: Template,
  sources: Sequence[Source],
  names: Names,
  separator: str,
  layout: Layout,
  count: int | None,
  add_to_scale: Mapping[str, float] | None,
) -> Model:
  added = check_added(add_to_scale, template)
  rename = renamer_of(template, sources, names, separator)
  return fill(template, sources, rename, layout, count, added)
