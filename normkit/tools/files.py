"""Arrays in files: read whatever holds no code, write one file or none.

What a file is, its first bytes tell, not its name. No pickle is ever loaded.
"""

from collections.abc import Callable, Iterable, Mapping
import io
import json
import math
import os
import pathlib
from typing import Any
import zipfile

import ml_dtypes
import numpy as np

from normkit.tools._extras import needed

Path = str | os.PathLike[str]

_PICKLE = (
  'it is a pickle, which can run any code when loaded, and is not read. Save '
  'the arrays alone where the model was made: safetensors.torch.save_file('
  "model.state_dict(), 'model.safetensors')."
)
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
# What the arrays of a file may take: so many times its bytes, or this at least.
_MAX_RATIO = 1000
_MIN_LIMIT = 2**26
NOT_OF_NUMPY = (
  ml_dtypes.bfloat16,
  ml_dtypes.float8_e4m3fn,
  ml_dtypes.float8_e5m2,
)
_DTYPES = {
  'BOOL': np.bool_,
  'U8': np.uint8,
  'I8': np.int8,
  'U16': np.uint16,
  'I16': np.int16,
  'U32': np.uint32,
  'I32': np.int32,
  'U64': np.uint64,
  'I64': np.int64,
  'F8_E4M3': ml_dtypes.float8_e4m3fn,
  'F8_E5M2': ml_dtypes.float8_e5m2,
  'BF16': ml_dtypes.bfloat16,
  'F16': np.float16,
  'F32': np.float32,
  'F64': np.float64,
  'C64': np.complex64,
}


def load_arrays(path: Path) -> dict[str, np.ndarray]:
  """Reads the arrays of a file: safetensors, .npz, HDF5, Keras's or msgpack.

  Pickles are refused, inside a zip archive too, which is what `torch.save`
  writes; so is a file that is cut short, that holds anything but numbers,
  whose names could not be those of arrays in a model, or whose arrays would
  take more than 64 MiB and 1,000 times the file. HDF5 covers the
  `.weights.h5` of Keras 3, also the one inside a `.keras` archive, with the
  names that the layers have, such as 'layers/stem/vars/0' (where two have one
  name, that of the class, as in the file), and the `.h5` of Keras 2 and 3, with
  names such as 'model_weights/stem/stem/kernel'. Msgpack is what
  `flax.serialization.to_bytes` gives; names are paths, 'params/Conv_0/kernel',
  and what is None is left out.

  Args:
    path: the file; its suffix does not matter.

  Returns:
    The arrays by their names in the file. They may be read-only.

  Raises:
    ImportError: if the library that reads such files is not installed.
    OSError: if there is no such file, or it cannot be read.
    ValueError: if the file is broken, or not one of these. The message names
      the file, and the array where one is at fault.

  Examples:
    >>> import os, tempfile, numpy as np
    >>> from normkit.tools import files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = os.path.join(folder, 'model.safetensors')
    ...   files.save_arrays(path, {'fc.weight': np.ones((2, 3))})
    ...   files.load_arrays(path)['fc.weight'].shape
    (2, 3)
  """
  data = pathlib.Path(path).read_bytes()
  try:
    arrays = _reader(data)(data)
    check_names(arrays)
    for name, value in arrays.items():
      check_numbers(name, value)
  except ImportError:
    raise
  except Exception as error:  # whatever a parser makes of hostile bytes
    raise ValueError(f'{os.fspath(path)!r} is refused: {error}') from error
  return arrays


def save_arrays(
  path: Path, arrays: Mapping[str, Any], *, overwrite: bool = False
) -> None:
  """Writes arrays to a safetensors file, all of them or none.

  They go to a file beside it first, which takes the name when it is complete:
  whatever fails on the way leaves an older file as it was.

  Args:
    path: the file to write.
    arrays: arrays by name.
    overwrite: replace a file that is there, where `path` is a link the one
      that it points to.

  Raises:
    FileExistsError: if there is a file or a link and overwrite is False, or
      what is there is no regular file.
    TypeError: if one is not an array of numbers.
    ValueError: if a name could not be that of an array in a model.

  Examples:
    >>> import os, tempfile, numpy as np
    >>> from normkit.tools import files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = os.path.join(folder, 'model.safetensors')
    ...   files.save_arrays(path, {'fc.bias': np.zeros(3)})
    ...   os.listdir(folder)
    ['model.safetensors']
  """
  with needed('tools'):
    from safetensors import numpy as safetensors  # noqa: PLC0415

  check_names(arrays)
  named = {k: np.array(as_numpy(k, v), order='C') for k, v in arrays.items()}
  save_bytes(path, safetensors.save(named), overwrite=overwrite)


