"""Examples as notebooks, what the site gives to download, small runs."""

import ast
import importlib.util
import io
import json
import os
import pathlib
import subprocess
import sys
import zipfile

import cells
from matplotlib.figure import Figure
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NEED = "needs {}: pip install -e '.[notebooks]'"


@pytest.fixture(scope='module')
def pages():
  """The hook that makes the site's downloads."""
  pytest.importorskip('mkdocs', reason="needs mkdocs: pip install -e '.[docs]'")
  path = ROOT / 'docs' / 'hooks' / 'pages.py'
  spec = importlib.util.spec_from_file_location('pages', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def run(*command, folder):
  done = subprocess.run(
    [sys.executable, *command],
    cwd=folder,
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def test_downloads_hold_what_an_example_imports(pages):
  names = zipfile.ZipFile(io.BytesIO(pages.archive('pooling'))).namelist()
  modules = {'data.py', 'figures.py', 'options.py', 'summary.py'}
  assert names[-1] == 'pooling/pooling.py'
  assert set(names[:-1]) == {f'pooling/{name}' for name in modules}
  notebook = json.loads(
    pages.download('pooling', dict(pages.read_examples())['pooling'])
  )
  sources = [''.join(cell['source']) for cell in notebook['cells']]
  written = {s.split()[1] for s in sources if s.startswith('%%writefile')}
  assert written == modules
  assert sources[0].startswith('# What is pooled')


@pytest.mark.second_tier
def test_a_downloaded_notebook_shows_its_figure_and_table(pages, tmp_path):
  pytest.importorskip('ipykernel', reason=NEED.format('ipykernel'))
  cells = dict(pages.read_examples())['pooling']
  path = tmp_path / 'pooling.ipynb'
  path.write_text(pages.download('pooling', cells))
  run('-m', 'jupytext', '--execute', str(path), folder=tmp_path)
  shown = {}  # by cell
  for place, cell in enumerate(json.loads(path.read_text())['cells']):
    for output in cell.get('outputs', []):
      for kind, content in output.get('data', {}).items():
        shown.setdefault(kind, {})[place] = ''.join(content)
  ((figure, _),) = shown['image/png'].items()
  (table,) = shown['text/html']
  assert figure < table
  assert 'unequal counts' in shown['text/plain'][table]


def test_cells_show_what_they_make(pages):
  """No name of theirs hides one that the script defines."""
  for name, notebook in pages.read_examples():
    path = ROOT / 'examples' / f'{name}.py'
    running = [ast.unparse(cell) for cell in cells.guarded(path)]
    assert len(running) > 2, name
    showing = [c for c in running if 'figures.save' in c or 'print(' in c]
    assert len(showing) > 1, name
    parts = [c.source for c in notebook.cells if cells.GUARD in c.source]
    assert len(parts) == len(running), name
    assigned = set().union(*(stored(ast.parse(cell)) for cell in running))
    module = ast.parse(path.read_text())
    assert not assigned & defined(module), name


def stored(tree):
  """The names that statements assign."""
  names = (n for n in ast.walk(tree) if isinstance(n, ast.Name))
  return {n.id for n in names if isinstance(n.ctx, ast.Store)}


def defined(module):
  """The names of a script's imports, functions, classes and constants."""
  names = set()
  for node in module.body:
    if isinstance(node, ast.Import | ast.ImportFrom):
      names |= {(a.asname or a.name).split('.')[0] for a in node.names}
    elif isinstance(node, ast.Assign):
      names |= {n.id for n in node.targets if isinstance(n, ast.Name)}
    else:
      names.add(getattr(node, 'name', None))
  return names


@pytest.mark.second_tier
@pytest.mark.parametrize('name', ['train_cnn', 'faster'])
def test_a_downloaded_script_starts(pages, tmp_path, name):
  zipfile.ZipFile(io.BytesIO(pages.archive(name))).extractall(tmp_path)
  run(f'{name}.py', '--help', folder=tmp_path / name)


def test_figures_are_shown_in_a_notebook(example, tmp_path, monkeypatch):
  display = pytest.importorskip(
    'IPython.display', reason=NEED.format('ipykernel')
  )
  figures, shown = example('figures'), []
  monkeypatch.setattr(display, 'display', shown.append)
  figures.save(tmp_path, first=Figure())
  assert not shown
  monkeypatch.setattr(figures, 'in_notebook', lambda: True)
  figures.save(tmp_path, second=Figure())
  (image,) = shown
  assert image.data == (tmp_path / 'second.png').read_bytes()


def test_a_small_run_says_so_and_passes_no_verdict(example, capsys):
  summary, options = example('summary'), example('options')
  for flags in ([], ['--small']):
    args = options.parse(flags, 'An example.')
    summary.tell(iter(['Holds: all.']), args.small)
    printed = capsys.readouterr().out
    assert ('Holds' in printed) is not args.small
    assert ('say nothing of the claims' in printed) is args.small
