"""The package itself: what imports what, and what is public."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import normkit as nk

ROOT = pathlib.Path(nk.__file__).parent
MODULES = (
  'normkit',
  'normkit.testing',
  'normkit.linen',
  'normkit.nnx',
  'normkit.weights',
  'normkit.masks',
  'normkit.recurrent',
  'normkit.tools.adapt',
  'normkit.tools.convert',
  'normkit.tools.fold',
  'normkit.tools.freeze',
  'normkit.tools.inspect',
  'normkit.tools.recalibrate',
  'normkit.tools.replace',
)
# One way only: a module may import from the rows below its own, and from a
# package that is below its own package.
LAYERS = (
  ('__main__',),
  ('tools.cli',),
  ('tools.adapt', 'tools.convert'),
  ('tools._compare', 'tools._back'),
  ('tools', 'testing'),
  ('tools._planner', 'tools._layouts', 'tools._gradients', 'tools._causes'),
  ('tools._statistics', 'tools._inspection', 'tools._seen'),
  ('tools._evidence', 'tools._names'),
  ('tools._solve', 'tools._flow'),
  ('tools._units',),
  ('tools._plan', 'tools._template', 'tools._layers', 'tools._views'),
  ('tools._pairs',),
  ('tools._stateless',),
  ('tools._chains', 'tools._advice', 'tools._options', 'tools._classes'),
  ('tools._runs', 'tools._comparison'),
  ('tools._frameworks',),
  ('tools._program', 'tools.files'),
  ('tools._extras', 'tools._attention'),
  (
    'testing.forms',
    'testing.gradients',
    'testing.transformations',
    'testing.values',
  ),
  ('testing.assertions',),
  ('testing._calls', 'testing._compare'),
  ('linen.in_place', 'nnx.in_place'),
  ('linen', 'nnx'),
  ('linen._shared', 'nnx._shared', '_docs', '_in_place'),
  ('recurrent', 'masks'),
  ('recurrent.cells',),
  ('norms', 'weights'),
  ('weights._shared', 'norms._running', 'norms._evonorm', 'norms._covariance'),
  ('norms._pointwise',),
  ('norm', 'general', 'policies'),
  ('rows', 'arguments'),
  ('plain',),
  ('affine', 'moments'),
  ('derivatives',),
  ('pooling', 'lean'),
  ('centred',),
  ('kernels.triton', 'kernels.mosaic_gpu', 'kernels.mosaic_tpu'),
  ('kernels.mosaic_groups',),
  ('kernels.launch',),
  ('kernels.dispatch', 'kernels.warpgroups'),
  ('kernels.cases', 'kernels.flat', 'kernels.rows'),
  ('kernels.plans', 'kernels.activations', 'kernels.clusters'),
  ('kernels.configs', 'kernels.record'),
  ('kernels',),
  ('sums',),
  ('closures', 'samples', 'sets'),
  ('_shards', '_groups', 'platforms'),
  ('forms',),
  ('_primitives', '_ops'),
  ('_lazy', '_rules', '_types', '_words'),
)
DEPTH = {name: depth for depth, row in enumerate(LAYERS) for name in row}
LONGEST = 450  # lines of a file


def modules():
  for path in sorted(ROOT.rglob('*.py')):
    name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    if name != '__init__':
      yield pytest.param(path, name, id=name)


def imported(path):
  """The modules of normkit that a file imports, without the prefix."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      if node.module == 'normkit':
        yield from (alias.name for alias in node.names)
      elif node.module.startswith('normkit.'):
        name = node.module.removeprefix('normkit.')
        for alias in node.names:
          inner = ROOT.joinpath(*name.split('.'), f'{alias.name}.py')
          yield f'{name}.{alias.name}' if inner.exists() else name
    elif isinstance(node, ast.Import):
      for alias in node.names:
        if alias.name.startswith('normkit.'):
          yield alias.name.removeprefix('normkit.')


def depth(name):
  return DEPTH[name] if name in DEPTH else DEPTH[name.split('.')[0]]


