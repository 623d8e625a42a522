"""Checkpoints of Flax models as people have them: folders of orbax and files.

What a training run wrote holds more than the model, under names of its own:
`params/Conv_0/kernel` beside `opt_state/0/mu/Conv_0/kernel` and `step`.
"""

from collections.abc import Collection, Mapping, Sequence
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normkit.tools import files
from normkit.tools._extras import needed
from normkit.tools._template import Template

Arrays = Mapping[str, np.ndarray]

# What may lie above the layers of a model, beside its own collections.
_WRAPPERS = frozenset(
  {
    *('params', 'batch_stats', 'state', 'variables', 'model', 'default'),
    *('target', 'module', 'train_state', 'model_state', 'stats', '0', '1'),
  }
)
# What training keeps beside the layers, where they are bare.
_BESIDE = frozenset(
  {
    *('opt_state', 'optimizer', 'step', 'epoch', 'rng', 'rngs', 'key', 'keys'),
    *('loss_scale', 'metrics', 'ema', 'ema_params', 'config'),
  }
)
_KEYS = frozenset({'rng', 'rngs'})  # random keys, wherever they are
_STEP = re.compile(r'(?:.*\D)?(\d+)')


def load(path: pathlib.Path, step: int | None = None) -> Arrays:
  """The arrays of a file, or of a folder of orbax: see `read_folder`."""
  if path.is_dir():
    return read_folder(path, step)
  if step is not None:
    raise ValueError(f'{str(path)!r} is a file, which has no steps: no --step.')
  return files.load_arrays(path)


def read_folder(path: pathlib.Path, step: int | None = None) -> Arrays:
  """The arrays of a checkpoint of orbax, by their paths in it.

  A folder that holds one checkpoint for each step, as `CheckpointManager` and
  `flax.training.checkpoints` write them, gives the latest one, or `step`.
  """
  if items := _items(path):
    if step is not None:
      raise ValueError(f'{str(path)!r} is one checkpoint: no --step for it.')
    return _read_items(items)
  steps = {
    int(found[1]): child
    for child in sorted(path.iterdir())
    if (found := _STEP.fullmatch(child.name)) and _is_checkpoint(child)
  }
  if not steps:
    inside = sorted(child.name for child in path.iterdir())
    raise ValueError(
      f'{str(path)!r} is no checkpoint of orbax, and has none for a step: it '
      f'holds {inside!s:.200}. Give the folder with _METADATA in it, or that '
      'of a CheckpointManager.'
    )
  chosen = max(steps) if step is None else step
  if chosen not in steps:
    raise ValueError(
      f'{str(path)!r} has no step {step}. It has {sorted(steps)!s:.200}.'
    )
  child = steps[chosen]
  return _read_items(_items(child)) if child.is_dir() else load(child)


def _is_checkpoint(path: pathlib.Path) -> bool:
  return path.is_file() or bool(_items(path))


def _items(path: pathlib.Path) -> dict[str, pathlib.Path]:
  """The trees of a checkpoint by name: '' where it is one."""
  if not path.is_dir():
    return {}
  if (path / '_METADATA').is_file():
    return {'': path}
  return {
    child.name: child
    for child in sorted(path.iterdir())
    if (child / '_METADATA').is_file()
  }


def _read_items(items: Mapping[str, pathlib.Path]) -> Arrays:
  arrays: dict[str, np.ndarray] = {}
  for item, folder in items.items():
    for name, value in _read_tree(folder).items():
      arrays[f'{item}/{name}' if len(items) > 1 else name] = value
  return arrays


def _read_tree(folder: pathlib.Path) -> Arrays:
  """A tree as NumPy's arrays, whatever devices it was on."""
  with needed('tools'):
    import orbax.checkpoint as ocp  # noqa: PLC0415

  def restored(leaf: Any) -> Any:
    is_text = type(leaf).__name__ == 'StringMetadata'
    return ocp.RestoreArgs(restore_type=str if is_text else np.ndarray)

  folder = folder.resolve()
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    found: Any = checkpointer.metadata(folder)
    found = getattr(found, 'item_metadata', found)
    found = getattr(found, 'tree', found)
    args = ocp.args.PyTreeRestore(restore_args=jax.tree.map(restored, found))
    tree = checkpointer.restore(folder, args=args)
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): value
    for path, value in flat
    if isinstance(value, np.ndarray)
  }


def restore(
  path: pathlib.Path,
  template: Template,
  collections: Collection[str] = (),
  step: int | None = None,
) -> Any:
  """The model with the arrays of a checkpoint; raises unless all fit."""
  wanted = {'/'.join(filter(None, leaf)): leaf for leaf in template.leaves}
  arrays = _select(load(path, step), wanted, collections, str(path))
  due = {n: _kind(template.leaves[leaf]) for n, leaf in wanted.items()}
  found = {name: _kind(array) for name, array in arrays.items()}
  if found != due:
    faults = [
      f'{name}: {found.get(name, "missing")} in the file, '
      f'{due.get(name, "nothing")} in the model'
      for name in sorted(found.keys() | due.keys())
      if found.get(name) != due.get(name)
    ]
    raise ValueError(f'{str(path)!r} is of another model: {"; ".join(faults)}')
  return template.rebuild(
    {
      leaf: jnp.asarray(arrays[name], template.leaves[leaf].dtype)
      for name, leaf in wanted.items()
    }
  )


