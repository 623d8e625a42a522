"""What griffe, which reads docstrings for mkdocs, does not see in ours."""

import importlib
import inspect
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

  def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
    """What modules take from Flax's classes is seen where it is imported."""
    if cls.path.startswith(('normkit.linen', 'normkit.nnx')):
      value = getattr(importlib.import_module(cls.module.path), cls.name)
      cls.docstring = griffe.Docstring(inspect.getdoc(value) or '', parent=cls)
      init = griffe.Function('__init__', parameters=parameters(value))
      cls.set_member('__init__', init)


def parameters(cls: type) -> griffe.Parameters:
  """What the constructor takes, by name and default."""
  return griffe.Parameters(
    *(
      griffe.Parameter(
        p.name,
        kind=getattr(griffe.ParameterKind, p.kind.name.lower()),
        default=None if p.default is p.empty else default(p.default),
      )
      for p in inspect.signature(cls.__init__).parameters.values()
      if p.name not in ('parent', 'name')
    )
  )


def default(value: Any) -> str:
  """A function or a class by its name, all else as it is written."""
  return getattr(value, '__name__', repr(value))


def indent(formula: re.Match[str]) -> str:
  """Two spaces to the right: Markdown takes four for a block of code."""
  return re.sub('^', '  ', formula[0].rstrip(), flags=re.MULTILINE) + '\n'
