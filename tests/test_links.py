"""Every link leads somewhere, and the site lists every public name."""

from html.parser import HTMLParser
import importlib
import os
import pathlib
import re
import subprocess
import sys
from urllib.parse import unquote, urldefrag

import pytest
from test_package import MODULES

import normkit as nk

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
FENCED = re.compile(r'^```.*?^```$', re.DOTALL | re.MULTILINE)
LINK = re.compile(r'\]\(([^)\s]+)\)|<img src="([^"]+)"')


def anchors(page):
  """The anchors of a page as code hosts make them: no marks, hyphens."""
  text = FENCED.sub('', page.read_text())
  heads = re.findall(r'^#+ +(.+)$', text, re.MULTILINE)
  return {re.sub(r'[^\w -]', '', h.lower()).replace(' ', '-') for h in heads}


def broken(page):
  """The links of a page to files and headings that are not there."""
  text = re.sub(r'`[^`\n]*`', '', FENCED.sub('', page.read_text()))
  for link in map(''.join, LINK.findall(text)):
    if re.match(r'https?://', link):
      continue
    path, anchor = urldefrag(link)
    target = page.parent / path if path else page
    if not target.exists() or (anchor and anchor not in anchors(target)):
      yield link


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_of_page(page):
  assert not list(broken(page))


def test_a_broken_link_is_found(tmp_path):
  page = tmp_path / 'page.md'
  page.write_text("# It's a page\n[a](#its-a-page) [b](#page) [c](no.md)")
  assert list(broken(page)) == ['#page', 'no.md']
  page.write_text('<img src="page.md"> <img src="no.png" width="240">')
  assert list(broken(page)) == ['no.png']


class Parser(HTMLParser):
  """The links and anchors of a built page."""

  def __init__(self, path):
    super().__init__()
    self.links, self.anchors = set(), {''}
    self.feed(path.read_text())

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.anchors |= {attrs[key] for key in ('id', 'name') if attrs.get(key)}
    self.links |= {attrs[key] for key in ('href', 'src') if attrs.get(key)}


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  """The pages of the site by their path, built as the README says."""
  pytest.importorskip(
    'mkdocs', reason='mkdocs is not installed: the site is not built'
  )
  out = tmp_path_factory.mktemp('site')
  command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '-d', out]
  run = subprocess.run(
    command,
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stderr
  return {path: Parser(path) for path in out.rglob('*.html')}


@pytest.mark.second_tier
def test_links_of_site(site):
  missing = []
  for path, page in site.items():
    # The page for what is not found may be shown at any address.
    if path.name == '404.html':
      continue
    for link in page.links:
      if re.match(r'\w+:', link):
        continue
      file, anchor = urldefrag(unquote(link))
      target = (path.parent / file).resolve() if file else path
      if target.is_dir():
        target /= 'index.html'
      known = site[target].anchors if target in site else {'', anchor}
      if not target.exists() or anchor not in known:
        missing.append((str(path), link))
  assert not missing


@pytest.mark.second_tier
@pytest.mark.parametrize('module', MODULES)
def test_reference_lists_every_public_name(site, module):
  package = importlib.import_module(module)
  names = getattr(package, '__all__', None) or [
    name
    for name, value in vars(package).items()
    if not name.startswith('_')
    and callable(value)
    and getattr(value, '__module__', '') == module
  ]
  listed = set().union(*(page.anchors for page in site.values()))
  for name in names:
    at_root = getattr(package, name) is getattr(nk, name, None)
    assert f'{"normkit" if at_root else module}.{name}' in listed


@pytest.mark.second_tier
def test_gallery_shows_every_example(site):
  titled = [
    path.stem
    for path in (ROOT / 'examples').glob('*.py')
    if path.read_text().startswith('# %% [markdown]\n# # ')
  ]
  shown = {path.parent.name for path in site if 'gallery' in path.parts}
  assert titled
  assert set(titled) <= shown
