"""The code in the guides runs, block after block."""

import pathlib
import re

import jax
import pytest

DOCS = pathlib.Path(__file__).parents[1] / 'docs'


@pytest.mark.parametrize('page', ['choosing.md', 'weights.md'])
def test_code_of_page(page):
  blocks = re.findall(
    r'^```python\n(.*?)^```',
    (DOCS / page).read_text(),
    re.DOTALL | re.MULTILINE,
  )
  assert blocks
  names = {'__name__': page}
  with jax.numpy_rank_promotion('allow'):
    for block in blocks:
      exec(compile(block, page, 'exec'), names)
