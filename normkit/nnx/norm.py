"""Any normalization transform as a module."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from normkit import _types, _words, norm
from normkit._types import Array
from normkit.nnx._shared import Running, read, write


class Norm(_words.OwnWords, Running):
  """Any normalization transform as an nnx module.

  The arrays of the transform's parameters become `nnx.Param`, those of its
  state `nnx.BatchStat`. Where they come in a NamedTuple, its fields become
  attributes of the same names; any other pytree becomes the attribute `params`
  or `state`.

  Args:
    transform: the transform, such as `normkit.LayerNorm()`, or anyone's own.
    x: an input, or its shape and dtype, from which the transform makes its
      parameters: `jax.ShapeDtypeStruct((1, 8), jnp.float32)`.
    use_running_average: apply the transform with `train=False`; the call beats
      it. None leaves it to the call.

  Attributes:
    transform: the transform.
    use_running_average: set by `train()` and `eval()`.

  Raises:
    TypeError: if the transform is none, such as a class or a module.
    ValueError: if a field has the name of another attribute.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit as nk, normkit.nnx
    >>> x = jax.ShapeDtypeStruct((1, 3, 4), jnp.float32)
    >>> norm = normkit.nnx.Norm(nk.GroupNorm(num_groups=2), x)
    >>> norm(jnp.ones((5, 3, 4))).shape, norm.scale.shape
    ((5, 3, 4), (4,))
  """

  def __init__(
    self,
    transform: norm.Norm,
    x: Array | jax.ShapeDtypeStruct,
    *,
    use_running_average: bool | None = False,
  ) -> None:
    norm.check_transform(transform)
    self.transform = transform
    self.use_running_average = use_running_average
    params, state = transform.init(x)
    self._params_type = self._hang('params', params, nnx.Param)
    self._state_type = self._hang('state', state, nnx.BatchStat)

  def __call__(
    self,
    x: Array,
    use_running_average: bool | None = None,
    *,
    mask: Array | None = None,
  ) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    train = not self._evaluates(use_running_average)
    params = self._gather('params', self._params_type)
    state = self._gather('state', self._state_type)
    where = _types.check_mask(mask, jnp.shape(x), cast=False)
    y, updated = self.transform.apply(
      read(params), read(state), x, train=train, where=where
    )
    if train:
      write(state, updated)
    return y

  def _hang(self, name: str, tree: Any, kind: type) -> type | None:
    """Makes a tree of arrays attributes; returns its type if a NamedTuple."""
    named = hasattr(tree, '_fields')
    variables = jax.tree.map(lambda a: kind(jnp.asarray(a)), tree)
    fields = variables._asdict() if named else {name: variables}
    for field, value in fields.items():
      if hasattr(self, field):
        raise ValueError(
          f'the field {field!r} of the {name} of {self.transform} is the name '
          f'of another attribute of {type(self).__name__}. Rename the field.'
        )
      setattr(self, field, nnx.data(value))
    return type(tree) if named else None

  def _gather(self, name: str, kind: Any) -> Any:
    """The tree of variables that `_hang` made."""
    if kind is None:
      return getattr(self, name)
    return kind(*(getattr(self, field) for field in kind._fields))
