"""The code in the guides runs, block after block."""

import pathlib
import re

import jax
import pytest

DOCS = pathlib.Path(__file__).parents[1] / 'docs'
BLOCK = re.compile(r'^```python\n(.*?)^```', re.DOTALL | re.MULTILINE)
OWN = (
  'building.md',
  'coming.md',
  'others.md',
  'questions.md',
  'tutorial.md',
  'writing.md',
)
BLOCKS = {
  path.name: blocks
  for path in sorted(DOCS.glob('*.md'))
  # Those have tests of their own: test_building.py, test_others.py,
  # test_guides.py, below.
  if path.name not in OWN and (blocks := BLOCK.findall(path.read_text()))
}


LONG = (
  'adapt.md',
  'choosing.md',
  'freeze.md',
  'inspect.md',
  'recalibrate.md',
  'weights.md',
)
# Loops of which some rounds tell as much, and what runs in their place.
SHORTER = {
  'adapt.md': {
    'range(150)': 'range(3)',
    'steps=15': 'steps=2',
    'np.split(x, 4)': 'np.split(x[:80], 2)',
  },
}
PAGES = [
  pytest.param(page, marks=pytest.mark.second_tier if page in LONG else ())
  for page in BLOCKS
]


def test_long_pages_are_there():
  assert set(LONG) <= set(BLOCKS)


@pytest.mark.parametrize('page', PAGES)
def test_code_of_page(page):
  names = {'__name__': page}
  with jax.numpy_rank_promotion('allow'):
    for block in shorter(page):
      exec(compile(block, page, 'exec'), names)


def shorter(page):
  """The blocks of a page, those loops cut short."""
  text = '\0'.join(BLOCKS[page])
  for loop, short in SHORTER.get(page, {}).items():
    assert text.count(loop) == 1
    text = text.replace(loop, short)
  return text.split('\0')


@pytest.mark.second_tier
def test_writing(capsys):
  """The norm of the page, and what its checks are said to print."""
  page = (DOCS / 'writing.md').read_text()
  blocks = re.findall(r'^```(\w*)\n(.*?)^```', page, re.DOTALL | re.MULTILINE)
  names, printed = {'__name__': 'writing.md'}, []
  with jax.numpy_rank_promotion('allow'):
    for language, block in blocks:
      if language == 'python':
        exec(compile(block, 'writing.md', 'exec'), names)
        printed.append(capsys.readouterr().out)
  said = [block for language, block in blocks if language == 'output']
  assert len(said) == 2
  assert [*map(rounded, filter(None, printed))] == [*map(rounded, said)]


def rounded(text):
  return re.sub(r'\d+\.\d{3,}', 'a number', text)
