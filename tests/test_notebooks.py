"""Examples as notebooks, what the site gives to download, small runs."""

import importlib.util
import io
import json
import os
import pathlib
import subprocess
import sys
import zipfile

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
  outputs = [
    output
    for cell in json.loads(path.read_text())['cells']
    for output in cell.get('outputs', [])
  ]
  shown = set().union(*(output.get('data', {}) for output in outputs))
  assert {'image/png', 'text/html'} <= shown
  tables = [o['data'] for o in outputs if 'text/html' in o.get('data', {})]
  assert any('unequal counts' in ''.join(t['text/plain']) for t in tables)


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
