"""The cells of an example that run, in a script and in a notebook.

Importing an example runs nothing: these cells ask for `__name__`.
"""

import ast
from collections.abc import Iterator
import pathlib
import sys
from types import ModuleType
from typing import Any

import pytest

GUARD = "__name__ == '__main__'"


def guarded(path: pathlib.Path) -> Iterator[ast.If]:
  """The statements that ask for `__name__`, one a cell."""
  for node in ast.parse(path.read_text()).body:
    if isinstance(node, ast.If) and ast.unparse(node.test) == GUARD:
      yield node


def run(module: ModuleType, *flags: Any) -> None:
  """Runs an example as a script would, with what was imported of it.

  So what one run compiles serves the next, and patches hold.
  """
  path = pathlib.Path(str(module.__file__))
  cells = ast.Module([*guarded(path)], type_ignores=[])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'argv', [path.name, *map(str, flags)])
    exec(compile(cells, path, 'exec'), vars(module) | {'__name__': '__main__'})
