"""Which combinations run first, and which wait for `pytest --all`."""

import itertools

import pytest


def second_tier(*values, **options):
  """A row of a parametrization that waits for `--all`."""
  return pytest.param(*values, marks=pytest.mark.second_tier, **options)


def thinned(*columns, every, keep=1):
  """Every combination of values; one in so many is of the first tier.

  Those lie on diagonals, so that each value comes with each value of every
  other column, or with all but a few. Of the others one in `keep` is there at
  all: with two, of three columns or more, every pair of values still is.
  """
  rows = []
  for row in itertools.product(*map(enumerate, columns)):
    positions, values = zip(*row, strict=True)
    is_first = sum(positions) % every == 0
    if not is_first and sum(positions) % keep:
      continue
    rows.append(pytest.param(*values) if is_first else second_tier(*values))
  return rows
