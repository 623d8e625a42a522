"""Tools for whole models: what people do to norms after and before training."""

from typing import TYPE_CHECKING

from normkit import _lazy

if not TYPE_CHECKING:  # a checker would take every name then
  __getattr__ = _lazy.modules(
    __name__,
    'adapt',
    'convert',
    'fold',
    'freeze',
    'inspect',
    'recalibrate',
    'replace',
  )
