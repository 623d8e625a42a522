"""The options of a batch norm, which no file of weights holds."""

from typing import Any, Literal

from normkit import _types
from normkit.tools._frameworks import EPSILONS

# What the batch norm of each framework does unless told otherwise: its
# momentum, unbiased variances, debiased averages.
_DEFAULTS: dict[str, tuple[float | None, bool, bool]] = {
  'torch': (0.1, True, False),
  'keras': (0.99, False, False),
  'haiku': (None, False, True),
  'equinox': (0.99, False, False),
}


def batch_norm_options(
  framework: str,
  *,
  epsilon: float | None = None,
  momentum: float | Literal['default'] | None = 'default',
) -> dict[str, Any]:
  """What to build a batch norm with so that it acts as another framework's.

  Of the other norms, `epsilon` alone matters, and its default is the same.

  Args:
    framework: 'torch', 'keras', 'haiku' or 'equinox'.
    epsilon: as the other framework's layer has it; None takes its default:
      1e-3 in Keras, 1e-5 elsewhere.
    momentum: the momentum (Haiku: decay_rate, which has no default) as the
      other framework's layer has it. PyTorch's is the share of the new value
      and becomes its complement; its None, a plain average, stays None.

  Returns:
    `epsilon`, `momentum`, `unbiased` and `debias`, arguments of
    `normkit.BatchNorm`, `normkit.linen.BatchNorm` and `normkit.nnx.BatchNorm`.

  Raises:
    TypeError: if epsilon or momentum is not a number.
    ValueError: if the framework is another, momentum is needed or not in
      [0, 1], or epsilon is negative or not finite.

  Examples:
    >>> from normkit.tools import convert
    >>> convert.batch_norm_options('torch', momentum=0.1)
    {'epsilon': 1e-05, 'momentum': 0.9, 'unbiased': True, 'debias': False}
  """
  if framework not in _DEFAULTS:
    raise ValueError(
      f'framework must be one of {", ".join(_DEFAULTS)}, got {framework!r}.'
    )
  default, unbiased, debias = _DEFAULTS[framework]
  if momentum == 'default':
    momentum = default
    if momentum is None:
      raise ValueError("momentum: give the decay_rate, Haiku's has no default.")
  share = _types.check_momentum(momentum)
  if framework == 'torch' and share is not None:
    share = 1 - share
  if epsilon is None:
    epsilon = EPSILONS[framework]
  return {
    'epsilon': _types.check_epsilon(epsilon),
    'momentum': share,
    'unbiased': unbiased,
    'debias': debias,
  }
