"""Libraries that only some tools need: what to install where one is missing."""

from collections.abc import Iterator
import contextlib


@contextlib.contextmanager
def needed(extra: str) -> Iterator[None]:
  """Names the extra of normkit whose library an import does not find."""
  try:
    yield
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"{error}. It comes with pip install 'normkit[{extra}]', in a checkout "
      f"of normkit pip install '.[{extra}]'.",
      name=error.name,
    ) from error
