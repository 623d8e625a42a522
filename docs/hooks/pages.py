"""Pages that mkdocs makes of other sources: README, examples, docstrings.

The home page is the README, with its links as they are from here, and what else
lies beside it. The gallery has a page for each script in `examples/` that opens
with a markdown cell, its figures, and downloads that bring along the modules
that it imports. The reference has a page for each module with public names.
"""

import ast
from collections.abc import Iterator
import copy
import importlib
import inspect
import io
import pathlib
import re
from types import ModuleType
from typing import Any
import zipfile

import jupytext
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbformat import v4

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / 'docs'
BESIDE = 'CONTRIBUTING.md', 'CHANGELOG.md', 'CITATION.cff'
GUIDES = {
  'Learn': ['tutorial', 'questions', 'coming'],
  'Guides': [
    'choosing',
    'models',
    'flax',
    'writing',
    'others',
    'weights',
    'parallel',
  ],
  'Tools': [
    'recalibrate',
    'adapt',
    'freeze',
    'fold',
    'convert',
    'inspect',
    'cli',
  ],
  'Inside': ['building', 'accuracy', 'speed', 'kernels'],
}
# Examples whose figures have names of their own.
FIGURES = {
  'train_cnn': ['curves.png'],
  'batch_size': ['batch_size.png', 'skewed.png'],
  'pooling': ['pooling.png'],
}
MODULES = 'linen', 'nnx', 'weights', 'recurrent', 'testing'
# The command line has a guide; the other serves the tools.
NOT_PUBLIC = 'cli', 'files'


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the pages that are made, and puts all of them in order."""
  examples = dict(read_examples())
  names = dict(read_names())
  pages = {
    'index.md': (ROOT / 'README.md').read_text(),
    **{name: (ROOT / name).read_text() for name in BESIDE},
    'reference/index.md': reference_index(names),
  }
  for name, cells in examples.items():
    pages[f'gallery/{name}.md'] = gallery_page(name, cells)
    pages[f'gallery/{name}.zip'] = archive(name)
    pages[f'gallery/{name}.ipynb'] = download(name, cells)
  for module, members in names.items():
    pages[f'reference/{module}.md'] = reference_page(module, members)
  for path, content in pages.items():
    files.append(File.generated(config, path, content=content))
  config.nav = navigation(examples, names)
  return files


def on_page_markdown(markdown: str, **_: Any) -> str:
  """What code hosts show and mkdocs does not, without a change of the file."""
  markdown = re.sub(r'(?<=\]\()(?:\.\./)?examples/(\w+)\.py', example, markdown)
  markdown = re.sub(r'(?<=\]\()\.\./README\.md', 'index.md', markdown)
  markdown = re.sub(r'(?<=\]\()\.\./(C\w+\.\w+)', r'\1', markdown)
  markdown = re.sub(r'(?<=\]\()(\.\./)?docs/', r'\1', markdown)
  markdown = re.sub(r'<img src="(.+?)" alt="(.*?)" (.*?)>', IMAGE, markdown)
  return markdown.replace('<details>', '<details markdown="1">')


IMAGE = r'![\2](\1){ \3 }'  # whose address mkdocs makes that of the page


def example(link: re.Match[str]) -> str:
  """Where the page of a script is."""
  return f'gallery/{link[1]}.md'


def navigation(examples: dict[str, Any], names: dict[str, Any]) -> list[Any]:
  """All pages; a guide that `GUIDES` lacks comes behind the first ones."""
  listed = {name for group in GUIDES.values() for name in group} | {'gallery'}
  new = sorted({path.stem for path in DOCS.glob('*.md')} - listed)
  guides = GUIDES | {'Guides': GUIDES['Guides'] + new}
  parts: dict[str, list[str]] = {}
  for module in names:
    parts.setdefault(part(module), []).append(f'reference/{module}.md')
  return [
    {'Home': 'index.md'},
    *({group: [f'{n}.md' for n in pages]} for group, pages in guides.items()),
    {'Gallery': ['gallery.md', *(f'gallery/{n}.md' for n in examples)]},
    {'Reference': ['reference/index.md', *({k: v} for k, v in parts.items())]},
    {'Project': [name for name in BESIDE if name.endswith('.md')]},
  ]


def read_examples() -> Iterator[tuple[str, Any]]:
  """The scripts that open with a title, by name, and their cells."""
  for path in sorted((ROOT / 'examples').glob('*.py')):
    if path.read_text().startswith('# %% [markdown]\n# # '):
      yield path.stem, jupytext.read(path, fmt='py:percent')


def shared(name: str) -> list[pathlib.Path]:
  """The modules beside an example that it imports, or that these import."""
  path = ROOT / 'examples' / f'{name}.py'
  found: dict[pathlib.Path, None] = {}
  for node in ast.walk(ast.parse(path.read_text())):
    names = [n.name for n in node.names] if isinstance(node, ast.Import) else []
    if isinstance(node, ast.ImportFrom):
      names = [node.module or '']
    for module in names:
      if (beside := path.with_name(f'{module}.py')).exists():
        found |= dict.fromkeys([*shared(module), beside])
  return list(found)


def archive(name: str) -> bytes:
  """An example and the modules that it imports, in one file."""
  data = io.BytesIO()
  with zipfile.ZipFile(data, 'w', zipfile.ZIP_DEFLATED) as file:
    for path in (*shared(name), ROOT / 'examples' / f'{name}.py'):
      file.writestr(zipfile.ZipInfo(f'{name}/{path.name}'), path.read_bytes())
  return data.getvalue()


def download(name: str, notebook: Any) -> str:
  """A notebook that first writes the modules that it imports beside itself."""
  alone = copy.deepcopy(notebook)
  cells = [v4.new_markdown_cell(SHARED)]
  for path in shared(name):
    source = f'%%writefile {path.name}\n{path.read_text()}'
    cells.append(v4.new_code_cell(source))
  alone.cells[1:1] = cells
  alone.metadata['kernelspec'] = KERNEL
  return jupytext.writes(alone, 'ipynb')


KERNEL = {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}
SHARED = """\
## What the examples share

