"""The command line, from a file of PyTorch's names to a folded program."""

import functools
import json
import subprocess
import sys

import chex
import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from normkit.tools import cli, files

ZOO = """
from flax import linen as nn, nnx
import jax, jax.numpy as jnp
import normkit.linen, normkit.nnx

class Net(nn.Module):
  @nn.compact
  def __call__(self, x, *, train):
    x = nn.Conv(4, (3, 3))(x)
    x = normkit.linen.BatchNorm(use_running_average=not train)(x)
    return nn.Dense(3)(nn.relu(x).reshape(len(x), -1))

def net():
  return Net()

class Up(nn.Module):
  @nn.compact
  def __call__(self, x, *, train):
    x = nn.ConvTranspose(2, (3, 3), name='up')(x)
    x = normkit.linen.BatchNorm(not train, momentum=None, name='bn')(x)
    return nn.Dense(3, name='fc')(x.reshape(len(x), -1))

def up():
  return Up()

class Small(nnx.Module):
  def __init__(self):
    self.fc = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    self.bn = normkit.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
  def __call__(self, x):
    return self.bn(self.fc(x))

def number():
  return 3

def broken():
  raise KeyError('of the model')

def leaves():
  raise SystemExit('bye')
"""
MODEL = ['--model', 'zoo_of_cli:net', '--input', '5x6x6x2']


@pytest.fixture
def zoo(importable):
  """A folder with a module of models, a file of weights and one of images."""
  folder = importable('zoo_of_cli', ZOO)
  rng = np.random.default_rng(0)
  files.save_arrays('torch.safetensors', state(rng))
  images = np.float32(3 + rng.normal(size=(13, 6, 6, 2)))
  np.savez('images.npz', images=images, labels=np.arange(13))
  names = {'conv': 'Conv_0', 'bn': 'BatchNorm_0', 'fc': 'Dense_0'}
  (folder / 'names.json').write_text(json.dumps(names))
  return folder


def state(rng):
  """Arrays as PyTorch has them, of the network in the zoo."""
  shapes = {
    'conv.weight': (4, 2, 3, 3),
    'conv.bias': (4,),
    'bn.weight': (4,),
    'bn.bias': (4,),
    'bn.running_mean': (4,),
    'fc.weight': (3, 4 * 6 * 6),
    'fc.bias': (3,),
  }
  arrays = {k: np.float32(rng.normal(size=s)) for k, s in shapes.items()}
  return arrays | {'bn.running_var': np.float32(rng.uniform(0.5, 2, 4))}


# What each option of each command is given; it has to change something.
CHANGES = {
  'convert': {
    '--overwrite': [],
    '--model': ['zoo_of_cli:net'],
    '--input': ['5x6x6x3'],
    '--from': ['keras'],
    '--names': ['names.json'],
    '--flatten': ['fc=6x6x2'],
    '--ignore': ['extra'],
    '--transposed': ['up'],
    '--count': ['3'],
    '--add-to-scale': ['b*=1'],
    '--inputs-first': ['fc'],
    '--scanned': ['up'],
  },
  'inspect': {
    '--overwrite': [],
    '--model': ['zoo_of_cli:small'],
    '--input': ['4x6x6x2'],
    '--data': ['torch.safetensors'],
    '--steps': ['3'],
    '--framework': ['keras'],
    '--figure': ['new.png'],
    '--step': ['3'],
  },
  'fold': {
    '--overwrite': [],
    '--model': ['zoo_of_cli:small'],
    '--input': ['5x5x6x2'],
    '--data': ['images.npz'],
    '--program': ['folded.jax'],
    '--step': ['3'],
  },
}


def options_of(command):
  commands = cli._parser()._subparsers._group_actions[0].choices
  actions = commands[command]._actions
  names = {a.option_strings[-1] for a in actions if a.option_strings}
  return names - {'--help'}


@pytest.mark.second_tier
@pytest.mark.parametrize('command', CHANGES)
def test_every_option_changes_something(zoo, capsys, command):
  assert options_of(command) == {*CHANGES[command]}
  rng = np.random.default_rng(0)
  up = {
    'up.weight': rng.normal(size=(2, 2, 3, 3)),
    'up.bias': rng.normal(size=2),
    'fc.weight': rng.normal(size=(3, 72)),
    'fc.bias': rng.normal(size=3),
    **{f'bn.{name}': np.ones(2) for name in ('weight', 'bias')},
    **{f'bn.running_{name}': np.ones(2) for name in ('mean', 'var')},
  }
  files.save_arrays('up.safetensors', {k: np.float32(v) for k, v in up.items()})
  files.save_arrays(
    'more.safetensors',
    files.load_arrays('up.safetensors') | {'extra': np.ones(1)},
  )
  run(*CONVERT, *MODEL)
  model = ['--model', 'zoo_of_cli:up', *MODEL[2:]]
  base = {
    'convert': ['up.safetensors', 'out', *model, '--count', '1'],
    'inspect': ['flax.safetensors', *MODEL, '--data', 'images.npz'],
    'fold': ['flax.safetensors', 'out', *MODEL],
  }[command]

  @functools.cache
  def without(*args):
    return outcome(*args)

  def outcome(*args):
    capsys.readouterr()
    kept = {*zoo.iterdir()}
    status = run(command, *args)
    written = {
      p: p.read_bytes() for p in {*zoo.iterdir()} - kept if p.is_file()
    }
    for path in written:
      path.unlink()
    return status, capsys.readouterr().out, written

  (zoo / 'old.png').touch()
  old = ['--figure', 'old.png'] if command == 'inspect' else []
  there = [*base, *old] if old else [base[0], 'old.png', *base[2:]]
  others = {'--ignore': ['more.safetensors', *base[1:]], '--overwrite': there}
  for option, value in CHANGES[command].items():
    args = others.get(option, base)
    assert without(*args) != outcome(*args, option, *value), option


