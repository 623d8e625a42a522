"""Checkpoints as training leaves them, read for a model."""

import os
from typing import Any

import chex
from flax import linen as nn, nnx, serialization, struct
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from normkit.tools import _checkpoints, cli, files
from normkit.tools._template import template_of


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


VARIABLES = {
  'params': {
    'fc': {'kernel': draw(0, 3, 2), 'bias': draw(1, 2)},
    'bn': {'scale': draw(2, 2), 'bias': draw(3, 2)},
  },
  'batch_stats': {'bn': {'mean': draw(4, 2), 'var': draw(5, 2) ** 2}},
}
MOMENTS = {'mu': jax.tree.map(np.ones_like, VARIABLES['params'])}


@struct.dataclass
class TrainState:
  step: int
  params: Any
  opt_state: Any
  batch_stats: Any
  extra: Any = None


class Net(nnx.Module):
  def __init__(self):
    self.fc = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    self.bn = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

  def __call__(self, x):
    return self.drop(self.bn(self.fc(x)))


def net():
  """The nnx model with the values of VARIABLES."""
  model = Net()
  for (path, leaf), value in template_of(VARIABLES).leaves.items():
    getattr(getattr(model, path), leaf)[...] = jnp.asarray(value)
  return model


def boxed(tree):
  return jax.tree.map(
    lambda a: nn.Partitioned(jnp.asarray(a), ('x',) * a.ndim), tree
  )


def together():
  """Parameters and statistics of each layer in one dict."""
  params, stats = VARIABLES['params'], VARIABLES['batch_stats']
  return {'fc': params['fc'], 'bn': params['bn'] | stats['bn']}


FORMS = {
  'dict': lambda: (
    VARIABLES | {'opt_state': (MOMENTS, None), 'step': 3, 'best': None}
  ),
  'train state': lambda: TrainState(
    7, VARIABLES['params'], (MOMENTS,), VARIABLES['batch_stats']
  ),
  'all in params': lambda: {'params': VARIABLES, 'opt_state': MOMENTS},
  'boxes': lambda: boxed(VARIABLES),
  'bare': lambda: together() | {'step': 3},
  'nnx state': lambda: nnx.state(net()),
  'two nnx states': lambda: nnx.state(net(), nnx.Param, nnx.BatchStat),
  'in a model': lambda: {'model': nnx.state(net()), 'optimizer': MOMENTS},
}


def save(folder, tree):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder, tree)


def restored(path, step=None, like=VARIABLES):
  collections = [*like] if isinstance(like, dict) else []
  return _checkpoints.restore(path, template_of(like), collections, step)


@pytest.mark.parametrize('form', FORMS)
def test_folders_of_orbax(form, tmp_path):
  save(tmp_path / 'saved', FORMS[form]())
  got = restored(tmp_path / 'saved')
  chex.assert_trees_all_equal(jax.tree.map(np.asarray, got), VARIABLES)


def test_an_nnx_model_takes_what_linen_wrote(tmp_path):
  save(tmp_path / 'saved', VARIABLES)
  got = restored(tmp_path / 'saved', like=Net())
  np.testing.assert_array_equal(
    got.bn.var[...], VARIABLES['batch_stats']['bn']['var']
  )


@pytest.mark.parametrize('prefix', [None, 'checkpoint'])
def test_steps_of_a_manager(prefix, tmp_path):
  options = ocp.CheckpointManagerOptions(step_prefix=prefix)
  with ocp.CheckpointManager(tmp_path / 'run', options=options) as manager:
    for step in (9, 10):
      tree = jax.tree.map(lambda a, n=step: a + n, VARIABLES)
      manager.save(step, args=ocp.args.StandardSave(tree | {'step': step}))
  for step, want in ((None, 10), (9, 9)):
    got = restored(tmp_path / 'run', step)['params']['fc']['bias']
    np.testing.assert_array_equal(got, draw(1, 2) + np.float32(want))
  with pytest.raises(ValueError, match=r'no step 11. It has \[9, 10\]'):
    restored(tmp_path / 'run', 11)
  [name] = [n for n in os.listdir(tmp_path / 'run') if n.endswith('9')]
  with pytest.raises(ValueError, match='one checkpoint: no --step'):
    restored(tmp_path / 'run' / name, 9)


def test_items_of_a_manager(tmp_path):
  with ocp.CheckpointManager(tmp_path / 'run') as manager:
    manager.save(
      1,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(VARIABLES['params']),
        batch_stats=ocp.args.StandardSave(VARIABLES['batch_stats']),
        opt_state=ocp.args.StandardSave(MOMENTS),
        notes=ocp.args.JsonSave({'lr': 0.1}),
      ),
    )
  got = restored(tmp_path / 'run')
  chex.assert_trees_all_equal(jax.tree.map(np.asarray, got), VARIABLES)


