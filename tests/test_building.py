"""docs/building.md: the norm that the page adds, added by the page alone."""

import pathlib
import re
import shutil
import subprocess
import sys
import types

import cases
import family
import jax
import numpy as np
import pytest

from normkit import testing
import normkit.linen

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / 'docs' / 'building.md').read_text()


def block(path):
  """The code that the page puts into a file."""
  found = re.search(rf'^`{path}`.*\n\n```python\n((?:.*\n)*?)```', PAGE, re.M)
  return found[1]


NORM = 'normkit/norms/deviation.py'


def run(code):
  """The page's norm, from its code, and the page's reference."""
  module = sys.modules['deviation'] = types.ModuleType('deviation')
  exec(code, vars(module))  # in a module, where dataclasses look
  exec(block('tests/family.py'), scope := dict(vars(family)))
  return module, scope['deviation_norm']()


def test_the_norm_of_the_page():
  module, reference = run(block(NORM))
  x, transform = cases.draw((4, 6)), module.DeviationNorm()
  where = cases.draw_mask((4, 6))
  testing.check_norm(transform, x, reference, where=where)
  layer = normkit.linen.Norm(transform)
  variables = layer.init(jax.random.key(0), x, train=True)
  np.testing.assert_array_equal(
    layer.apply(variables, x, train=True), module.deviation_norm(x)
  )


def test_a_broken_norm_is_found():
  """The check that the page promises is no formality."""
  module, reference = run(block(NORM).replace('* root', '* root * 2'))
  with pytest.raises(AssertionError):
    testing.check_norm(module.DeviationNorm(), cases.draw((4, 6)), reference)


@pytest.mark.second_tier
def test_the_page_followed(tmp_path):
  """In a copy of the project: its files, its command."""
  for name in ('normkit', 'tests', 'conftest.py', 'pyproject.toml'):
    copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
    copy(ROOT / name, tmp_path / name)
  (tmp_path / 'normkit/norms/deviation.py').write_text(
    block('normkit/norms/deviation.py')
  )
  edit(
    tmp_path / 'normkit/__init__.py', block('normkit/__init__.py'), '__all__'
  )
  edit(tmp_path / 'normkit/__init__.py', "  'DeviationNorm',\n", "  'DyT'")
  with (tmp_path / 'tests/family.py').open('a') as file:
    file.write('\n\n' + block('tests/family.py'))
  row = block('tests/cases.py').splitlines()[-2] + '\n'
  edit(tmp_path / 'tests/cases.py', row, "  Case('batch_norm', ")
  pair = block('tests/test_docstrings.py').splitlines()[-2] + '\n'
  edit(tmp_path / 'tests/test_docstrings.py', pair, "  'batch_norm': ")
  files = 'tests/test_conformance.py', 'tests/test_docstrings.py', NORM
  chosen = '-kdeviation or docstrings'
  passed = pytest_in(tmp_path, '--all', *files, chosen)
  first, second, examples = (passed.count(file) for file in files)
  assert first > 10
  assert second > 50
  assert examples


def pytest_in(folder, *arguments):
  """The files of the tests that pass, when all do."""
  run = subprocess.run(
    [sys.executable, '-m', 'pytest', '-v', '-n', '0', *arguments],
    cwd=folder,
    env={'PYTHONPATH': str(folder), 'PATH': ''},
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stdout[-2000:]
  return re.findall(r'^(\S+?)::.* PASSED', run.stdout, re.M)


def edit(path, text, before):
  """Writes text above the line that begins so."""
  content = path.read_text()
  assert content.count(f'\n{before}') >= 1
  path.write_text(content.replace(f'\n{before}', f'\n{text}{before}', 1))