def above(name, other):
  """Whether `name` may import `other`."""
  package, others = name.split('.')[0], other.split('.')[0]
  by_package = package == others or depth(package) < depth(others)
  return by_package and depth(name) < depth(other)


@pytest.mark.parametrize(('path', 'name'), list(modules()))
def test_import_rule(path, name):
  """tools, testing > linen, nnx > norms, weights > norm > moments > ..."""
  assert name.split('.')[0] in DEPTH, f'{name} has no place in the house'
  broken = [
    other
    for other in imported(path)
    if not above(name, other)
    and not (name.endswith('__init__') and other.startswith(name[:-8]))
  ]
  assert not broken, f'{name} imports {broken}: never up, never sideways'


def test_import_rule_can_fail():
  assert above('linen', 'norms.batch')
  assert not above('norms.batch', 'norms.layer')
  assert not above('moments', 'norm')
  assert not above('norm', 'linen')
  assert above('weights.weight_normalization', 'weights._shared')
  assert not above('weights.weight_normalization', 'weights.standardization')
  assert not above('norms.layer', 'weights._shared')
  assert above('tools.fold', 'tools._planner')
  assert not above('tools.fold', 'testing._calls')
  assert not above('testing.norm', 'tools.files')


def long_files(root):
  """The lines of each file with more than there may be."""
  lines = {
    str(path.relative_to(root)): len(path.read_text().splitlines())
    for path in root.rglob('*.py')
  }
  return {path: count for path, count in lines.items() if count > LONGEST}


def test_no_file_is_long():
  assert not long_files(ROOT), 'part it where it holds several subjects'


def test_a_long_file_is_found(tmp_path):
  (tmp_path / 'full.py').write_text('x = 1\n' * LONGEST)
  (tmp_path / 'long').mkdir()
  (tmp_path / 'long' / 'long.py').write_text('x = 1\n' * (LONGEST + 1))
  assert long_files(tmp_path) == {'long/long.py': LONGEST + 1}


def test_importing_normkit_imports_jax_alone():
  code = (
    'import sys, normkit; '
    'others = "flax", "optax", "chex", "jax.extend"; '  # the last: for Pallas
    'print([m for m in others if m in sys.modules], "jax" in sys.modules)'
  )
  run = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert run.stdout.strip() == '[] True'


@pytest.mark.parametrize('module', MODULES)
def test_public_names_have_examples(module):
  """Each public class and function is documented, with a doctest."""
  package = importlib.import_module(module)
  names = getattr(package, '__all__', None) or [
    name
    for name, value in vars(package).items()
    if not name.startswith('_')
    and callable(value)
    and getattr(value, '__module__', '') == module
  ]
  assert names
  for name in names:
    assert '>>> ' in (getattr(package, name).__doc__ or ''), name


def test_version():
  assert nk.__version__.count('.') == 2


def test_a_checkout_that_is_not_installed():
  code = """
from importlib import metadata

def version(name):
  raise metadata.PackageNotFoundError(name)

metadata.version = version
import normkit
assert normkit.__version__ == '0+not.installed'
normkit.LayerNorm()
"""
  subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT.parent)


def test_every_place_names_the_version():
  top = ROOT.parent
  project = tomllib.loads((top / 'pyproject.toml').read_text())['project']
  version = project['version']
  changes = re.findall(r'^## (\S+)', (top / 'CHANGELOG.md').read_text(), re.M)
  assert changes[0] == version
  cited = re.search(r'^version: (.*)', (top / 'CITATION.cff').read_text(), re.M)
  assert cited[1] == version


def test_readme_is_one_screen_and_names_its_commands():
  lines = (ROOT.parent / 'README.md').read_text().splitlines()
  assert len(lines) < 120
  commands = [line for line in lines if line.startswith('pip install')]
  assert commands == [
    "pip install '.[examples]' && python examples/train_cnn.py",
    "pip install -e '.[test]' && pytest",
  ]
