"""Formulas of docstrings, which are indented by two spaces, as blocks of code.

Markdown takes four spaces for a block of code, and less for a paragraph.
"""

import re
from typing import Any

import griffe

SECTION = re.compile(r'^[A-Z]\w+:$', re.MULTILINE)
FORMULA = re.compile(r'(?<=\n\n)(?:  .+(?:\n|$))+')


class Formulas(griffe.Extension):
  """Indents the formulas in front of the first section of each docstring."""

  def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
    """Changes the docstring that the page is made of, and no file."""
    if obj.docstring is None or obj.is_module:
      return
    text = obj.docstring.value
    first = SECTION.search(text)
    end = first.start() if first else len(text)
    obj.docstring.value = FORMULA.sub(indent, text[:end]) + text[end:]


def indent(formula: re.Match[str]) -> str:
  """The same lines, two spaces to the right."""
  return re.sub('^', '  ', formula[0].rstrip(), flags=re.MULTILINE) + '\n'
