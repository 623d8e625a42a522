"""What griffe, which reads docstrings for mkdocs, does not see in ours."""

import re
from typing import Any

import griffe

SECTION = re.compile(r'^[A-Z]\w+:$', re.MULTILINE)
FORMULA = re.compile(r'(?<=\n\n)(?:  .+(?:\n|$))+')
RESULT = re.compile(r'(?<=^Returns:\n  )`(.+?)`(?=:)', re.MULTILINE)


class Docstrings(griffe.Extension):
  """Formulas as blocks of code, results named as types, fields of modules."""

  def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
    """Changes the docstring that the page is made of, and no file."""
    if obj.docstring is None or obj.is_module:
      return
    text = RESULT.sub(r'\1', obj.docstring.value)
    first = SECTION.search(text)
    end = first.start() if first else len(text)
    obj.docstring.value = FORMULA.sub(indent, text[:end]) + text[end:]

  def on_class_instance(self, *, cls: griffe.Class, **_: Any) -> None:
    """Flax makes dataclasses of linen modules, with no decorator to see."""
    if cls.module.path == 'normkit.linen':
      name = griffe.ExprName('dataclasses.dataclass')
      cls.decorators.append(griffe.Decorator(name, lineno=None, endlineno=None))


def indent(formula: re.Match[str]) -> str:
  """Two spaces to the right: Markdown takes four for a block of code."""
  return re.sub('^', '  ', formula[0].rstrip(), flags=re.MULTILINE) + '\n'
