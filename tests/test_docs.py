"""The code in the guides runs, block after block."""

import pathlib
import re

import jax
import pytest

DOCS = pathlib.Path(__file__).parents[1] / 'docs'
BLOCK = re.compile(r'^```python\n(.*?)^```', re.DOTALL | re.MULTILINE)
BLOCKS = {
  path.name: blocks
  for path in sorted(DOCS.glob('*.md'))
  if (blocks := BLOCK.findall(path.read_text()))
}


@pytest.mark.parametrize('page', BLOCKS)
def test_code_of_page(page):
  names = {'__name__': page}
  with jax.numpy_rank_promotion('allow'):
    for block in BLOCKS[page]:
      exec(compile(block, page, 'exec'), names)