def _kind(array: Any) -> str:
  """The kind of number and the shape, which a file and a model must share."""
  kinds: Any = (jnp.floating, jnp.complexfloating, jnp.integer, jnp.bool_)
  found = [k.__name__ for k in kinds if jnp.issubdtype(array.dtype, k)]
  return f'{found[0] if found else array.dtype} {tuple(array.shape)}'


def _select(
  arrays: Arrays,
  wanted: Collection[str],
  collections: Collection[str],
  path: str,
) -> dict[str, np.ndarray]:
  """The arrays of a model, by the names of its leaves.

  Left out is what lies beside the model. What lies with its leaves and is not
  one of them keeps its name.

  Args:
    arrays: all of a checkpoint.
    wanted: the names of the model's leaves.
    collections: what may lie above them besides the usual names.
    path: where they are, for messages.

  Raises:
    ValueError: if two arrays may be one leaf, or none is one.
  """
  above = _WRAPPERS.union(collections)
  found: dict[str, str] = {}
  used = set()
  for name in arrays:
    for leaf in _leaf_names(name):
      prefix, here = _parted(leaf, wanted, above)
      if here is None:
        continue
      if here in found:
        raise ValueError(
          f'{path!r}: both {found[here]!r} and {name!r} may be {here!r} of the '
          'model. Give a checkpoint of one of them.'
        )
      found[here] = name
      used.add(prefix)
      break
  if wanted and not found:
    raise ValueError(
      f'{path!r} is of another model: it holds {_told(arrays)}, and no leaf of '
      f'this one, such as {min(wanted)!r}. Give a checkpoint of its variables.'
    )
  chosen = {here: arrays[name] for here, name in found.items()}
  for name in arrays.keys() - set(found.values()):
    array = arrays[name]
    top, *below = name.split('/')
    bias = name.removesuffix('/kernel:bias') + '/bias'  # as `fold` names it
    _, here = _parted(bias, wanted, above)
    if here and here not in found and name.endswith('/kernel:bias'):
      chosen[here] = array.reshape(_vector(array.shape))
    elif top in _BESIDE or _KEYS.intersection(below):
      continue
    elif any(name.startswith(prefix) for prefix in used):
      chosen[name] = array
  return chosen


def leaf_names(
  params: Mapping[str, Any], collections: Collection[str]
) -> dict[str, str]:
  """The names of leaves of Flax for those that `fold` gives its arrays.

  They have no collection, and what folding adds to a kernel is a bias.
  """
  names = {}
  for name, array in params.items():
    top, _, rest = name.partition('/')
    here = rest if top in collections and rest else name
    bias = here.removesuffix('/kernel:bias') + '/bias'
    is_vector = len(_vector(array.shape)) == 1
    if here.endswith('/kernel:bias') and is_vector:
      clashes = f'{name.removesuffix("/kernel:bias")}/bias' in params
      here = here if clashes else bias
    names[name] = here
  return (
    names if len({*names.values()}) == len(names) else {n: n for n in names}
  )


def in_file(
  params: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, Any]:
  """The arrays of `fold` by the names of leaves, biases as vectors."""
  return {
    here: params[name].reshape(_vector(params[name].shape))
    if name.endswith(':bias') and here.endswith('/bias')
    else params[name]
    for name, here in names.items()
  }


def _leaf_names(name: str) -> Sequence[str]:
  """A name, and without the part that boxes and nnx variables add."""
  *layer, last = name.split('/')
  boxed = layer and last in ('value', 'raw_value')
  return (name, '/'.join(layer)) if boxed else (name,)


def _parted(
  name: str, wanted: Collection[str], above: Collection[str]
) -> tuple[str, str | None]:
  """What is above a leaf of the model, and the leaf; None if it is none."""
  prefix, rest = '', name
  while rest not in wanted:
    top, separator, rest = rest.partition('/')
    if top not in above or not separator:
      return '', None
    prefix += f'{top}/'
  return prefix, rest


def _vector(shape: tuple[int, ...]) -> tuple[int, ...]:
  """A shape without axes of one element, where that leaves one axis."""
  longest = max(shape, default=1)
  return (longest,) if longest == np.prod(shape) else shape


def _told(arrays: Arrays) -> str:
  """What is in a checkpoint, from above."""
  tops: dict[str, int] = {}
  for name in arrays:
    top = '/'.join(name.split('/')[:2])
    tops[top] = tops.get(top, 0) + 1
  told = [f'{top} ({n})' for top, n in sorted(tops.items())]
  more = f' and {len(told) - 8} more' if len(told) > 8 else ''
  return (', '.join(told[:8]) + more) or 'no arrays'