def by_hand(arrays, images):
  """The network in float64, straight from PyTorch's arrays."""
  w = {k: np.float64(v) for k, v in arrays.items()}
  x = np.pad(np.float64(images), ((0, 0), (1, 1), (1, 1), (0, 0)))
  shifts = [(i, j) for i in range(3) for j in range(3)]
  y = w['conv.bias'] + sum(
    np.einsum(
      'nhwc,oc->nhwo', x[:, i : i + 6, j : j + 6], w['conv.weight'][:, :, i, j]
    )
    for i, j in shifts
  )
  y = (y - w['bn.running_mean']) / np.sqrt(w['bn.running_var'] + 1e-5)
  y = np.maximum(y * w['bn.weight'] + w['bn.bias'], 0).transpose(0, 3, 1, 2)
  return y.reshape(len(y), -1) @ w['fc.weight'].T + w['fc.bias']


def run(*args):
  return cli.main([*map(str, args)])


CONVERT = [
  'convert',
  'torch.safetensors',
  'flax.safetensors',
  '--names',
  'names.json',
  '--flatten',
  'Dense_0=4x6x6',
]


def test_convert_inspect_fold(zoo, capsys):
  assert run(*CONVERT, *MODEL) == 0
  assert set(files.load_arrays('flax.safetensors')) == {
    'Conv_0/kernel',
    'Conv_0/bias',
    'BatchNorm_0/scale',
    'BatchNorm_0/bias',
    'BatchNorm_0/mean',
    'BatchNorm_0/var',
    'Dense_0/kernel',
    'Dense_0/bias',
  }
  data = ['--data', 'images.npz']
  options = ['--framework', 'torch', '--figure', 'layers.png']
  assert run('inspect', 'flax.safetensors', *MODEL, *data, *options) == 0
  told = capsys.readouterr().out
  assert 'BatchNorm_0' in told
  assert 'recalibrate' in told
  assert (zoo / 'layers.png').read_bytes().startswith(b'\x89PNG')
  options = ['--program', 'folded.jax']
  fold = ['fold', 'flax.safetensors', 'folded.safetensors', *MODEL, *data]
  assert run(*fold, *options) == 0
  assert 'BatchNorm_0' in capsys.readouterr().out
  params = files.load_arrays('folded.safetensors')
  assert not [name for name in params if 'BatchNorm' in name]
  program = export.deserialize((zoo / 'folded.jax').read_bytes())
  images = np.load('images.npz')['images'][:5]
  y = program.call(jax.tree.map(jnp.asarray, params), jnp.asarray(images))
  want = by_hand(files.load_arrays('torch.safetensors'), images)
  chex.assert_trees_all_close(np.float64(y), want, rtol=1e-4, atol=1e-4)


def test_nothing_is_overwritten(zoo, capsys):
  assert run(*CONVERT, *MODEL) == 0
  before = (zoo / 'flax.safetensors').read_bytes()
  assert run(*CONVERT, *MODEL) == 2
  assert 'exists' in capsys.readouterr().err
  assert (zoo / 'flax.safetensors').read_bytes() == before
  assert run(*CONVERT, *MODEL, '--overwrite') == 0
  (zoo / 'taken.jax').write_text('mine')
  fold = ['fold', 'flax.safetensors', 'folded.safetensors', *MODEL]
  assert run(*fold, '--program', 'taken.jax') == 2
  assert not (zoo / 'folded.safetensors').exists()
  assert (zoo / 'taken.jax').read_text() == 'mine'


def test_nnx_and_orbax(zoo, capsys):
  model = ['--model', 'zoo_of_cli:Small', '--input', '4x6']
  tree = {
    'fc': {'kernel': np.ones((6, 4), np.float32), 'bias': np.zeros(4)},
    'bn': {k: np.full(4, 2.0) for k in ('scale', 'bias', 'mean', 'var')},
  }
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(zoo / 'saved', {'params': tree})
  assert run('fold', 'saved', 'folded.safetensors', *model) == 0
  assert 'drawn at random' in capsys.readouterr().out
  kernel = files.load_arrays('folded.safetensors')['fc/kernel']
  want = np.full((6, 4), 2 / np.sqrt(2 + 1e-5))
  chex.assert_trees_all_close(np.float64(kernel), want, rtol=1e-6)


