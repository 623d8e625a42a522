"""Folding norms into the layers beside them, for inference.

In evaluation batch norm is an affine map of each feature. A convolution or a
dense layer before it or after it can do that map with its own kernel and bias.
Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference" (2018), section 3.2.

The model is traced, its norms are found as the sums and products that they are,
and the traced program runs again without them. A value of the program is
*constant* if it follows from the variables alone; a *chain* is a run of sums
and products with constants, casts and changes of shape, each of which is the
only reader of the one before.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path
import numpy as np

from normkit._types import Array
from normkit.tools._plan import Plan, Row
from normkit.tools._planner import Planner, planner
from normkit.tools._program import Call, names, struct


@dataclasses.dataclass(frozen=True)
class Report:
  """What was folded, what was not and why; `str` makes a table of it.

  Attributes:
    rows: one for each norm, in the order of the program.
    error: the largest difference between the outputs of the model and of the
      folded one, as a share of the largest output. Of several arrays, that of
      the one nearest to its tolerance.
    tolerance: the largest error allowed there.
    compared: whether the outputs depend on x at all. Where they do not, as
      those of a last layer of zeros, the error says nothing.

  Examples:
    >>> from normkit.tools import fold
    >>> print(fold.Report((fold.Row('bn', 'conv', ''),), 1e-7, 1e-4))
    norm  folded into
    bn    conv
    error 1e-07, tolerance 1e-04
  """

  rows: tuple[Row, ...]
  error: float
  tolerance: float
  compared: bool = True

  def __str__(self) -> str:
    cells = [('norm', 'folded into')]
    cells += [(r.norm, r.layer or f'- ({r.reason})') for r in self.rows]
    width = max(len(norm) for norm, _ in cells)
    lines = [f'{norm:{width}}  {fate}' for norm, fate in cells]
    end = f'error {self.error:.0e}, tolerance {self.tolerance:.0e}'
    if not self.compared:
      end = (
        'nothing compared: the outputs do not depend on x. Give variables '
        'whose last layer is not zero'
      )
    return '\n'.join([*lines, end])


@dataclasses.dataclass(frozen=True, eq=False)
class Folded:
  """A model whose norms are in its layers; made by `fold`.

  Attributes:
    params: the arrays that are left, by name: the path of the leaf that each
      comes from, '...:bias' for what folding adds to a layer, '...:2' for the
      second array made of one leaf.
    report: what was folded, what was not and why.

  Examples:
    >>> import jax.numpy as jnp
    >>> from normkit.tools.fold import fold
    >>> variables = {'kernel': jnp.eye(2), 'gain': jnp.array([[2., 3.]])}
    >>> x = jnp.ones((1, 2))
    >>> folded = fold(lambda v, x: (x @ v['kernel']) * v['gain'], variables, x)
    >>> folded.params
    {'kernel': Array([[2., 0.],
           [0., 3.]], dtype=float32)}
  """

  params: dict[str, Array]
  report: Report
  _plan: Plan = dataclasses.field(repr=False)
  _plans: Planner = dataclasses.field(repr=False)

  def apply(self, params: Mapping[str, Array], x: Any) -> Any:
    """The folded model: pure, for any transformation of JAX.

    Args:
      params: `self.params`, or arrays in their place.
      x: input like the one that the model was folded with. For other shapes
        the model is traced again, which holds its code, not its variables.

    Returns:
      What the model returns.

    Raises:
      ValueError: if `params` are not those of this model for inputs like x, or
        the model takes its variables another way for such inputs.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from normkit.tools.fold import fold
      >>> variables = {'kernel': jnp.eye(2), 'gain': jnp.array([[2., 3.]])}
      >>> def call(variables, x):
      ...   return (x @ variables['kernel']) * variables['gain']
      >>> folded = fold(call, variables, jnp.ones((1, 2)))
      >>> jax.jit(folded.apply)(folded.params, jnp.ones((4, 2)))[3]
      Array([2., 3.], dtype=float32)
    """
    leaves, tree = jax.tree.flatten(x)
    plan = self._plans(tree, tuple(map(struct, leaves)))
    plan.check(params, self._plan)
    return jax.tree.unflatten(plan.tree, plan.run(params, leaves))


def fold(
  call: Call, variables: Any, x: Any, *, tolerance: float | None = None
) -> Folded:
  """Folds the norms of a model in evaluation into the layers beside them.

  For a layer with kernel K and an affine map of its outputs,

    (x K + c) * a + b = x (K * a) + (c * a + b),

  and of its inputs, (x * a + b) K = x (a * K) + b K. Layers are convolutions,
  grouped, dilated, depthwise and transposed ones too, and products with a
  constant array: Dense, DenseGeneral, einsum. The layer before a norm is
  preferred. A shift goes into the layer after it only if that pads nothing.

  Norms are found in the traced program, not by names: linen, nnx, Haiku and
  plain functions are all the same. So are found other affine maps with
  parameters, such as the scale and bias of a layer norm before a dense layer.
  Kernels are multiplied in float32 or wider and keep their dtype; biases are
  float32 or wider. What cannot be folded is computed as before: norms that take
  statistics of their input too, batch norm in training among them.

  Args:
    call: the model in evaluation, `call(variables, x)`.
    variables: a pytree of arrays, or an `nnx.Module`.
    x: a real input, an array or a pytree of arrays. The outputs of both
      programs are compared on it.
    tolerance: the largest error allowed, as a share of the largest output; None
      chooses for each output by its dtype and those of the folded kernels, the
      narrowest of them: 1e-4 in float32, 5e-2 in half precision.

  Returns:
    A `Folded`: parameters, `apply(params, x)` and a report.

  Raises:
    TypeError: if `call` is not a function, or a leaf is not a concrete array.
    ValueError: if nothing can be folded and a norm takes statistics over the
      first axis, as batch norm does in training; if the call changes an
      `nnx.Module`; if x is empty; if the outputs are not finite or not
      floating-point; if `tolerance` is not positive, or the outputs differ by
      more than it.

  References:
    Jacob, Kligys, Chen, Zhu, Tang, Howard, Adam and Kalenichenko,
    "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference" (2018), section 3.2.

  Examples:
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from normkit.tools.fold import fold
    >>> model = nn.Sequential([
    ...   nn.Conv(8, (3, 3), use_bias=False),
    ...   nn.BatchNorm(use_running_average=True),
    ... ])
    >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    >>> folded = fold(model.apply, model.init(jax.random.key(1), x), x)
    >>> folded.report.rows
    (Row(norm='layers_1', layer='layers_0', reason=''),)
    >>> sorted(folded.params)
    ['params/layers_0/kernel', 'params/layers_0/kernel:bias']
    >>> folded.apply(folded.params, x).shape
    (2, 8, 8, 8)
  """
  if not callable(call):
    raise TypeError(
      f'call must be a function of (variables, x), got {call!r}. Give '
      'model.apply, or lambda model, x: model(x) for an nnx.Module.'
    )
  if tolerance is not None and not tolerance > 0:
    raise ValueError(
      f'tolerance must be positive, got {tolerance}. None chooses by dtype.'
    )
  call, variables = _functional(call, variables)
  _check_arrays(variables, 'variables')
  _check_arrays(x, 'x')
  leaves = jax.tree.leaves(x)
  if leaves and not any(leaf.size for leaf in leaves):
    shapes = ', '.join(str(leaf.shape) for leaf in leaves)
    raise ValueError(
      f'x must have elements, got {shapes}: the folded model is compared with '
      'the model on it. Give a real input.'
    )
  folded = _attempt(call, variables, x, tolerance, True)
  report = folded.report
  if report.error > report.tolerance and folded._plan.looks_ahead:
    folded = _attempt(call, variables, x, tolerance, False)
    report = folded.report
  if report.error > report.tolerance:
    raise ValueError(
      f'the outputs of the folded model differ by {report.error:.1e} of the '
      f'largest output, beyond the tolerance of {report.tolerance:.1e}. If the '
      'model draws random numbers, turn that off; if it computes in lower '
      'precision than its outputs have, give a larger tolerance.'
    )
  return folded


def _functional(call: Call, variables: Any) -> tuple[Call, Any]:
  """The call and its variables, without an `nnx.Module`."""
  if not isinstance(variables, nnx.Module):
    return call, variables
  graph, state = nnx.split(variables)

  def pure(state: Any, x: Any) -> Any:
    before = tree_flatten_with_path(state)[0]
    model = nnx.merge(graph, state)
    y = call(model, x)
    after = dict(tree_flatten_with_path(nnx.state(model))[0])
    for path, old in before:
      if after.get(path) is not old:
        raise ValueError(
          f'the call changes {names(path, False)[0]} of the model: only a '
          'model in evaluation can be folded. Call model.eval() first.'
        )
    return y

  return pure, state


def _check_arrays(tree: Any, name: str) -> None:
  for path, leaf in tree_flatten_with_path(tree)[0]:
    concrete = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    if not concrete or isinstance(leaf, jax.core.Tracer):
      raise TypeError(
        f'{name}{keystr(path)} must be a concrete array, got {leaf!r}: the '
        'folded model is compared with the model. Call fold outside of jit, '
        'with real arrays.'
      )


def _attempt(
  call: Call,
  variables: Any,
  x: Any,
  tolerance: float | None,
  forward: bool,
  overflows: frozenset[str] = frozenset(),
) -> Folded:
  """Folds, but not into kernels that overflow, and compares."""
  leaves, tree = jax.tree.flatten(x)
  with jax.default_matmul_precision('highest'):
    plans = planner(call, variables, forward, overflows)
    plan = plans(tree, tuple(map(struct, leaves)))
    params = jax.jit(plan.arrays)(variables)
    if found := plan.overflows(params):
      overflows |= found
      return _attempt(call, variables, x, tolerance, forward, overflows)
    wanted = jax.tree.leaves(jax.jit(call)(variables, x))
    given = jax.jit(plan.run)(params, leaves)
  kernels = [fold.layer.kernel.aval.dtype for fold in plan.folds.values()]
  pairs = [
    (_distance(y, z), tolerance or _tolerance(y.dtype, *kernels))
    for y, z in zip(wanted, given, strict=True)
    if jnp.issubdtype(y.dtype, jnp.inexact) and y.size
  ]
  if not pairs:
    raise ValueError(
      'the model returns no floating-point array to compare, or an empty one: '
      'fold what gives the scores, and take classes from them afterwards.'
    )
  error, limit = max(pairs, key=lambda pair: pair[0] / pair[1])
  compared = error > 0 or not _same(
    wanted, jax.tree.leaves(jax.jit(call)(variables, _changed(x)))
  )
  report = Report(tuple(plan.rows), error, limit, compared)
  return Folded(params, report, plan, plans)


def _changed(x: Any) -> Any:
  """Another input: floats moved, all else in another order."""
  return jax.tree.map(
    lambda a: 1 - a / 2 if jnp.issubdtype(a.dtype, jnp.floating) else a[::-1],
    x,
  )


def _same(wanted: list[Array], given: list[Array]) -> bool:
  return all(np.array_equal(y, z) for y, z in zip(wanted, given, strict=True))


def _tolerance(*dtypes: Any) -> float:
  """That of the narrowest dtype."""
  return max(_TOLERANCES.get(jnp.finfo(dtype).bits, 0.5) for dtype in dtypes)


_TOLERANCES = {64: 1e-9, 32: 1e-4, 16: 5e-2}


def _distance(wanted: Array, given: Array) -> float:
  """The largest difference, as a share of the largest wanted number."""
  y, z = (np.asarray(a).astype(np.complex128) for a in (wanted, given))
  if not np.isfinite(y).all():
    raise ValueError(
      'the outputs of the model on x are not all finite, so that nothing can '
      'be compared. Give an input, and variables, that it can do.'
    )
  if not np.isfinite(z).all():
    return np.inf
  return float(np.abs(y - z).max() / (np.abs(y).max() or 1))
