"""Adapting a trained model to shifted data at test time, without labels.

AdaBN takes the running statistics of the shifted data: Li, Wang, Shi, Hou and
Liu, "Adaptive Batch Normalization for practical domain adaptation" (2018). TENT
also tunes the scales and biases of the norms, by the entropy of the model's
predictions: Wang, Shelhamer, Liu, Olshausen and Darrell, "Tent: Fully Test-Time
Adaptation by Entropy Minimization" (2021).
"""

from typing import Any, TypeAlias

from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

from normkit import _types
from normkit._types import Array
from normkit.tools import _layers
from normkit.tools._layers import Batches, Model, Run
from normkit.tools.recalibrate import recalibrate

Params: TypeAlias = dict[str, Any]

_TUNED = 'scale', 'bias'


def adapt_statistics(
  call: Run, variables: Model, batches: Batches, *, source: float = 0.0
) -> Model:
  """Takes the running statistics of shifted data, which need no labels.

  With means mu and variances v of the source, the running ones, and of the
  target, the batches,

    mu = source * mu_source + (1 - source) * mu_target,
    v  = source * v_source  + (1 - source) * v_target.

  Schneider et al. take source = N / (N + n) for n target examples, where N says
  how many examples the source is worth: 16 or more helps where n is small. For
  many examples 0, which is AdaBN, does best.

  Args:
    call: the model in training mode: for linen, `call(variables, batch)`
      returns `(outputs, updates)`, as `Module.apply(...,
      mutable=['batch_stats'])` does; for nnx, `call(model, batch)` calls the
      model. Compile it yourself.
    variables: linen variables or an `nnx.Module`.
    batches: whatever `call` takes, in any iterable, or a function that returns
      one.
    source: the share of the source's statistics, from 0 to 1.

  Returns:
    New variables, or a new module; only running statistics are new.

  Raises:
    TypeError: if an argument is not what it should be.
    ValueError: if `source` is out of range, if there is no batch, no layer with
      running statistics, a layer that `call` does not run, or a mean or
      variance that is not finite.

  References:
    Li, Wang, Shi, Hou and Liu, "Adaptive Batch Normalization for practical
    domain adaptation" (2018), section 3. The mixture: Schneider, Rusak, Eck,
    Bringmann, Brendel and Bethge, "Improving robustness against common
    corruptions by covariate shift adaptation" (2020), section 3.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> from normkit.tools.adapt import adapt_statistics
    >>> norm = normkit.linen.BatchNorm(use_running_average=False)
    >>> x = jnp.array([[2.], [4.]])
    >>> variables = norm.init(jax.random.key(0), x)
    >>> def call(variables, x):
    ...   return norm.apply(variables, x, mutable=['batch_stats'])
    >>> adapted = adapt_statistics(call, variables, [x], source=0.5)
    >>> adapted['batch_stats']['mean'].tolist()
    [1.5]
  """
  if not 0 <= _types.check_real(source, 'source') <= 1:
    raise ValueError(
      f'source must be from 0 to 1, got {source!r}. It is a share: N / (N + n) '
      'for n target examples and a source worth N.'
    )
  target = recalibrate(call, variables, batches)
  if not source:
    return target
  new = _layers.layers(target)
  for path, old in _layers.layers(variables).items():
    for name in ('mean', 'var'):
      mixed = source * old[name] + (1 - source) * new[path][name]
      new[path][name] = mixed.astype(old[name].dtype)
  return _layers.replace(target, new)