ERRORS = {
  'no_file': (['nothing.safetensors', 'out', *MODEL], 'nothing.safetensors'),
  'no_module': (
    ['torch.safetensors', 'out', '--model', 'no_zoo:f', '--input', '1x2'],
    "No module named 'no_zoo'",
  ),
  'no_colon': (
    ['torch.safetensors', 'out', '--model', 'zoo_of_cli', '--input', '1x2'],
    'MODULE:FUNCTION',
  ),
  'no_model': (
    ['torch.safetensors', 'o', '--model', 'zoo_of_cli:number', '--input', '1'],
    'made int',
  ),
  'broken_model': (
    ['torch.safetensors', 'o', '--model', 'zoo_of_cli:broken', '--input', '1'],
    'of the model',
  ),
  'model_that_exits': (
    ['torch.safetensors', 'o', '--model', 'zoo_of_cli:leaves', '--input', '1'],
    'bye',
  ),
  'other_input': (
    ['torch.safetensors', 'o', *MODEL[:3], '1x6'],
    'does not take an --input of (1, 6)',
  ),
  'no_folder': (['torch.safetensors', 'none/out', *MODEL], "'none'"),
  'one_file_for_two': (
    ['torch.safetensors', 'out', *MODEL, '--program', './out'],
    'given for two files',
  ),
  'other_names': (['torch.safetensors', 'out', *MODEL], 'of another model'),
  'pickle': (['pickle.safetensors', 'out', *MODEL], 'pickle'),
  'truncated': (['cut.safetensors', 'out', *MODEL], 'cut.safetensors'),
  'data': (
    ['torch.safetensors', 'out', *MODEL, '--data', 'torch.safetensors'],
    'of another model',
  ),
}


@pytest.mark.parametrize('case', ERRORS)
def test_errors_take_one_line(zoo, capsys, case):
  args, message = ERRORS[case]
  whole = (zoo / 'torch.safetensors').read_bytes()
  (zoo / 'cut.safetensors').write_bytes(whole[:-9])
  (zoo / 'pickle.safetensors').write_bytes(b'\x80\x04N.')
  assert run('fold', *args) == 2
  told = capsys.readouterr().err
  assert told.startswith('normkit fold: error: ')
  assert message in told
  assert told.count('\n') == 1
  assert not (zoo / 'out').exists()


@pytest.mark.parametrize('dtype', [np.complex64, np.int8])
def test_other_numbers_are_refused(zoo, capsys, dtype):
  assert run(*CONVERT, *MODEL) == 0
  arrays = files.load_arrays('flax.safetensors')
  cast = {name: array.astype(dtype) for name, array in arrays.items()}
  files.save_arrays('cast.safetensors', cast)
  assert run('fold', 'cast.safetensors', 'out', *MODEL) == 2
  assert 'floating (4,) in the model' in capsys.readouterr().err


def test_a_picture_has_the_ending_of_one(zoo, capsys):
  """And that is found out first, before the weights are read."""
  data = ['--data', 'images.npz', '--figure', 'layers.jpgg']
  assert run('inspect', 'none.safetensors', *MODEL, *data) == 2
  told = capsys.readouterr().err
  assert "'layers.jpgg' has no ending" in told
  assert '.png' in told


def test_data_of_another_shape(zoo, capsys):
  assert run(*CONVERT, *MODEL) == 0
  np.savez('small.npz', images=np.ones((4, 6, 6, 2), np.float32))
  data = ['--data', 'small.npz']
  assert run('inspect', 'flax.safetensors', *MODEL, *data) == 2
  assert 'needs 5 or more' in capsys.readouterr().err
  np.savez('many.npz', a=np.ones(3), b=np.ones(3))
  data = ['--data', 'many.npz']
  assert run('inspect', 'flax.safetensors', *MODEL, *data) == 2
  assert "name the inputs 'images' or 'x'" in capsys.readouterr().err


@pytest.mark.parametrize('names', ['{"conv": 3}', '[1]', '{'])
def test_names_must_be_names(zoo, capsys, names):
  (zoo / 'bad.json').write_text(names)
  args = ['convert', 'torch.safetensors', 'out', '--names', 'bad.json']
  assert run(*args, *MODEL) == 2
  assert 'bad.json' in capsys.readouterr().err


@pytest.mark.parametrize('command', ['convert', 'inspect', 'fold'])
def test_help_shows_an_example(command, capsys):
  with pytest.raises(SystemExit, match='0'):
    cli.main([command, '--help'])
  assert f'normkit {command} ' in capsys.readouterr().out.split('example:')[1]


def test_as_a_module():
  line = [sys.executable, '-m', 'normkit', 'fold', '--input', '1xa']
  done = subprocess.run(line, capture_output=True, text=True, check=False)
  assert done.returncode == 2
  assert 'is no shape' in done.stderr
