"""Checks for people who write a norm or a model of their own.

`check_norm` holds a transform to what `normkit.Norm` promises; it runs all the
checks below, which can also be called one by one. Every failure is an
AssertionError that says what was done and what came out different. The norms
of this package are held to the same checks.
"""

from normkit.testing.assertions import (
  assert_normalized,
  assert_state_unchanged,
)
from normkit.testing.forms import check_init, check_shapes, check_state
from normkit.testing.gradients import check_gradients
from normkit.testing.norm import check_norm
from normkit.testing.transformations import check_traces, check_transformations
from normkit.testing.values import (
  Reference as Reference,
  check_mask,
  check_normalized,
  check_values,
)

__all__ = [
  'assert_normalized',
  'assert_state_unchanged',
  'check_gradients',
  'check_init',
  'check_mask',
  'check_norm',
  'check_normalized',
  'check_shapes',
  'check_state',
  'check_traces',
  'check_transformations',
  'check_values',
]
