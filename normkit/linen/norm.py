"""Any normalization transform as a module."""

from typing import Any

from flax import linen as nn
import jax.numpy as jnp

from normkit import _types, _words, norm
from normkit._types import Array
from normkit.linen._shared import map_fields


class Norm(_words.OwnWords, nn.Module):
  """Any normalization transform as a linen module.

  Parameters are in the collection `params`, the state in `batch_stats`, both
  under the names that they have in the transform's tuples. Initialising leaves
  the state as `transform.init` makes it.

  Attributes:
    transform: the transform, such as `normkit.LayerNorm()`, or anyone's own.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit as nk, normkit.linen
    >>> norm = normkit.linen.Norm(nk.GroupNorm(num_groups=2))
    >>> x = jnp.ones((1, 3, 4))
    >>> variables = norm.init(jax.random.key(0), x, train=False)
    >>> norm.apply(variables, x, train=False).shape
    (1, 3, 4)
  """

  transform: norm.Norm

  def __post_init__(self) -> None:
    norm.check_transform(self.transform)
    super().__post_init__()

  @nn.compact
  def __call__(
    self, x: Array, *, train: bool, mask: Array | None = None
  ) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    _types.check_flag(train, 'train')
    params, state = self.transform.init(x)
    params = map_fields(
      lambda name, value: self.param(name, lambda _: value), params, 'params'
    )
    variables: dict[str, nn.Variable[Any]] = {}

    def variable(name: str, value: Any) -> Any:
      variables[name] = self.variable('batch_stats', name, lambda: value)
      return variables[name].value

    def save(name: str, value: Any) -> None:
      variables[name].value = value

    state = map_fields(variable, state, 'state')
    train = train and not self.is_initializing()
    where = _types.check_mask(mask, jnp.shape(x), cast=True)
    y, state = self.transform.apply(params, state, x, train=train, where=where)
    if train:
      map_fields(save, state, 'state')
    return y
