"""What a comparison of two models finds: layers, and why they part."""

from collections.abc import Iterator, Sequence
import dataclasses
from typing import NamedTuple


class Compared(NamedTuple):
  """A layer there and here, or the outputs of the whole models.

  Attributes:
    name: its path here, several where one layer there is several here, '' for
      the outputs.
    there: its name there.
    call: which of its calls this is, from 0.
    given: how far its inputs are apart: the largest difference, as a share of
      the largest value there. NaN where there is none, infinity where shapes
      differ.
    error: the same of its outputs.

  Examples:
    >>> from normkit.tools.convert import Compared
    >>> Compared('Conv_0', 'conv1', call=0, given=0.0, error=2e-7).error
    2e-07
  """

  name: str
  there: str
  call: int
  given: float
  error: float


class Cause(NamedTuple):
  """Why a layer may compute otherwise.

  Attributes:
    name: its path here.
    there: its name there.
    code: what it is, in a word: 'weights', 'statistics', 'training',
      'epsilon', 'momentum', 'padding', 'strides', 'dilation', 'activation',
      'rounding', 'shape', 'between', 'layer'.
    message: what was found, and what mends it.

  Examples:
    >>> from normkit.tools.convert import Cause
    >>> print(Cause('bn', 'bn1', 'epsilon', 'epsilon is 1e-6 here'))
    epsilon: bn (bn1 there): epsilon is 1e-6 here
  """

  name: str
  there: str
  code: str
  message: str

  def __str__(self) -> str:
    return f'{self.code}: {_both(self.name, self.there)}: {self.message}'


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
  """What `compare` found; `str` makes it plain text.

  Attributes:
    layers: the layers in the order in which they run there, last the outputs of
      the models.
    causes: what differs in the options of layers, wherever it is, and why the
      first layer parts that does.
    tolerance: the largest error of layers that agree.
    unseen: layers here that have weights of a layer there, of which one did not
      run, or runs inside of another's code.

  Examples:
    >>> from normkit.tools.convert import Compared, Comparison
    >>> layer = Compared('fc', 'fc', call=0, given=0.0, error=1e-7)
    >>> end = Compared('', '', call=0, given=0.0, error=0.0)
    >>> print(Comparison((layer, end), causes=(), tolerance=1e-5))
    1 layer agrees, the worst is fc: 1e-07
    outputs: 0e+00, tolerance 1e-05
  """

  layers: tuple[Compared, ...]
  causes: tuple[Cause, ...]
  tolerance: float
  unseen: tuple[str, ...] = ()

  @property
  def first(self) -> Compared | None:
    """The first layer whose output parts, or None."""
    return next((row for row in self.layers if self._parts(row)), None)

  @property
  def agrees(self) -> bool:
    """Whether no layer parts."""
    return self.first is None

  @property
  def error(self) -> float:
    """How far the outputs of the models are apart."""
    return self.layers[-1].error

  def _parts(self, row: Compared) -> bool:
    return row.error > self.tolerance

  def __str__(self) -> str:
    return '\n'.join([*_agreement(self), *_grouped(self.causes)])


def _agreement(found: Comparison) -> Iterator[str]:
  """The lines of how far the models agree."""
  layers, first = found.layers[:-1], found.first
  good = layers[: found.layers.index(first)] if first else layers
  if good:
    worst = max(good, key=lambda row: row.error)
    number = '1 layer agrees' if len(good) == 1 else f'{len(good)} layers agree'
    yield f'{number}, the worst is {worst.name}: {worst.error:.0e}'
  if first and first.name:
    again = f', call {first.call}' if first.call else ''
    yield (
      f'the first that parts is {_both(first.name, first.there)}{again}: '
      f'{first.error:.0e}, its input {first.given:.0e}'
    )
  yield f'outputs: {found.error:.0e}, tolerance {found.tolerance:.0e}'


def _both(name: str, there: str) -> str:
  return f'{name} ({there} there)' if name else 'the outputs'


def _grouped(causes: Sequence[Cause]) -> Iterator[str]:
  """A line for each code and message, and how many more have the same."""
  groups: dict[tuple[str, str], list[Cause]] = {}
  for cause in causes:
    groups.setdefault((cause.code, cause.message), []).append(cause)
  for first, *more in groups.values():
    yield str(first) + (f' (and {len(more)} more)' if more else '')
