"""Other libraries' words for arguments: where a call uses one, ours is named.

Python says which argument a function does not have; what stands here adds what
it is called instead. It runs only where a call has already failed.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import inspect
from typing import Any, TypeVar

Function = TypeVar('Function', bound=Callable[..., Any])

_SWITCHES = 'train training is_training inference deterministic eval_mode'
_WIDTHS = (
  'num_features num_channels normalized_shape features channels input_size '
  'size shape'
)
# Our word: theirs.
_THEIRS = {
  'axis': 'dim axes feature_axes reduction_axes channel_axis data_format',
  'bias': 'beta offset',
  'epsilon': 'eps variance_epsilon',
  'feature_axes': 'axis',
  'feature_axis': 'feature_axes',
  'mask': 'where',
  'momentum': 'decay_rate decay',
  'num_features': _WIDTHS,
  'num_groups': 'groups',
  'scale': 'weight gamma',
  'state': 'running_mean running_var',
  'train': f'{_SWITCHES} use_running_average',
  'use_bias': 'affine elementwise_affine create_offset center',
  'use_running_average': f'{_SWITCHES} use_running_stats',
  'use_scale': 'affine elementwise_affine create_scale scale',
  'where': 'mask',
}
_REMARKS = {
  'mask': 'True where an element counts',
  'momentum': "the share of the old value that is kept, PyTorch's 0.1 is 0.9",
  'train': 'True in training, False in evaluation',
  'use_running_average': 'False in training, True in evaluation',
  'where': 'True where an element counts',
}
# Their words for what has no argument here.
_NOTHING = {
  **dict.fromkeys(_WIDTHS.split(), 'the width is found from the input'),
  **dict.fromkeys(
    ('running_mean', 'running_var', 'track_running_stats'),
    'running statistics are the state that apply takes and returns',
  ),
  **dict.fromkeys(('key', 'rng', 'rngs'), 'nothing is drawn at random'),
}
_OURS: dict[str, list[str]] = {word: [] for word in _NOTHING}
for _our, _words in _THEIRS.items():
  for _word in _words.split():
    _OURS.setdefault(_word, []).append(_our)


def own_words(function: Function) -> Function:
  """Names our words in the TypeError of a call that does not bind."""

  @functools.wraps(function)
  def call(*args: Any, **options: Any) -> Any:
    try:
      return function(*args, **options)
    except TypeError as error:
      parameters = inspect.signature(function).parameters
      told = _told(parameters, args, options)
      if 'self' in parameters and not isinstance((*args, None)[0], OwnWords):
        told = 'Call it on an instance, not on the class.'
      told = told or _lacking(parameters, args, options)
      if not told:  # it was called, or the word is nobody's
        raise
      raise TypeError(f'{error}. {told}') from None

  return call  # type: ignore[return-value]


class OwnWords:
  """A class whose constructor and calls name our words, as `own_words` does."""

  __slots__ = ()

  def __new__(cls, *args: Any, **options: Any) -> Any:
    """Checks the words alone: `__init__` takes the arguments."""
    if args or not _OURS.keys().isdisjoint(options):
      parameters = inspect.signature(cls.__init__).parameters
      if told := _told(parameters, (None, *args), options):
        raise TypeError(
          f'{cls.__name__}() got arguments that it does not have. {told}'
        )
    return super().__new__(cls)

  def __init_subclass__(cls, **options: Any) -> None:
    for name in ('init', 'apply', '__call__'):
      if method := vars(cls).get(name):
        setattr(cls, name, own_words(method))
    super().__init_subclass__(**options)


def _told(
  parameters: Mapping[str, inspect.Parameter],
  args: Sequence[Any],
  options: Mapping[str, Any],
) -> str:
  """Sentences on what these parameters do not take; '' where none helps."""
  kinds = {p.kind for p in parameters.values()}
  told = []
  if inspect.Parameter.VAR_KEYWORD not in kinds:
    unknown = [w for w in options if w in _OURS and w not in parameters]
    told = [_translated(word, parameters) for word in unknown]
  if inspect.Parameter.VAR_POSITIONAL not in kinds:
    told.append(_by_name(parameters, args))
  return ' '.join(filter(None, told))


def _lacking(
  parameters: Mapping[str, inspect.Parameter],
  args: Sequence[Any],
  options: Mapping[str, Any],
) -> str:
  """The order, where arguments by position are too few."""
  first = {
    n: p for n, p in parameters.items() if p.kind == p.POSITIONAL_OR_KEYWORD
  }
  lacks = any(
    first[n].default is inspect.Parameter.empty and n not in options
    for n in [*first][len(args) :]
  )
  order = ', '.join(n for n in first if n != 'self')
  return f'The order is {order}.' if lacks else ''


def _translated(word: str, parameters: Mapping[str, Any]) -> str:
  if ours := [our for our in _OURS[word] if our in parameters]:
    remark = next((f': {_REMARKS[o]}' for o in ours if o in _REMARKS), '')
    return f'{word} is {" and ".join(ours)} here{remark}.'
  return f'{word} is not needed: {_NOTHING[word]}.' if word in _NOTHING else ''


def _by_name(
  parameters: Mapping[str, inspect.Parameter], args: Sequence[Any]
) -> str:
  """What to do with arguments that are too many by position."""
  named = inspect.Parameter.KEYWORD_ONLY
  first = [n for n, p in parameters.items() if p.kind != named]
  if not (extra := args[len(first) :]):
    return ''
  by_name = [n for n, p in parameters.items() if p.kind == named]
  likely = {bool: ('train', 'use_running_average'), int: ('num_groups',)}
  name = next((n for n in likely.get(type(extra[0]), ()) if n in by_name), '')
  example = f': {name}={extra[0]!r}' if name else ''
  taken = ', '.join(n for n in first if n != 'self') or 'none'
  rest = f'; all else by name{example}' if by_name else ''
  told = f'Its positional arguments: {taken}{rest}.'
  if first[0] == 'self' and not name and type(extra[0]) is int:
    told += ' If that is the width: it is found from the input.'
  mask = next((n for n in ('where', 'mask') if n in by_name), '')
  if mask and hasattr(extra[0], 'dtype'):
    told += f' If that is a mask: {mask}=.'
  return told
