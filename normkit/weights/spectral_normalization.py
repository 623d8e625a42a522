"""Spectral normalization: a weight over its largest singular value.

Miyato, Kataoka, Koyama and Yoshida, "Spectral Normalization for Generative
Adversarial Networks" (2018).
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from normkit import _shards, _types
from normkit._types import Array, ArrayLike, DType, Scalar
from normkit.norm import NormParams
from normkit.weights._shared import (
  Options,
  Tree,
  check_steps,
  check_tree,
  choose,
  map_chosen,
  replace_chosen,
  unit,
)


@_types.serializable
class SpectralNormState(NamedTuple):
  """Where the power iteration of spectral norm stands.

  In the state of the transform each field holds a tree like the weights, with
  None where a weight is left alone.

  Attributes:
    u: estimate of the first right singular vector, of shape (1, C_out).
    sigma: estimate of the largest singular value, of shape (); it is recorded
      and never read.

  Examples:
    >>> import jax.numpy as jnp
    >>> from normkit.weights import SpectralNormState
    >>> SpectralNormState(u=jnp.ones((1, 3)), sigma=jnp.ones(())).u.shape
    (1, 3)
  """

  u: Array
  sigma: Array


def spectral_norm(
  weight: ArrayLike,
  state: SpectralNormState,
  *,
  n_steps: int = 1,
  epsilon: Scalar = 1e-12,
  update: bool = True,
  dtype: DType | None = None,
) -> tuple[Array, SpectralNormState]:
  """Spectral normalization: a weight over its largest singular value.

  With W the weight as a matrix of C_out columns, its leading axes taken
  together, each step of the power iteration is

    v = u W^T / ||u W^T||,    u = v W / ||v W||,

  and with the last of them

    sigma = v W u^T,    y = W / sigma.

  All is in float32 or wider. Gradients flow through W and sigma, with u and v
  held fixed; a sigma of 0 divides by one.

  Args:
    weight: array of shape (..., C_out) of rank two or more, float16, bfloat16,
      float32 or float64.
    state: u of shape (1, C_out), from which the iteration starts, and sigma;
      both are kept in their own dtypes.
    n_steps: steps of the power iteration, one or more. With u saved between
      calls, one is enough.
    epsilon: added to the squared lengths of `u W^T` and `v W`, not negative.
      They should be much larger: where they are not, sigma comes out too small.
    update: whether to return the new u and sigma; False iterates just so and
      returns `state`. A weight of zeros, or one that is not finite, leaves u as
      it was: the iteration goes on from there.
    dtype: dtype of y; None keeps weight's.

  Returns:
    `(y, state)`, y of the shape of weight.

  Raises:
    TypeError: if weight or u is not real and floating-point, or an option is
      of another type.
    ValueError: if weight is not a matrix, u does not fit it, `n_steps` is below
      one, or epsilon is negative or not finite.

  References:
    Miyato, Kataoka, Koyama and Yoshida, "Spectral Normalization for Generative
    Adversarial Networks" (2018), algorithm 1; the gradient is equation 12.

  Examples:
    >>> import jax.numpy as jnp
    >>> from normkit.weights import SpectralNormState, spectral_norm
    >>> kernel = jnp.diag(jnp.array([1., 4.]))
    >>> state = SpectralNormState(u=jnp.ones((1, 2)), sigma=jnp.ones(()))
    >>> y, state = spectral_norm(kernel, state, n_steps=10)
    >>> y.round(3).tolist(), float(state.sigma.round(3))
    ([[0.25, 0.0], [0.0, 1.0]], 4.0)
  """
  weight = _types.check_input(weight, 'weight')
  _check_matrix(weight)
  u, sigma = _check_state(state, weight.shape[-1])
  n_steps, epsilon = check_steps(n_steps), _types.check_epsilon(epsilon)
  update = _types.check_flag(update, 'update')
  dtype = _types.check_output_dtype(dtype, weight.dtype, 'weight')
  wide = _types.promote(_types.statistics_dtype(weight.dtype), u.dtype)
  w = weight.astype(wide)
  new_u, new_sigma = _power_iteration(w, u.astype(wide), n_steps, epsilon)
  y = (w / jnp.where(new_sigma != 0, new_sigma, 1)).astype(dtype)
  if not update:
    return y, state
  new_u = jnp.where(new_sigma > 0, new_u.astype(u.dtype), u)
  return y, SpectralNormState(new_u, new_sigma.astype(sigma.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectralNorm(Options):
  """Spectral normalization as a transform of pytrees; see `spectral_norm`.

  There are no parameters; the state holds u and sigma of each weight.

  Attributes:
    n_steps: steps of the power iteration at each call, one or more.
    epsilon: added to squared lengths in the power iteration.
    param_dtype: dtype of the u and sigma that `init` makes.
    dtype: dtype of the normalized weights; None keeps each weight's.
    where: `where(path, weight)` says which weights are normalized, by a path
      such as 'Dense_0/kernel' (an array alone has the path ''). None: those of
      rank two or more.

  Examples:
    >>> import jax.numpy as jnp
    >>> from normkit.weights import SpectralNorm
    >>> weights = {'kernel': 3 * jnp.eye(2), 'bias': jnp.ones(2)}
    >>> sn = SpectralNorm()
    >>> params, state = sn.init(weights)
    >>> normalized, state = sn.apply(params, state, weights, update=True)
    >>> normalized['kernel'].round(3).tolist(), normalized['bias'].tolist()
    ([[1.0, 0.0], [0.0, 1.0]], [1.0, 1.0])
    >>> state.sigma['bias'], round(float(state.sigma['kernel']), 3)
    (None, 3.0)
  """

  n_steps: int = 1
  epsilon: Scalar = 1e-12

  def init(
    self, weights: Tree, key: Array | None = None
  ) -> tuple[NormParams, SpectralNormState]:
    """Returns `(params, state)` for weights, arrays or their shapes.

    Args:
      weights: an array or a pytree of them; `jax.ShapeDtypeStruct` will do.
      key: random key that u is drawn with. None takes a fixed one: any draw
        serves that is not orthogonal to the first singular vector.

    Returns:
      `NormParams()`; and `SpectralNormState(u, sigma)`, two trees like
      `weights` of normal draws of shape (1, C_out) and of ones of shape (),
      None where a weight is left alone.

    Raises:
      TypeError, ValueError: as `spectral_norm` does, or if `where` chooses
        none.
    """
    chosen = choose(self.where, weights)
    tree: Any = jax.tree.structure(chosen)
    key = jax.random.key(0) if key is None else key
    keys = tree.unflatten(jax.random.split(key, tree.num_leaves))

    def draw(weight: Any, key: Array) -> Array:
      _check_matrix(weight)
      return jax.random.normal(key, (1, weight.shape[-1]), self.param_dtype)

    u = map_chosen(draw, chosen, weights, keys)
    sigma = map_chosen(
      lambda _: jnp.ones((), self.param_dtype), chosen, weights
    )
    return NormParams(), SpectralNormState(u, sigma)

  def apply(
    self,
    params: NormParams,
    state: SpectralNormState,
    weights: Tree,
    *,
    update: bool,
  ) -> tuple[Tree, SpectralNormState]:
    """Returns `(weights, state)`.

    Args:
      params: `NormParams()`.
      state: as `init` or an earlier call made it.
      weights: an array or a pytree of them.
      update: whether to return the new state; True in training.

    Returns:
      The weights, those that `where` chooses normalized; and the state.

    Raises:
      TypeError, ValueError: as `spectral_norm` does, or if params or state are
        not those of `init`.
    """
    chosen = choose(self.where, weights)
    check_tree(params, NormParams(), 'params')
    check_tree(state, SpectralNormState(chosen, chosen), 'state')

    def normalized(
      weight: Array, u: Array, sigma: Array
    ) -> tuple[Array, SpectralNormState]:
      return spectral_norm(
        weight,
        SpectralNormState(u, sigma),
        n_steps=self.n_steps,
        epsilon=self.epsilon,
        update=update,
        dtype=self.dtype,
      )

    pairs = map_chosen(normalized, chosen, weights, *state)
    new = map_chosen(lambda pair: pair[0], chosen, pairs)
    u = map_chosen(lambda pair: pair[1].u, chosen, pairs)
    sigma = map_chosen(lambda pair: pair[1].sigma, chosen, pairs)
    return replace_chosen(chosen, weights, new), SpectralNormState(u, sigma)


def _power_iteration(
  w: Array, u: Array, n_steps: int, epsilon: Scalar
) -> tuple[Array, Array]:
  """u and sigma after some steps; u and v are constants to gradients."""
  fixed, u = lax.stop_gradient((w, u[0]))
  *rows, columns = range(w.ndim)
  for _ in range(n_steps):
    v = unit(_contract(fixed, u, (columns,)), epsilon)
    u = unit(_contract(fixed, v, rows), epsilon)
  return u[None], jnp.sum(_contract(w, v, rows) * u)


def _contract(w: Array, x: Array, axes: Sequence[int]) -> Array:
  """The sum of w * x over `axes` of w, which are all that x has.

  In full precision, for accelerators round float32 unless told. What comes of
  an explicitly sharded w is whole on each device, as u is.
  """
  sharding = jax.typeof(w).sharding
  whole = sharding.update(spec=P()) if _shards.sharded_axes(w) else None
  return jnp.tensordot(
    w,
    x,
    (tuple(axes), tuple(range(x.ndim))),
    precision=lax.Precision.HIGHEST,
    out_sharding=whole,
  )


def _check_state(state: Any, columns: int) -> SpectralNormState:
  """Returns the state of one weight, checked against its columns."""
  if not isinstance(state, SpectralNormState):
    raise ValueError(
      f'state must be SpectralNormState(u, sigma), got {type(state).__name__}. '
      f'To start: u of normal draws of shape (1, {columns}), sigma of shape ().'
    )
  u, sigma = (
    _types.check_input(value, f'state.{name}')
    for name, value in state._asdict().items()
  )
  for name, value, shape in ('u', u, (1, columns)), ('sigma', sigma, ()):
    _check_real(value, f'state.{name}')
    if value.shape != shape:
      raise ValueError(
        f'state.{name} has shape {value.shape}, but a weight with {columns} '
        f'columns (its last axis) takes {shape}. Start again from its init.'
      )
  return SpectralNormState(u, sigma)


def _check_matrix(weight: Any) -> None:
  """Raises unless the weight, an array or its shape, is a real matrix."""
  _check_real(weight, 'weight')
  if len(weight.shape) < 2:
    raise ValueError(
      f'weight must have rank two or more, got shape {weight.shape}: a vector '
      'has no singular values. Leave it as it is, in trees by '
      'where=lambda path, weight: weight.ndim > 1.'
    )


def _check_real(value: Any, name: str) -> None:
  if not jnp.issubdtype(_types.check_dtype(value.dtype, name), jnp.floating):
    raise TypeError(
      f'{name} must be real in spectral norm, got {value.dtype}. Give its real '
      'part, or normalize real and imaginary parts as two weights.'
    )
