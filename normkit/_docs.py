"""Docstrings of drop-ins: Flax's of its arguments, normkit's of its own.

A Flax class says what its arguments are, a transform what the options are that
Flax lacks. The docstring of a drop-in gets both when its class is made, so that
each sentence stands once and `help` shows them all.
"""

from collections.abc import Callable
import inspect
import re
from typing import TypeVar

Class = TypeVar('Class', bound=type)

# Arguments of Flax's that normkit takes otherwise.
NOTES = {
  'use_fast_variance': 'accepted; the variance is accurate either way.',
  'force_float32_reductions': 'accepted; statistics are float32 or wider.',
}
_ENTRY = re.compile(r'^  (\w+):\s*(\S.*(?:\n   .*)*)', re.MULTILINE)


def documented(flax: type, *own: type) -> Callable[[Class], Class]:
  """Completes the docstring of a class: every argument that it takes.

  Entries are the class's, those of `NOTES`, of Flax's class, and of the classes
  `own`, whichever has one first.
  """

  def complete(cls: Class) -> Class:
    if cls.__doc__ is None:  # python -OO
      return cls
    heading = 'Args' if _section(flax, 'Args') else 'Attributes'
    told: dict[str, str] = {}
    for kind in own:
      told |= _entries(kind, 'Attributes')
    told |= _entries(flax, heading) | NOTES | _entries(cls, heading)
    names = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    lines = [f'  {n}: {told[n]}' for n in names if n in told]
    cls.__doc__ = _with_section(cls, heading, '\n'.join(lines))
    return cls

  return complete


def _section(cls: type, heading: str) -> str:
  """What stands indented below a heading of a docstring, or nothing."""
  found = re.search(
    rf'^{heading}:\n((?:  .*\n|\n)+)', f'{inspect.getdoc(cls)}\n', re.MULTILINE
  )
  return found[1] if found else ''


def _entries(cls: type, heading: str) -> dict[str, str]:
  return dict(_ENTRY.findall(_section(cls, heading)))


def _with_section(cls: type, heading: str, lines: str) -> str:
  """The docstring with these lines below a heading, the first of all."""
  doc = f'{inspect.getdoc(cls)}\n'
  if old := _section(cls, heading):
    doc = doc.replace(f'{heading}:\n{old}', '')
  first = re.search(r'^[A-Z]\w+:$', doc, re.MULTILINE)
  at = first.start() if first else len(doc)
  return f'{doc[:at]}{heading}:\n{lines}\n\n{doc[at:]}'
