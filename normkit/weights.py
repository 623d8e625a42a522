"""Norms that act on weights: weight norm, standardization, spectral norm.

Salimans and Kingma, "Weight Normalization" (2016); Qiao and others, "Weight
Standardization" (2019), with the scaled form of Brock and others (2021); Miyato
and others, "Spectral Normalization for Generative Adversarial Networks" (2018).

A function takes one weight. A transform takes any pytree of them, chooses those
that it normalizes by their paths, and leaves the others as they are: `weights`
in, `weights` out, with the weights that the optimizer moves never overwritten.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from normkit import _types, arguments
from normkit._types import Array, ArrayLike, Axes, DType
from normkit.centred import centred, square
from normkit.kernels.rows import reciprocal_root
from normkit.norm import EmptyState, NormParams

Tree: TypeAlias = Any
Where: TypeAlias = Callable[[str, Any], bool]


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


def weight_norm(
  weight: ArrayLike,
  scale: ArrayLike | None = None,
  *,
  feature_axes: Axes | None = -1,
  epsilon: float = 1e-12,
  dtype: DType | None = None,
) -> Array:
  """Weight normalization: the length of a weight is a parameter of its own.

    w = v / ||v|| * g,    ||v|| = sqrt(sum |v|^2 + epsilon),

  v the weight, g the scale, the sum over all axes but `feature_axes`, in
  float32 or wider.

  Args:
    weight: array of any shape, float16, bfloat16, float32, float64 or complex.
    scale: of the shape of the axes `feature_axes`, or of weight's rank and
      broadcasting against it. None: one.
    feature_axes: the axes along which each index has a length of its own, an
      integer or several; for kernels of Flax the last, the outputs. None: one
      length of the whole weight.
    epsilon: added to the squared length, not negative. With 0, a weight of
      zeros gives zeros.
    dtype: dtype of the result; None keeps weight's.

  Returns:
    An array of the shape of weight.

  Raises:
    TypeError: if weight is not floating-point or complex, or `dtype` cannot
      hold the result.
    ValueError: if an axis is out of range or given twice, scale does not fit,
      or epsilon is negative or not finite.

  References:
    Salimans and Kingma, "Weight Normalization: A Simple Reparameterization to
    Accelerate Training of Deep Neural Networks" (2016), equation 2.

  Examples:
    >>> import jax.numpy as jnp
    >>> from normkit.weights import weight_norm
    >>> kernel = jnp.array([[2., 0.], [0., 4.]])
    >>> weight_norm(kernel, jnp.array([1., 3.])).tolist()
    [[1.0, 0.0], [0.0, 3.0]]
  """
  weight = _types.check_input(weight, 'weight')
  features = _features(feature_axes, weight.ndim)
  scale = arguments.check_feature(
    scale, weight.shape, features, 'scale', 'weight'
  )
  epsilon = _types.check_epsilon(epsilon)
  dtype = _types.check_output_dtype(dtype, weight.dtype, 'weight')
  v = weight.astype(_types.statistics_dtype(weight.dtype))
  w = _unit(v, epsilon, _types.other_axes(features, v.ndim))
  if scale is not None:
    _types.check_output_dtype(dtype, scale.dtype, 'scale')
    w = w * scale
  return w.astype(dtype)


def weight_standardize(
  weight: ArrayLike,
  gain: ArrayLike | None = None,
  *,
  feature_axes: Axes | None = -1,
  scaled: bool = False,
  epsilon: float | None = None,
  dtype: DType | None = None,
) -> Array:
  """Weight standardization: mean 0 and variance 1 for each output.

  With N the number of elements that share a mean and a variance, those of all
  axes but `feature_axes`,

    w = (v - E[v]) / sqrt(Var[v] + epsilon) * gain,

  and scaled, so that an output has the variance of the inputs' mean square,

    w = (v - E[v]) / sqrt(max(N Var[v], epsilon)) * gain.

  Statistics are in float32 or wider.

  Args:
    weight: array of any shape, float16, bfloat16, float32, float64 or complex.
    gain: of the shape of the axes `feature_axes`, or of weight's rank and
      broadcasting against it, or one number, such as the gain of the
      activation. None: one.
    feature_axes: the axes along which each index has a mean and a variance of
      its own, an integer or several; for kernels of Flax the last, the outputs,
      and N is then the fan-in. None: one mean and variance of the whole weight.
    scaled: divide by the root of N as well.
    epsilon: not negative. None: 1e-10, and scaled 1e-4, the value of NF-nets.
      With 0, equal elements give zeros.
    dtype: dtype of the result; None keeps weight's.

  Returns:
    An array of the shape of weight.

  Raises:
    TypeError: if weight is not floating-point or complex, `scaled` is not a
      static flag, or `dtype` cannot hold the result.
    ValueError: if an axis is out of range or given twice, gain does not fit,
      fewer than two elements share a mean, or epsilon is negative or not
      finite.

  References:
    Qiao, Wang, Liu, Shen and Yuille, "Micro-Batch Training with Batch-Channel
    Normalization and Weight Standardization" (2019), equations 2 to 4; Brock,
    De and Smith, "Characterizing Signal Propagation to Close the Performance
    Gap in Unnormalized ResNets" (2021), section 4.

  Examples:
    >>> import jax.numpy as jnp
    >>> from normkit.weights import weight_standardize
    >>> kernel = jnp.array([[1.], [3.], [1.], [3.]])
    >>> weight_standardize(kernel).round(6).tolist()
    [[-1.0], [1.0], [-1.0], [1.0]]
    >>> weight_standardize(kernel, scaled=True).round(6).tolist()
    [[-0.5], [0.5], [-0.5], [0.5]]
  """
  weight = _types.check_input(weight, 'weight')
  features = _features(feature_axes, weight.ndim)
  if gain is not None and jnp.ndim(gain) > 0:
    gain = arguments.check_feature(
      gain, weight.shape, features, 'gain', 'weight'
    )
  scaled = _types.check_flag(scaled, 'scaled')
  epsilon = _EPSILON[scaled] if epsilon is None else epsilon
  epsilon = _types.check_epsilon(epsilon)
  dtype = _types.check_output_dtype(dtype, weight.dtype, 'weight')
  axes = _types.other_axes(features, weight.ndim)
  _check_shared(weight.shape, axes)
  v = weight.astype(_types.statistics_dtype(weight.dtype))
  stats = centred(v, axes)
  power = stats.var
  if scaled:
    power, epsilon = jnp.maximum(stats.count * stats.var, epsilon), 0.0
  v = (v - stats.pivot) - stats.offset
  w: Array = v * reciprocal_root(power, epsilon)
  if gain is not None:
    gain = jnp.asarray(gain)
    _types.check_output_dtype(dtype, gain.dtype, 'gain')
    w = w * gain
  return w.astype(dtype)


# Of weight standardization, by `scaled`: Kolesnikov and others, "Big Transfer"
# (2020), and Brock and others, as published with their models.
_EPSILON = {False: 1e-10, True: 1e-4}


def spectral_norm(
  weight: ArrayLike,
  state: SpectralNormState,
  *,
  n_steps: int = 1,
  epsilon: float = 1e-12,
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
  n_steps, epsilon = _check_steps(n_steps), _types.check_epsilon(epsilon)
  update = _types.check_flag(update, 'update')
  dtype = _types.check_output_dtype(dtype, weight.dtype, 'weight')
  wide = jnp.promote_types(_types.statistics_dtype(weight.dtype), u.dtype)
  w = weight.astype(wide)
  new_u, new_sigma = _power_iteration(w, u.astype(wide), n_steps, epsilon)
  y = (w / jnp.where(new_sigma != 0, new_sigma, 1)).astype(dtype)
  if not update:
    return y, state
  new_u = jnp.where(new_sigma > 0, new_u.astype(u.dtype), u)
  return y, SpectralNormState(new_u, new_sigma.astype(sigma.dtype))


def _power_iteration(
  w: Array, u: Array, n_steps: int, epsilon: float
) -> tuple[Array, Array]:
  """u and sigma after some steps; u and v are constants to gradients."""
  fixed, u = lax.stop_gradient((w, u[0]))
  *rows, columns = range(w.ndim)
  for _ in range(n_steps):
    v = _unit(_contract(fixed, u, (columns,)), epsilon)
    u = _unit(_contract(fixed, v, rows), epsilon)
  return u[None], jnp.sum(_contract(w, v, rows) * u)


def _contract(w: Array, x: Array, axes: Sequence[int]) -> Array:
  """The sum of w * x over `axes` of w, which are all that x has.

  In full precision, for accelerators round float32 unless told. What comes of
  an explicitly sharded w is whole on each device, as u is.
  """
  sharding = jax.typeof(w).sharding
  whole = sharding.update(spec=P()) if _types.sharded_axes(w) else None
  return jnp.tensordot(
    w,
    x,
    (tuple(axes), tuple(range(x.ndim))),
    precision=lax.Precision.HIGHEST,
    out_sharding=whole,
  )


def _unit(
  x: Array, epsilon: float, axes: tuple[int, ...] | None = None
) -> Array:
  """x over its length along the axes; None means all."""
  squared = jnp.sum(square(x), axes, keepdims=True)
  return x * reciprocal_root(squared, epsilon)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
  """The options of all transforms, checked when the transform is made."""

  epsilon: float | None = None
  param_dtype: DType = jnp.float32
  dtype: DType | None = None
  where: Where | None = None

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value, check = getattr(self, field.name), _FIELD_CHECKS.get(field.name)
      if check and (value is not None or field.default is not None):
        object.__setattr__(self, field.name, check(value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightNorm(_Options):
  """Weight normalization as a transform of pytrees; see `weight_norm`.

  The parameters are the scales, which train beside the weights; there is no
  state. Scales start at one, as in Flax, so that each length starts at one.

  Attributes:
    feature_axes: the axes along which each index has a length of its own, an
      integer or several. None: one length of the whole weight.
    use_scale: whether there are scales.
    epsilon: added to the squared length.
    param_dtype: dtype of the scales that `init` makes.
    dtype: dtype of the normalized weights; None keeps each weight's.
    where: `where(path, weight)` says which weights are normalized, by a path
      such as 'Dense_0/kernel' (an array alone has the path ''). None: those of
      rank two or more.

  Examples:
    >>> import jax.numpy as jnp
    >>> from normkit.weights import WeightNorm
    >>> weights = {'kernel': jnp.ones((4, 2)), 'bias': jnp.ones(2)}
    >>> wn = WeightNorm(where=lambda path, weight: 'kernel' in path)
    >>> params, state = wn.init(weights)
    >>> params.scale
    {'bias': None, 'kernel': Array([1., 1.], dtype=float32)}
    >>> normalized, state = wn.apply(params, state, weights, update=True)
    >>> normalized['kernel'][0].tolist(), normalized['bias'].tolist()
    ([0.5, 0.5], [1.0, 1.0])

    To start from trained weights, let the scales be their lengths:

    >>> wn = WeightNorm()
    >>> params, state = wn.init(weights['kernel'])
    >>> lengths = jnp.linalg.norm(weights['kernel'], axis=0)
    >>> params = params._replace(scale=lengths)
    >>> wn.apply(params, state, weights['kernel'], update=True)[0][0].tolist()
    [1.0, 1.0]
  """

  feature_axes: Axes | None = -1
  use_scale: bool = True
  epsilon: float = 1e-12

  def init(
    self, weights: Tree, key: Array | None = None
  ) -> tuple[NormParams, EmptyState]:
    """Returns `(params, state)` for weights, arrays or their shapes.

    Args:
      weights: an array or a pytree of them; `jax.ShapeDtypeStruct` will do.
      key: not needed.

    Returns:
      `NormParams(scale)`, a tree like `weights` of arrays of the shape of the
      feature axes, None where there is none; and `EmptyState()`.

    Raises:
      TypeError, ValueError: as `weight_norm` does, or if `where` chooses none.
    """
    del key
    chosen = _choose(self.where, weights)

    def ones(weight: Any) -> Array | None:
      features = _features_of(weight, self.feature_axes)
      shape = tuple(weight.shape[a] for a in features)
      return jnp.ones(shape, self.param_dtype) if self.use_scale else None

    return NormParams(scale=_map(ones, chosen, weights)), EmptyState()

  def apply(
    self, params: NormParams, state: EmptyState, weights: Tree, *, update: bool
  ) -> tuple[Tree, EmptyState]:
    """Returns `(weights, state)`; `update` makes no difference.

    Args:
      params: the scales, as `init` makes them.
      state: `EmptyState()`.
      weights: an array or a pytree of them.
      update: not needed.

    Returns:
      The weights, those that `where` chooses normalized; and the state.

    Raises:
      TypeError, ValueError: as `weight_norm` does, or if params or state are
        not those of `init`.
    """
    del update
    chosen = _choose(self.where, weights)
    scaled = jax.tree.map(lambda c: c and self.use_scale, chosen)
    _check_tree(params, NormParams(scale=scaled), 'params')
    _check_tree(state, EmptyState(), 'state')

    def normalized(weight: Array, scale: Array | None) -> Array:
      return weight_norm(
        weight,
        scale,
        feature_axes=self.feature_axes,
        epsilon=self.epsilon,
        dtype=self.dtype,
      )

    new = _map(normalized, chosen, weights, params.scale)
    return _replace(chosen, weights, new), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightStandardization(_Options):
  """Weight standardization as a transform of pytrees; see `weight_standardize`.

  There are no parameters, or gains that train beside the weights and start at
  one; there is no state.

  Attributes:
    feature_axes: the axes along which each index has a mean and a variance of
      its own, an integer or several. None: one of each for the whole weight.
    scaled: divide by the root of the fan-in as well.
    use_gain: whether there are gains.
    epsilon: None: 1e-10, added to the variance, or scaled 1e-4, the least that
      the fan-in times the variance is taken to be.
    param_dtype: dtype of the gains that `init` makes.
    dtype: dtype of the standardized weights; None keeps each weight's.
    where: `where(path, weight)` says which weights are standardized, by a path
      such as 'Dense_0/kernel' (an array alone has the path ''). None: those of
      rank two or more; name the kernels where there are embeddings, or norms
      whose scales have such a rank.

  Examples:
    >>> import jax.numpy as jnp
    >>> from normkit.weights import WeightStandardization
    >>> weights = {'kernel': jnp.array([[1.], [5.]]), 'bias': jnp.ones(1)}
    >>> ws = WeightStandardization(use_gain=True)
    >>> params, state = ws.init(weights)
    >>> params.scale
    {'bias': None, 'kernel': Array([1.], dtype=float32)}
    >>> standardized, state = ws.apply(params, state, weights, update=True)
    >>> standardized['kernel'].round(6).tolist(), standardized['bias'].tolist()
    ([[-1.0], [1.0]], [1.0])
  """

  feature_axes: Axes | None = -1
  scaled: bool = False
  use_gain: bool = False

  def init(
    self, weights: Tree, key: Array | None = None
  ) -> tuple[NormParams, EmptyState]:
    """Returns `(params, state)` for weights, arrays or their shapes.

    Args:
      weights: an array or a pytree of them; `jax.ShapeDtypeStruct` will do.
      key: not needed.

    Returns:
      `NormParams(scale)`, a tree like `weights` of gains of the shape of the
      feature axes, None where there is none; and `EmptyState()`.

    Raises:
      TypeError, ValueError: as `weight_standardize` does, or if `where` chooses
        none.
    """
    del key
    chosen = _choose(self.where, weights)

    def ones(weight: Any) -> Array | None:
      features = _features_of(weight, self.feature_axes)
      axes = _types.other_axes(features, len(weight.shape))
      _check_shared(weight.shape, axes)
      shape = tuple(weight.shape[a] for a in features)
      return jnp.ones(shape, self.param_dtype) if self.use_gain else None

    return NormParams(scale=_map(ones, chosen, weights)), EmptyState()

  def apply(
    self, params: NormParams, state: EmptyState, weights: Tree, *, update: bool
  ) -> tuple[Tree, EmptyState]:
    """Returns `(weights, state)`; `update` makes no difference.

    Args:
      params: the gains, as `init` makes them.
      state: `EmptyState()`.
      weights: an array or a pytree of them.
      update: not needed.

    Returns:
      The weights, those that `where` chooses standardized; and the state.

    Raises:
      TypeError, ValueError: as `weight_standardize` does, or if params or state
        are not those of `init`.
    """
    del update
    chosen = _choose(self.where, weights)
    gained = jax.tree.map(lambda c: c and self.use_gain, chosen)
    _check_tree(params, NormParams(scale=gained), 'params')
    _check_tree(state, EmptyState(), 'state')

    def standardized(weight: Array, gain: Array | None) -> Array:
      return weight_standardize(
        weight,
        gain,
        feature_axes=self.feature_axes,
        scaled=self.scaled,
        epsilon=self.epsilon,
        dtype=self.dtype,
      )

    new = _map(standardized, chosen, weights, params.scale)
    return _replace(chosen, weights, new), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectralNorm(_Options):
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
  epsilon: float = 1e-12

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
    chosen = _choose(self.where, weights)
    tree: Any = jax.tree.structure(chosen)
    key = jax.random.key(0) if key is None else key
    keys = tree.unflatten(jax.random.split(key, tree.num_leaves))

    def draw(weight: Any, key: Array) -> Array:
      _check_matrix(weight)
      return jax.random.normal(key, (1, weight.shape[-1]), self.param_dtype)

    u = _map(draw, chosen, weights, keys)
    sigma = _map(lambda _: jnp.ones((), self.param_dtype), chosen, weights)
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
    chosen = _choose(self.where, weights)
    _check_tree(params, NormParams(), 'params')
    _check_tree(state, SpectralNormState(chosen, chosen), 'state')

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

    pairs = _map(normalized, chosen, weights, *state)
    new = _map(lambda pair: pair[0], chosen, pairs)
    u = _map(lambda pair: pair[1].u, chosen, pairs)
    sigma = _map(lambda pair: pair[1].sigma, chosen, pairs)
    return _replace(chosen, weights, new), SpectralNormState(u, sigma)


def _choose(where: Where | None, weights: Tree) -> Tree:
  """A tree like the weights of booleans: which are normalized."""

  def choose(path: Any, weight: Any) -> bool:
    if where is None:
      return np.ndim(weight) > 1 and jnp.issubdtype(weight.dtype, jnp.inexact)
    return bool(where(_name(path), weight))

  chosen = jax.tree.map_with_path(choose, weights)
  if not any(jax.tree.leaves(chosen)):
    paths = [_name(path) for path, _ in jax.tree.leaves_with_path(weights)]
    raise ValueError(
      f'where={where} chooses none of the weights, whose paths are '
      f'{paths!s:.200}. Give where=lambda path, weight: ..., True for the '
      'weights to normalize; None chooses those of rank two or more.'
    )
  return chosen


def _name(path: Any) -> str:
  """A path as 'Dense_0/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _map(
  function: Callable[..., Any], chosen: Tree, weights: Tree, *others: Tree
) -> Tree:
  """Maps the chosen weights, with what `others` hold beside; None elsewhere."""

  def mapped(path: Any, is_chosen: bool, *leaves: Any) -> Any:
    with _types.note_path(_name(path)):
      return function(*leaves) if is_chosen else None

  return jax.tree.map_with_path(mapped, chosen, weights, *others)