def tent(
  call: Run,
  variables: Model,
  batches: Batches,
  *,
  optimizer: optax.GradientTransformation | None = None,
  steps: int = 1,
) -> Model:
  """Tunes the norms by the entropy of predictions, without labels.

  The scales and biases of the layers with running statistics follow the
  gradient of the mean entropy of softmax(logits), batch after batch, while each
  layer normalizes by its batch. At the end the running statistics are
  re-estimated, as by `adapt_statistics`, so that the model can be evaluated.

  Online adaptation gives all batches at once, episodic adaptation each batch in
  a call of its own, with the trained variables. Predictions that are sure but
  wrong are made surer: on labelled data of the kind, hold the accuracy against
  that of `adapt_statistics`. All classes should be in each batch.

  Args:
    call: as `adapt_statistics` takes it, in training mode; its outputs, or what
      it returns for nnx, are logits, (..., classes).
    variables: linen variables or an `nnx.Module`.
    batches: whatever `call` takes, in an iterable that can be read twice, or a
      function that returns one.
    optimizer: of optax; None takes Adam at a rate of 0.001, as the paper does
      for small images.
    steps: how many steps to take on each batch.

  Returns:
    New variables, or a new module: scales, biases and running statistics of
    these layers are new.

  Raises:
    TypeError: if an argument is not what it should be.
    ValueError: if an argument is out of range, if there is no batch, no scale
      or bias, or if what was adapted is not finite.

  References:
    Wang, Shelhamer, Liu, Olshausen and Darrell, "Tent: Fully Test-Time
    Adaptation by Entropy Minimization" (2021), section 3.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> from normkit.tools.adapt import tent
    >>> norm = normkit.linen.BatchNorm(use_running_average=False)
    >>> x = jnp.array([[1., 2.], [3., 1.]])
    >>> variables = norm.init(jax.random.key(0), x)
    >>> def call(variables, x):
    ...   return norm.apply(variables, x, mutable=['batch_stats'])
    >>> adapted = tent(call, variables, [x])
    >>> adapted['params']['scale'].round(3).tolist()
    [1.0010000467300415, 1.0010000467300415]
  """
  _check(call, batches, optimizer, steps)
  optimizer = optax.adam(1e-3) if optimizer is None else optimizer
  params = _norm_params(variables)
  state = optimizer.init(params)
  for batch in _layers.read(batches):
    for _ in range(steps):
      gradients = jax.grad(_entropy)(params, call, variables, batch)
      updates, state = optimizer.update(gradients, state, params)
      params = optax.apply_updates(params, updates)
  if not all(bool(jnp.isfinite(p).all()) for p in jax.tree.leaves(params)):
    raise ValueError(
      'the adapted scales and biases are not finite. Nothing was changed: look '
      'for NaN in the batches, or take a lower learning rate.'
    )
  return adapt_statistics(call, _layers.with_params(variables, params), batches)


def _entropy(params: Params, call: Run, model: Model, batch: Any) -> Array:
  """The mean entropy of the predictions."""
  result = call(_layers.with_params(model, params), batch)
  if not isinstance(model, nnx.Module):
    result = _layers.unpack(result)[0]
  if not isinstance(result, jax.Array) or not result.ndim:
    raise TypeError(
      'call must give logits, an array whose last axis is the classes; got '
      f'{jax.tree.structure(result)!s:.200}.'
    )
  entropy: Array = _mean_entropy(result)
  return entropy


@jax.jit
def _mean_entropy(logits: Array) -> Array:
  log_shares = jax.nn.log_softmax(logits)
  shares = jnp.exp(log_shares)
  log_shares = jnp.where(shares > 0, log_shares, 0)  # 0 log 0 is 0
  return -jnp.mean(jnp.sum(shares * log_shares, axis=-1))


def _norm_params(model: Model) -> Params:
  """The scales and biases of the layers with running statistics."""
  found = _layers.layers(model)
  if isinstance(model, nnx.Module):
    modules = _layers.nnx_layers(model)
    held = {
      (*path, name): getattr(modules[path], name, None)
      for path in found
      for name in _TUNED
    }
    params = {p: v[...] for p, v in held.items() if isinstance(v, nnx.Param)}
  else:
    flat = _layers.flat_tree(model.get('params', {}))
    params = {p: v for p, v in flat.items() if p[-1] in _TUNED}
    params = {p: v for p, v in params.items() if p[:-1] in found}
  if not params:
    raise ValueError(
      'no layer with running statistics has a scale or a bias to tune. Use '
      'adapt_statistics.'
    )
  nested: Params = traverse_util.unflatten_dict(params)
  return nested


def _check(call: Any, batches: Any, optimizer: Any, steps: Any) -> None:
  _layers.check_call(call)
  _layers.check_batches(batches, repeats=True)
  if optimizer is not None and not isinstance(
    optimizer, optax.GradientTransformation
  ):
    raise TypeError(
      'optimizer must be a GradientTransformation of optax, such as '
      f'optax.adam(1e-3), got {optimizer!r:.60}.'
    )
  if not (_types.is_integer(steps) and steps > 0):
    raise ValueError(
      f'steps must be a whole number above zero, got {steps!r}. For no step at '
      'all there is adapt_statistics.'
    )