def test_msgpack(tmp_path):
  path = tmp_path / 'saved.msgpack'
  state = TrainState(
    7, VARIABLES['params'], (MOMENTS,), VARIABLES['batch_stats']
  )
  path.write_bytes(serialization.to_bytes(state))
  arrays = files.load_arrays(path)
  assert arrays['step'] == 7 and 'opt_state/0/mu/fc/bias' in arrays
  got = restored(path)
  chex.assert_trees_all_equal(jax.tree.map(np.asarray, got), VARIABLES)
  data = path.read_bytes()
  for end in range(0, len(data), 97):
    path.write_bytes(data[:end])
    with pytest.raises(ValueError, match='is refused'):
      files.load_arrays(path)
  path.write_bytes(serialization.msgpack_serialize({'a': 'text'}))
  with pytest.raises(ValueError, match="'a' must be an array of numbers"):
    files.load_arrays(path)


def test_what_fold_names_is_read(tmp_path):
  """The bias that folding added, of a model that has one there."""
  path = tmp_path / 'folded.safetensors'
  bias = draw(1, 2)
  given = {'params/fc/kernel': draw(0, 3, 2), 'params/fc/kernel:bias': bias}
  files.save_arrays(path, given | {'params/fc/kernel:bias': bias[None]})
  like = {'params': {'fc': VARIABLES['params']['fc']}}
  got = restored(path, like=like)
  chex.assert_trees_all_equal(jax.tree.map(np.asarray, got), like)


def test_what_does_not_fit_is_told(tmp_path):
  with pytest.raises(ValueError, match=r"is no checkpoint .* holds \['x'\]"):
    (tmp_path / 'x').mkdir()
    restored(tmp_path)
  path = tmp_path / 'a.safetensors'
  with pytest.raises(ValueError, match='is a file, which has no steps'):
    restored(path, 3)
  flat = {
    f'params/{layer}/{leaf}': value
    for (layer, leaf), value in template_of(VARIABLES).leaves.items()
  }

  def refused(arrays, match):
    files.save_arrays(path, arrays, overwrite=True)
    with pytest.raises(ValueError, match=match) as caught:
      restored(path)
    assert str(path) in str(caught.value)

  refused(flat | {'params/head/bias': np.ones(2)}, 'params/head/bias: floating')
  refused(
    {k: v for k, v in flat.items() if 'var' not in k}, 'bn/var: missing in'
  )
  refused(flat | {'state/fc/bias': np.ones(2)}, "both .* may be 'fc/bias'")
  refused(
    {'opt_state/mu/bias': np.ones(2)}, r'holds opt_state/mu \(1\), .*bn/bias'
  )
  refused(flat | {'params/fc/bias': np.ones(2, bool)}, 'fc/bias: bool')


ZOO = """
from flax import linen as nn
import normkit.linen

class Net(nn.Module):
  use_norm: bool = True
  @nn.compact
  def __call__(self, tokens, *, train):
    x = nn.Embed(9, 4)(tokens)
    x = nn.Conv(4, (3,), use_bias=not self.use_norm)(x)
    if self.use_norm:
      x = normkit.linen.BatchNorm(use_running_average=not train)(x)
    return nn.Dense(3)(nn.relu(x))

def plain():
  return Net(False)

def dense():
  return nn.Dense(4)

class Step(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return nn.Dense(4, name='fc')(x), None

class Deep(nn.Module):
  @nn.compact
  def __call__(self, x):
    scan = nn.scan(
      Step, variable_axes={'params': 0}, split_rngs={'params': True}, length=2
    )
    return scan(name='blocks')(x, None)[0]
"""


@pytest.fixture
def zoo(importable):
  return importable('zoo_of_steps', ZOO)


def run(*args):
  return cli.main([*map(str, args)])


