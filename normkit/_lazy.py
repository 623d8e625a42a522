"""Packages whose modules are imported at their first use, not before."""

from collections.abc import Callable
import importlib
from types import ModuleType


def modules(package: str, *names: str) -> Callable[[str], ModuleType]:
  """The `__getattr__` of a package that imports these modules when asked."""

  def imported(name: str) -> ModuleType:
    if name in names:
      return importlib.import_module(f'{package}.{name}')
    raise AttributeError(f'module {package!r} has no attribute {name!r}')

  return imported
