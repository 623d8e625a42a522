"""Prints pip constraints that pin each dependency to its lower bound."""

import pathlib
import re
import tomllib

path = pathlib.Path(__file__).parents[1] / 'pyproject.toml'
project = tomllib.loads(path.read_text())['project']
extras = project['optional-dependencies'].values()
for requirement in sum(extras, project['dependencies']):
  if match := re.fullmatch(r'([\w-]+)>=([\d.]+)', requirement):
    print('=='.join(match.groups()))