These cells write modules beside the notebook, which the example imports. It
needs normkit with its examples: in a checkout,
`pip install '.[examples,notebooks]'`.
"""


def gallery_page(name: str, notebook: Any) -> str:
  """A script: its text, its figures behind the first cell, its code."""
  first, *cells = notebook.cells
  parts = [
    first.source,
    f'[Script]({name}.zip){{ .md-button }} [Notebook]({name}.ipynb)'
    '{ .md-button }',
    *(f'![{pathlib.Path(f).stem}]({f})' for f in figures(name)),
  ]
  for cell in cells:
    source = cell.source.strip()
    is_code = cell.cell_type == 'code'
    parts.append(f'```python\n{source}\n```' if is_code else source)
  return '\n\n'.join(parts)


def figures(name: str) -> list[str]:
  """Links to the figures of an example, from its page."""
  drawn = sorted((DOCS / 'figures' / 'gallery').glob('*.png'))
  return [
    *(f'../figures/{file}' for file in FIGURES.get(name, [])),
    *(
      f'../figures/gallery/{path.name}'
      for path in drawn
      if path.stem == name or path.stem.startswith(f'{name}_')
    ),
  ]


def read_names() -> Iterator[tuple[str, list[str]]]:
  """The modules with public names, and these as one imports them."""
  root = importlib.import_module('normkit')
  home: dict[str, list[str]] = {}
  for name in root.__all__:
    home.setdefault(getattr(root, name).__module__, []).append(
      f'normkit.{name}'
    )
  yield from sorted(
    home.items(), key=lambda item: ('norms' not in item[0], item)
  )
  tools = sorted((ROOT / 'normkit' / 'tools').glob('[a-z]*.py'))
  public = [f'tools.{t.stem}' for t in tools if t.stem not in NOT_PUBLIC]
  for name in (*MODULES, *public):
    module = importlib.import_module(f'normkit.{name}')
    yield (
      module.__name__,
      [f'{module.__name__}.{member}' for member in public_names(module)],
    )


def public_names(module: ModuleType) -> list[str]:
  """`__all__`, or else the classes and functions that are defined there."""
  return getattr(module, '__all__', None) or [
    name
    for name, value in vars(module).items()
    if not name.startswith('_')
    and callable(value)
    and getattr(value, '__module__', None) == module.__name__
  ]


def part(module: str) -> str:
  """Under which heading a module's page is listed."""
  if module.startswith('normkit.tools.'):
    return 'normkit.tools'
  is_own = module.removeprefix('normkit.') in MODULES
  return 'Other modules' if is_own else 'normkit'


def reference_index(names: dict[str, list[str]]) -> str:
  """Tables of all names, with the first line of each docstring."""
  lines, heading = ['# Reference'], ''
  for members in names.values():
    for member in members:
      module, _, name = member.rpartition('.')
      if module != heading:
        heading = module
        lines += ['', f'## {heading}', '', '| name | what it is |']
        lines.append('| --- | --- |')
      lines.append(f'| [`{name}`][{member}] | {first_line(member)} |')
  return '\n'.join(lines)


def reference_page(module: str, members: list[str]) -> str:
  """What a module's docstring says, and then each of its public names."""
  text = inspect.getdoc(importlib.import_module(module))
  entries = '\n\n'.join(f'::: {member}' for member in members)
  return f'# {title(module)}\n\n{text}\n\n{entries}'


def title(module: str) -> str:
  """The name of a module to import, or what one behind `normkit` is about."""
  if part(module) != 'normkit':
    return module
  first = inspect.getdoc(importlib.import_module(module)).splitlines()[0]
  return re.split(r' \(|[:,.]', first)[0]


def first_line(name: str) -> str:
  """The first line of a name's docstring."""
  module, _, member = name.rpartition('.')
  value = getattr(importlib.import_module(module), member)
  return inspect.getdoc(value).splitlines()[0]