def save_bytes(path: Path, data: bytes, *, overwrite: bool = False) -> None:
  """Writes a whole file or none; see `save_arrays`.

  Raises:
    FileExistsError: as `save_arrays` raises it.

  Examples:
    >>> import os, tempfile
    >>> from normkit.tools import files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   files.save_bytes(os.path.join(folder, 'program.jax'), b'program')
  """
  path = check_free(path, overwrite)
  partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
  try:
    with open(partial, 'xb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def check_free(path: Path, overwrite: bool) -> pathlib.Path:
  """Where to write a file: past links; raises unless it may be written."""
  path = pathlib.Path(path)
  if os.path.lexists(path) and not overwrite:
    raise FileExistsError(
      f'{str(path)!r} exists. Choose another name, or give overwrite=True '
      '(--overwrite).'
    )
  target = pathlib.Path(os.path.realpath(path))
  if os.path.lexists(target) and not target.is_file():
    raise FileExistsError(
      f'{str(path)!r} is not a regular file, and is not overwritten. Choose '
      'another name.'
    )
  return target


def as_numpy(name: str, value: Any) -> np.ndarray:
  """Returns an array of NumPy, JAX or PyTorch as NumPy's."""
  if hasattr(value, 'detach'):  # PyTorch's
    value = value.detach().cpu()
    named = str(value.dtype).removeprefix('torch.')
    for dtype in NOT_OF_NUMPY:
      if named == dtype.__name__:
        value = value.float().numpy().astype(dtype)
        break
  array = np.asarray(value)
  check_numbers(name, array)
  return array


def check_numbers(name: str, array: np.ndarray) -> None:
  """Raises unless the array holds numbers."""
  if array.dtype.kind not in 'biufc' and array.dtype not in _DTYPES.values():
    raise TypeError(
      f'{name!r} must be an array of numbers, got one of dtype {array.dtype}.'
    )


def check_names(names: Iterable[Any]) -> None:
  """Raises for a name that could not be that of an array in a model."""
  for name in names:
    if not isinstance(name, str):
      raise TypeError(f'names must be strings, got {name!r:.200}.')
    parts = name.replace('/', '.').split('.')
    if not all(parts) or not name.isprintable() or '\\' in name:
      raise ValueError(
        f'the name {name!r:.200} is not that of an array: parts between dots '
        'or slashes must not be empty, nor hold control characters.'
      )


def _reader(data: bytes) -> Callable[[bytes], dict[str, np.ndarray]]:
  """The function that reads such bytes."""
  header = int.from_bytes(data[:8], 'little')
  if data[8:9] == b'{' and header <= _MAX_HEADER:
    return _safetensors
  if data.startswith(b'PK'):
    return _zip
  if data.startswith(b'\x89HDF\r\n\x1a\n'):
    return _hdf5
  if data.startswith(b'\x80'):
    raise ValueError(_PICKLE)
  if b'\x81' <= data[:1] <= b'\x8f' or data[:1] in (b'\xde', b'\xdf'):
    return _msgpack  # a map of one key or more
  raise ValueError(
    f'it begins with {data[:9]!r}, not as a safetensors, .npz, HDF5, Keras or '
    'msgpack file.'
  )


def _safetensors(data: bytes) -> dict[str, np.ndarray]:
  with needed('tools'):
    from safetensors import deserialize  # noqa: PLC0415

  entries = deserialize(data)
  end = 8 + int.from_bytes(data[:8], 'little')
  json.loads(data[8:end], object_pairs_hook=_once)
  arrays = {}
  for name, entry in sorted(entries):
    dtype = _DTYPES.get(entry['dtype'])
    if dtype is None:
      raise ValueError(f'{name!r} has the dtype {entry["dtype"]}, unknown here')
    flat = np.frombuffer(entry['data'], dtype)
    arrays[name] = flat.reshape(entry['shape'])
  return arrays


def _once(pairs: list[tuple[str, Any]]) -> None:
  """Raises where a name comes twice, of which the library keeps one."""
  seen = set()
  for name, _ in pairs:
    if name in seen:
      raise ValueError(f'the name {name!r:.200} comes twice.')
    seen.add(name)


def _zip(data: bytes) -> dict[str, np.ndarray]:
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    sizes = [(m.filename, m.file_size) for m in archive.infolist()]
  members = [name for name, _ in sizes]
  if any(member.endswith('.pkl') for member in members):
    raise ValueError(_PICKLE)
  if members.count('model.weights.h5') == 1:  # a .keras archive
    _check_total('model.weights.h5', dict(sizes)['model.weights.h5'], len(data))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
      return _hdf5(archive.read('model.weights.h5'), len(data))
  if not all(member.endswith('.npy') for member in members):
    raise ValueError(f'a zip archive of {members!s:.200}, not of .npy arrays.')
  if len({*members}) < len(members):
    raise ValueError(f'a name comes twice in {members!s:.200}.')
  total = 0
  for name, size in sizes:
    total += size
    _check_total(name.removesuffix('.npy'), total, len(data))
  with np.load(io.BytesIO(data), allow_pickle=False) as file:
    return {name: file[name] for name in file.files}


def _hdf5(data: bytes, size: int | None = None) -> dict[str, np.ndarray]:
  """Reads HDF5 that takes `size` bytes in its file, by default all."""
  with needed('tools'):
    import h5py  # noqa: PLC0415

  arrays = {}
  titles: dict[str, str] = {}
  total = 0

  def check_links(name: str, group: Any) -> None:
    for key in group:
      if isinstance(group.get(key, getlink=True), h5py.ExternalLink):
        raise ValueError(f'{name + key!r} points to another file.')

  def read(name: str, item: Any) -> None:
    nonlocal total
    if isinstance(item, h5py.Group):
      check_links(f'{name}/', item)
      title = item.attrs.get('name')
      if name.endswith('/vars') and isinstance(title, str):
        titles[name.removesuffix('/vars')] = title
    if isinstance(item, h5py.Dataset):
      _check_dataset(name, item)
      largest = max(item.size, math.prod(item.chunks or ()))
      total += largest * item.dtype.itemsize
      _check_total(name, total, len(data) if size is None else size)
      arrays[name] = _dataset(item)

  with h5py.File(io.BytesIO(data), 'r') as file:
    check_links('', file)
    file.visititems(read)
  titled = {_titled(name, titles): value for name, value in arrays.items()}
  return titled if len(titled) == len(arrays) else arrays


def _titled(name: str, titles: Mapping[str, str]) -> str:
  """A name in the weights of Keras 3, with those of the layers in lists.

  Groups in 'layers' are called by the class, 'conv2d_1'; the layer's own name
  is an attribute.
  """
  given = name.split('/')
  parts = given.copy()
  for end in range(1, len(parts)):
    title = titles.get('/'.join(given[: end + 1]))
    if title and parts[end - 1] == 'layers':
      parts[end] = title
  return '/'.join(parts)


def _msgpack(data: bytes) -> dict[str, np.ndarray]:
  """The leaves of a tree that `flax.serialization` packed."""
  from flax import serialization  # noqa: PLC0415

  arrays: dict[str, np.ndarray] = {}
  found = [('', serialization.msgpack_restore(data))]
  while found:
    name, node = found.pop()
    if isinstance(node, Mapping | list | tuple):
      pairs = node.items() if isinstance(node, Mapping) else enumerate(node)
      found += [(f'{name}/{key}' if name else str(key), v) for key, v in pairs]
    elif node is not None:
      arrays[name] = np.asarray(node)
  return dict(sorted(arrays.items()))


def _check_total(name: str, total: int, size: int) -> None:
  """Raises if arrays, of which this is the last, are too large for a file."""
  if total > max(_MIN_LIMIT, _MAX_RATIO * size):
    raise ValueError(
      f'with {name!r} the arrays take {total} bytes, and the file has '
      f'{size}. Save it without compression if that is meant.'
    )


def _check_dataset(name: str, item: Any) -> None:
  """Raises unless an HDF5 dataset lies in its file, in full, of numbers."""
  if item.is_virtual or item.external:
    raise ValueError(f'{name!r} points to another file.')
  if item.chunks is None and item.id.get_storage_size() < item.nbytes:
    raise ValueError(f'{name!r} claims more than the file holds.')
  if not _is_bfloat16(item):
    check_numbers(name, np.empty(0, item.dtype))


def _dataset(item: Any) -> np.ndarray:
  array = np.asarray(item[()])
  return array.view(ml_dtypes.bfloat16) if _is_bfloat16(item) else array


def _is_bfloat16(item: Any) -> bool:
  return bool(item.attrs.get('dtype') == 'bfloat16')  # as Keras marks them