def test_integers_steps_and_a_folded_file_from_the_command_line(zoo, capsys):
  model = ['--model', 'zoo_of_steps:Net', '--input', '2x5:int32']
  shapes = {
    'Embed_0': {'embedding': (9, 4)},
    'Conv_0': {'kernel': (3, 4, 4)},
    'BatchNorm_0': {'scale': (4,), 'bias': (4,)},
    'Dense_0': {'kernel': (4, 3), 'bias': (3,)},
  }
  seeds = iter(range(99))
  params = jax.tree.map(
    lambda shape: draw(next(seeds), *shape),
    shapes,
    is_leaf=lambda node: isinstance(node, tuple),
  )
  stats = {'BatchNorm_0': {'mean': draw(9, 4), 'var': draw(8, 4) ** 2 + 0.5}}
  variables = {'params': params, 'batch_stats': stats}
  with ocp.CheckpointManager(zoo / 'run') as manager:
    manager.save(4, args=ocp.args.StandardSave(variables))
  folded = ['folded.safetensors', *model, '--program', 'program.jax']
  assert run('fold', 'run', *folded, '--step', 3) == 2
  assert 'no step 3' in capsys.readouterr().err
  assert run('fold', 'run', *folded, '--step', 4) == 0
  names = {'Embed_0/embedding', 'Conv_0/kernel', 'Conv_0/bias'}
  names |= {'Dense_0/kernel', 'Dense_0/bias'}
  arrays = files.load_arrays('folded.safetensors')
  assert arrays.keys() == names and arrays['Conv_0/bias'].shape == (4,)
  # The folded file is a checkpoint of the model without norms.
  plain = ['--model', 'zoo_of_steps:plain', *model[2:]]
  assert run('fold', 'folded.safetensors', 'again.safetensors', *plain) == 0
  chex.assert_trees_all_equal(files.load_arrays('again.safetensors'), arrays)
  program = jax.export.deserialize((zoo / 'program.jax').read_bytes())
  tokens = np.arange(10, dtype=np.int32).reshape(2, 5) % 9
  y = program.call(jax.tree.map(jnp.asarray, arrays), tokens)
  x = np.pad(np.float64(params['Embed_0']['embedding'])[tokens], 1)[
    1:-1, :, 1:-1
  ]
  kernel = np.float64(params['Conv_0']['kernel'])
  x = sum(x[:, i : i + 5] @ kernel[i] for i in range(3))
  norm = {k: np.float64(v) for k, v in params['BatchNorm_0'].items()}
  bn = stats['BatchNorm_0']
  x = (x - bn['mean']) / np.sqrt(bn['var'] + 1e-5) * norm['scale']
  x = np.maximum(x + norm['bias'], 0)
  want = x @ params['Dense_0']['kernel'] + params['Dense_0']['bias']
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
  np.savez('tokens.npz', x=tokens)
  again = ['again.safetensors', *plain, '--data', 'tokens.npz', '--overwrite']
  assert run('fold', 'folded.safetensors', *again) == 0
  np.savez('floats.npz', x=np.ones((2, 5), np.float32))
  data = ['--data', 'floats.npz']
  assert run('inspect', 'run', *model, *data) == 2
  assert '--input asks for int32' in capsys.readouterr().err


def test_options_of_square_and_of_scanned_layers(zoo, capsys):
  state = {}
  for i in range(2):
    state |= {f'blocks.{i}.fc.weight': draw(i, 4, 4)}
    state |= {f'blocks.{i}.fc.bias': draw(i, 4)}
  files.save_arrays('torch.safetensors', state)
  model = ['--model', 'zoo_of_steps:Deep', '--input', '2x4']
  weights = [draw(i, 4, 4) for i in range(2)]
  for options, want in (
    ([], [weight.T for weight in weights]),
    (['--inputs-first', '*/fc'], weights),
  ):
    convert = ['convert', 'torch.safetensors', 'flax', '--overwrite', *model]
    assert run(*convert, '--scanned', 'blocks', *options) == 0
    arrays = files.load_arrays('flax')
    np.testing.assert_array_equal(arrays['blocks/fc/kernel'], np.stack(want))
  assert run(*convert, '--from', 'keras', '--scanned', 'blocks') == 2
  assert 'are for PyTorch' in capsys.readouterr().err


def test_a_model_of_one_layer(zoo):
  state = {'weight': draw(0, 4, 3), 'bias': draw(1, 4)}
  files.save_arrays('torch.safetensors', state)
  model = ['--model', 'zoo_of_steps:dense', '--input', '2x3']
  assert run('convert', 'torch.safetensors', 'flax', *model) == 0
  assert files.load_arrays('flax').keys() == {'kernel', 'bias'}
  assert run('fold', 'flax', 'folded', *model) == 0
  assert files.load_arrays('folded').keys() == {'kernel', 'bias'}


@pytest.mark.parametrize('text', ['2x5:int33', '2x5:bool', '2x5:', '2xa:int32'])
def test_inputs_that_are_none(text, capsys):
  with pytest.raises(SystemExit, match='2'):
    run('fold', 'a', 'b', '--model', 'a:b', '--input', text)
  assert 'such as' in capsys.readouterr().err


# Links, and what is no file.


def test_links_are_written_through_and_kept(tmp_path):
  target, link = tmp_path / 'target', tmp_path / 'link'
  arrays = {'a': np.ones(3)}
  link.symlink_to(target)
  with pytest.raises(FileExistsError, match='overwrite=True'):
    files.save_arrays(link, arrays)  # it points to nothing, and is kept
  assert os.listdir(tmp_path) == ['link']
  for value in (1, 2):
    files.save_arrays(link, {'a': np.full(3, value)}, overwrite=True)
    assert link.is_symlink() and not target.is_symlink()
    np.testing.assert_array_equal(files.load_arrays(target)['a'], value)


def test_what_is_no_regular_file_is_not_overwritten(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  (tmp_path / 'folder').mkdir()
  (tmp_path / 'loop').symlink_to('loop')
  (tmp_path / 'to_folder').symlink_to('folder')
  for name in ('pipe', 'folder', 'loop', 'to_folder'):
    with pytest.raises(FileExistsError, match='not a regular file'):
      files.save_bytes(tmp_path / name, b'', overwrite=True)
  assert sorted(os.listdir(tmp_path)) == ['folder', 'loop', 'pipe', 'to_folder']