def _replace(chosen: Tree, weights: Tree, new: Tree) -> Tree:
  """The weights, with the chosen ones new."""
  return jax.tree.map(lambda c, w, n: n if c else w, chosen, weights, new)


def _features(feature_axes: Axes | None, ndim: int) -> tuple[int, ...]:
  if feature_axes is None:
    return ()
  return _types.check_axes(feature_axes, ndim, 'feature_axes')


def _features_of(weight: Any, feature_axes: Axes | None) -> tuple[int, ...]:
  """The feature axes of a weight, an array or its shape, both checked."""
  _types.check_dtype(weight.dtype, 'weight')
  return _features(feature_axes, len(weight.shape))


def _check_shared(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
  """Raises unless a mean is that of two elements or more along the axes."""
  count = math.prod(shape[a] for a in axes)
  if count < 2:
    raise ValueError(
      f'weight has shape {shape}, and only {count} element shares a mean along '
      f'the axes {axes}: standardized, all would be zero. Give other '
      'feature_axes, or leave this weight as it is, in trees by where.'
    )


def _check_tree(tree: Tree, wanted: Tree, name: str) -> None:
  """Raises unless `tree` holds an array just where `wanted` is True."""
  structure: Any = jax.tree.structure(wanted)
  try:
    held = [leaf is not None for leaf in structure.flatten_up_to(tree)]
  except ValueError:
    held = None
  if held != jax.tree.leaves(wanted):
    form = jax.tree.map(lambda array: '*' if array else None, wanted)
    raise ValueError(
      f'{name} must be {form!s:.300}, an array at each *, got '
      f'{jax.tree.structure(tree)!s:.300}. Take it from init of this '
      'transform, for these weights.'
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


def _check_steps(n_steps: Any) -> int:
  """Returns the number of steps of the power iteration."""
  if not _types.is_integer(n_steps):
    raise TypeError(
      f'n_steps must be a Python integer, got {type(n_steps).__name__}: '
      f'{n_steps!r:.60}.'
    )
  if n_steps < 1:
    raise ValueError(
      f'n_steps must be 1 or more, got {n_steps}: sigma comes from the last '
      'step. To leave a weight as it is, do not normalize it.'
    )
  return int(n_steps)


def _check_where(where: Any) -> Where | None:
  if where is not None and not callable(where):
    raise TypeError(
      f'where must be a function of a path and a weight, got {where!r:.60}. '
      "For example where=lambda path, weight: 'kernel' in path."
    )
  checked: Where | None = where
  return checked


def _check_feature_axes(feature_axes: Any) -> Axes | None:
  """Returns the axes, hashable; None and an integer stay what they are."""
  if feature_axes is None or _types.is_integer(feature_axes):
    axes: Axes | None = feature_axes
    return axes
  return _types.as_axes(feature_axes, 'feature_axes')


_FIELD_CHECKS: dict[str, Callable[[Any], Any]] = {
  'epsilon': _types.check_epsilon,
  'param_dtype': lambda dtype: _types.check_dtype(dtype, 'param_dtype'),
  'dtype': _types.check_dtype,
  'where': _check_where,
  'feature_axes': _check_feature_axes,
  'n_steps': _check_steps,
  'scaled': lambda flag: _types.check_flag(flag, 'scaled'),
  'use_gain': lambda flag: _types.check_flag(flag, 'use_gain'),
}
