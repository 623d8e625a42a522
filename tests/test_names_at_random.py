"""Networks drawn at random, all layers of one shape: matched right or refused.

Names there follow the habits that docs/convert.md tells of: numbers and the
order of definition follow the use. The model here nests its layers in ways of
its own, and calls a shortcut first or last.
"""

import collections
import random

from jax import lax
import numpy as np
import pytest
from tiers import second_tier

from normkit.tools import convert

WIDTH = 4
NESTS = 'flat', 'blocks', 'pairs', 'shortcuts'


class Network:
  """Blocks of layers: a path here for each name there, and the program."""

  def __init__(self, seed):
    self.random = random.Random(seed)
    self.nest = self.random.choice(NESTS)
    self.made = collections.Counter()
    self.paths = {}  # by name, in the order of use
    self.defined = []  # in the order of definition
    self.blocks = []
    self.block('stem', [], ['norm'] if self.draw() else [])
    for i in range(self.random.randint(1, 4)):
      shortcut = ['shortcut.0', 'shortcut.1'] if self.draw() else []
      # One layer beside a shortcut like it could be that.
      numbers = range(1, self.random.randint(2 if shortcut else 1, 3) + 1)
      body = [f'{kind}{j}' for j in numbers for kind in ('fc', 'bn')]
      if shortcut or self.draw():
        self.block(f'layers.{i}', shortcut, body)
      else:
        self.block(f'layers.{i}', [], ['norm', 'fc'])
    self.block('', [], ['norm'] if self.draw() else [])

  def draw(self):
    return self.random.random() < 0.5

  def block(self, name, shortcut, body):
    """Adds a block; its shortcut is defined last, and called first or last."""
    names = [
      [f'{name}.{n}'.strip('.') for n in part] for part in (body, shortcut)
    ]
    self.defined += [*names[0], *names[1]]
    is_first = self.draw()
    for part in reversed(names) if is_first else names:
      for layer in part:
        self.paths[layer] = self.path(layer, name)
    self.blocks.append((names[0], names[1]))

  def path(self, layer, block):
    last = layer.rpartition('.')[2]
    kind = 'Dense' if 'fc' in last or last == '0' else 'Norm'
    parent = f'{block}/' if self.nest != 'flat' else ''
    parent = parent.replace('.', '_') if parent != '/' else ''
    is_apart = self.nest == 'shortcuts' and 'shortcut' in layer
    if is_apart or self.nest == 'pairs':  # a layer and the norm after it
      first = kind == 'Dense' or not self.made[parent, 'Pair']
      self.made[parent, 'Pair'] += first
      parent += f'Pair_{self.made[parent, "Pair"]}/'
    self.made[parent, kind] += 1
    return f'{parent}{kind}_{self.made[parent, kind]}'

  def variables(self):
    params = {}
    for name, path in self.paths.items():
      inner = params
      for part in path.split('/'):
        inner = inner.setdefault(part, {})
      leaf = 'kernel' if 'Dense' in path else 'scale'
      inner |= {leaf: self.array(name, 'weight'), 'bias': self.array(name, 'b')}
    return {'params': params}

  def array(self, name, leaf):
    is_kernel = leaf == 'weight' and 'Dense' in self.paths[name]
    return np.zeros((WIDTH, WIDTH) if is_kernel else WIDTH, np.float32)

  def state(self):
    return {
      f'{name}.{leaf}': self.array(name, leaf)
      for name in self.defined
      for leaf in ('weight', 'bias')
    }

  def call(self, variables, x):
    def run(names, x):
      for name in names:
        inner = variables['params']
        for part in self.paths[name].split('/'):
          inner = inner[part]
        if 'kernel' in inner:
          x = lax.dot(x, inner['kernel'])
        else:
          x = lax.mul(x, inner['scale'])
        x = lax.tanh(lax.add(x, inner['bias']))
      return x

    for body, shortcut in self.blocks:
      x = lax.add(run(body, x), run(shortcut, x) if shortcut else x)
    return x


@pytest.mark.parametrize('seeds', [range(20), second_tier(range(20, 220))])
def test_right_or_refused(seeds):
  right = 0
  for seed in seeds:
    network = Network(seed)
    state, x = network.state(), np.ones(WIDTH, np.float32)
    for given in (state, dict(sorted(state.items()))):
      try:
        names = convert.match(given, network.variables(), network.call, x)
      except ValueError as error:
        assert 'may each be any of' in str(error), seed
        continue
      assert dict(names) == network.paths, seed
      right += given is state
  assert right > 0.9 * len(seeds)
