"""The benchmarks run, and what they time is the same work in every library."""

import argparse
import importlib.util
import itertools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiers import thinned

from benchmarks import (
  accuracy,
  compiling,
  device,
  family,
  gpu,
  kernels,
  parity,
  shapes,
  speed,
)
from benchmarks.__main__ import main
from normkit.kernels import cases, dispatch, record

SHAPE = 4, 6, 6, 64
LIBRARIES = [
  pytest.param(
    name,
    marks=pytest.mark.skipif(
      not importlib.util.find_spec(name.split()[0]),
      reason=f'{name} is not installed: pip install -e ".[benchmarks]"; flax '
      'and normkit are held to the same reference',
    ),
  )
  for name in speed.LIBRARIES
]
AXES = {
  'LayerNorm': (-1,),
  'RMSNorm': (-1,),
  'BatchNorm': (0, 1, 2),
  'InstanceNorm': (1, 2),
}


def wanted(norm, arrays):
  x = arrays.x.astype(np.float64)
  axes = AXES.get(norm)
  if axes is None:  # groups of neighbouring channels
    x = x.reshape(*x.shape[:-1], speed.GROUPS, -1)
    axes = 1, 2, 4
  mean = 0 if norm == 'RMSNorm' else x.mean(axes, keepdims=True)
  var = np.square(x - mean).mean(axes, keepdims=True)
  y = ((x - mean) / np.sqrt(var + speed.EPSILON)).reshape(arrays.x.shape)
  return y * arrays.scale + (0 if norm == 'RMSNorm' else arrays.bias)


@pytest.mark.parametrize('norm', thinned(speed.CPU_SHAPES, every=3))
@pytest.mark.parametrize('library', LIBRARIES)
def test_the_same_work(library, norm):
  function = speed.LIBRARIES[library](norm)
  if function is None:
    assert library in ('equinox', 'tokamax')
    return
  shape = (24, 64) if norm in ('LayerNorm', 'RMSNorm') else SHAPE
  arrays = speed.draw(shape, 'float32')
  make = speed.torch_calls if library == 'torch' else speed.jax_calls
  calls = make(function, arrays)
  y = np.asarray(calls['forward']())
  np.testing.assert_allclose(y, wanted(norm, arrays), atol=1e-4)
  again, gradients = calls['step']()
  again = np.asarray(again.detach() if library == 'torch' else again)
  np.testing.assert_allclose(again, y, atol=1e-5)
  dx = np.asarray(gradients[0], np.float64)
  dy, step = arrays.dy.astype(np.float64), 1e-5
  above, below = (
    wanted(norm, arrays._replace(x=arrays.x + s * dy)) for s in (step, -step)
  )
  change = np.sum(dy * (above - below)) / (2 * step)
  np.testing.assert_allclose(np.sum(dx * dy), change, rtol=1e-4)


@pytest.mark.parametrize('name', family.CASES)
def test_formulas_written_out_are_the_norms(name):
  case = family.CASES[name]
  shapes = [[min(s, 8) for s in a.shape] for a in family.arrays_of(case)]
  random = np.random.default_rng(0)
  args = [random.normal(size=s).astype(np.float32) for s in shapes]
  with jax.numpy_rank_promotion('allow'):
    y, want = (jax.jit(f)(*args) for f in (case.ours, case.written))
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.second_tier
def test_accuracy_is_what_is_promised(monkeypatch, capsys):
  """Not by a pivot that knows nothing of the mean."""
  few = {'ROWS': (16, 520), 'BATCHES': (100,), 'SEEDS': 1, 'RATIOS': (0, 1e4)}
  for name, value in few.items():
    monkeypatch.setattr(accuracy, name, value)
  monkeypatch.setattr(sys, 'argv', ['benchmarks', 'accuracy'])
  assert main() == 0
  assert 'every bound holds' in capsys.readouterr().out
  monkeypatch.setattr(accuracy.peers, 'available', dict)
  monkeypatch.setattr(accuracy, '_mean_of_sample', lambda x, *_: 0 * x[:1, :1])
  jax.clear_caches()
  assert main() == 1


def test_timing_and_its_table(tmp_path):
  rows = speed.measure('LayerNorm', (8, 16), 'float32', ['normkit', 'flax'], 0)
  assert {row['program'] for row in rows} == {'forward', 'step'}
  assert all(row['low'] <= row['ratio'] <= row['high'] for row in rows)
  header, lines = speed.table(rows, ['normkit', 'flax'])
  assert len(header) == len(lines[0]) == 3
  speed.plot(rows, tmp_path / 'plot.png', 'cpu')
  assert (tmp_path / 'plot.png').stat().st_size > 1000


def test_parity_of_drawn_shapes(monkeypatch, capsys, tmp_path):
  """Others with another seed, of every norm, and a line for each program."""
  drawn = list(itertools.islice(parity.cases(0), 200))
  assert drawn == list(itertools.islice(parity.cases(0), 200))
  assert drawn[:9] != list(itertools.islice(parity.cases(1), 9))
  assert {case.norm for case in drawn} == set(speed.CPU_SHAPES)
  assert all(np.prod(case.shape) in parity.SIZES for case in drawn)
  small = [case for case in drawn if np.prod(case.shape) < 5000][:2]
  monkeypatch.setattr(parity, 'cases', lambda seed: iter(small))
  monkeypatch.setattr(speed, 'settle_memory', lambda: None)
  page = tmp_path / 'page.md'
  page.write_text('<!-- parity -->\n<!-- /parity -->\n')
  argv = 'benchmarks', 'parity', '--seconds=0', f'--update={page}'
  monkeypatch.setattr(sys, 'argv', list(argv))
  assert main() == 0
  assert capsys.readouterr().out.count('Case(') == 4
  lines = page.read_text().splitlines()[3:-1]
  assert sum(int(line.split('|')[2]) for line in lines) == 4


@pytest.mark.parametrize(
  'program',
  [
    compiling.one_norm('normkit', 'LayerNorm'),
    compiling.many_norms('normkit'),
  ],
  ids=['one', 'many'],
)
def test_compile_table(program):
  found = compiling.measure(*program)
  assert found['traces'] == 1
  assert found['instructions'] > 10


@pytest.fixture
def command(monkeypatch, tmp_path):
  """Runs `python -m benchmarks gpu` here, and gives its session."""
  path = tmp_path / 'gpu.json'

  def run(*options):
    jax.clear_caches()
    argv = ['benchmarks', 'gpu', f'--json={path}', *options]
    monkeypatch.setattr(sys, 'argv', argv)
    status = main()
    jax.clear_caches()
    return status, gpu.Session(path, 0)

  return run


@pytest.mark.second_tier
def test_all_of_the_script_for_a_device(command):
  """Small, on a CPU: every part runs, and no check fails."""
  status, session = command('--dry', '--seconds=9999')
  assert not session.failures, session.found
  assert status == 0
  parts = [key.split(':')[0] for key in session.found]
  checks = parts.count('check')
  # Scale and bias of an example, and a gate, by Mosaic GPU alone.
  assert checks == 2 * len(device.names()) + 2
  assert parts[checks:] == [*['norm'] * 4, 'block', *['model'] * 3]
  entries = session.data['entries']
  assert [e['kernel'] for e in entries] == device.names()
  assert list(entries[0]['milliseconds']) == ['norm, gelu']


@pytest.mark.skipif(
  jax.default_backend() != 'cpu', reason='there is a GPU or TPU to time here'
)
def test_without_a_device_it_says_so(command, capsys):
  assert command('--dry', '--part', '--record')[0] == 1
  assert 'nothing is recorded: no GPU' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('capability', 'names'), [(8.0, ['triton']), (9.0, ['mosaic_gpu', 'triton'])]
)
def test_kernels_that_a_device_has(capability, names, monkeypatch):
  """No check fails where there is nothing to check."""
  monkeypatch.setattr(dispatch, 'oldest_gpu', lambda: capability)
  assert device.names() == names
  module = dispatch.NEEDS['triton'].module
  monkeypatch.setitem(sys.modules, module, None)  # a JAX without it
  assert device.names() == names[:-1]


def test_what_a_device_is_asked():
  """All kinds of cases, by both kernels where they take them."""
  asked = shapes.checks_of(False)
  refusals = {n: [device.refusal(n, c) for c in asked] for n in device.names()}
  assert not any(refusals['mosaic_gpu'])
  assert refusals['triton'].count(None) > len(asked) / 2
  assert {c.dtype for c in asked} == {'float32', 'bfloat16', 'float16'}
  assert {c.more for c in asked} == {None, 'residual', 'silu', 'rounding'}
  small = [shapes.checked(c) for c in asked]
  assert len(set(small)) == len(asked)
  assert max(np.prod(c.shape) for c in small) < 2**22
  for case in shapes.norms_of(False) + shapes.blocks_of(False):
    assert shapes.checked(case) in small


CASE = device.Case('LayerNorm', (4, 8), 'float32')


@pytest.mark.second_tier
@pytest.mark.parametrize(
  ('norm', 'shape', 'more'),
  [
    ('LayerNorm', (4, 8), {}),
    ('RMSNorm', (4, 8), {}),
    ('GroupNorm', (2, 3, 4, 8), {'groups': 2}),
    ('LayerNorm', (2, 3, 8), {'of': 'example'}),
    ('RMSNorm', (3, 2, 8), {'of': 'head'}),
    ('RMSNorm', (4, 8), {'gate': 'last'}),
    ('RMSNorm', (4, 8), {'gate': 'first'}),
    ('LayerNorm', (4, 8), {'more': 'residual'}),
    ('RMSNorm', (4, 8), {'more': 'silu'}),
  ],
)
def test_numbers_of_a_device_are_checked(norm, shape, more, monkeypatch):
  case = device.Case(norm, shape, 'float32', **more)
  assert max(device.check('xla', case).values()) < 1e-6
  exact = device.exact
  monkeypatch.setattr(
    device, 'exact', lambda *a: [y * (1 + 1e-4) for y in exact(*a)]
  )
  with pytest.raises(ArithmeticError, match='dx'):
    device.check('xla', case)


def test_a_session_keeps_what_it_has(tmp_path):
  session = gpu.Session(tmp_path / 'gpu.json', 2**40)
  session.do('one', lambda: {'seconds': 1})
  session.do('two', lambda: 1 / 0)
  session.do('one', lambda: 1 / 0)
  session = gpu.Session(session.path, 0)
  session.do('three', lambda: {})
  assert session.found == {
    'one': {'seconds': 1},
    'two': {'failed': 'ZeroDivisionError: division by zero'},
  }
  assert session.failures == ['two']


@pytest.mark.parametrize(
  ('exit', 'why'),
  [('raise SystemExit(7)', 'ended with 7'), ('time.sleep(60)', 'no answer')],
)
def test_what_ends_or_hangs_is_left_out(tmp_path, monkeypatch, exit, why):
  session = gpu.Session(tmp_path / 'gpu.json', 2**40)
  session.write(running='one')
  monkeypatch.setattr(gpu, 'HUNG', 0.5)
  process = subprocess.Popen([sys.executable, '-c', f'import time; {exit}'])
  assert why in gpu._watch(process, session)


def test_blocks_that_are_timed_have_a_bias():
  case = device.Case('LayerNorm', (4, 8), 'float32')
  x, scale = np.ones((4, 8), 'f'), np.arange(8, dtype='f')
  for options, wanted in ({}, 0 * x), ({'has_bias': True}, 0 * x + scale):
    run, _ = kernels.block('norm', case.norm, 'xla', case.dtype, **options)
    np.testing.assert_array_equal(run(x, scale, None, None), wanted)


def test_shares_of_a_copy():
  """A copy moves x twice, a backward three times at least."""
  times = {'copy': 2e-3, 'xla': 6e-3}
  case = 'LayerNorm 1000x1000 bfloat16'
  found = dict(gpu._shares(case, dict.fromkeys(device.KINDS, times)))
  assert found[f'{case}: forward'] == {'copy': '2 GB/s', 'xla': '0.33'}
  assert found[f'{case}: backward']['xla'] == '0.50'


def test_what_is_cut_off_keeps_its_entries(tmp_path, monkeypatch):
  """After the blocks, as in a model that is compiled for too long."""

  def cut(_):
    raise SystemExit

  monkeypatch.setitem(gpu.PARTS, 'models', (cut, 1))
  entries = [{'chip': 'some'}]
  monkeypatch.setattr(gpu, 'entries', lambda _: entries)
  session = gpu.Session(tmp_path / 'gpu.json', 2**40)
  parts = [p for p in gpu.PARTS if p == 'models']
  args = argparse.Namespace(
    kernel=[], dry=True, part=['blocks', *parts], until=0, seconds=1
  )
  with pytest.raises(SystemExit):
    gpu.work(session, args)
  assert gpu.Session(session.path, 0).data['entries'] == entries


def times_of(kernel, xla=2.0):
  return {
    'platform': 'gpu',
    'entries': [
      device.entry(CASE, 'triton', 1e-7, {'a': found, 'b': found})._asdict()
      for found in [{'xla': xla, 'triton': kernel}]
    ],
  }


@pytest.fixture
def recorded(tmp_path, monkeypatch):
  """Writes a record and reads it."""
  monkeypatch.setattr(record, 'PATH', tmp_path / 'record.json')
  record.PATH.write_text('[]')
  session = gpu.Session(tmp_path / 'gpu.json', 0)

  def write(**data):
    session.write(**data)
    record.entries.cache_clear()
    return gpu.save(session, record.PATH)

  yield write
  record.entries.cache_clear()


def test_a_record_chooses(recorded):
  """In its case, or with more rows, on its chip; no longer than it wins."""
  chip = jax.devices()[0].device_kind
  assert cases.chosen((4, 8), 'float32') == {}
  assert recorded(**times_of(1.0)) == 0
  assert cases.chosen((4, 8), 'float32') == {'triton': (chip,)}
  assert cases.chosen((2, 5, 8), 'float32') == {'triton': (chip,)}
  for other in (
    cases.chosen((3, 8), 'float32'),
    cases.chosen((4, 16), 'float32'),
    cases.chosen((4, 8), 'bfloat16'),
    cases.chosen((4, 8), 'float32', center=False),
    cases.chosen((4, 8), 'float32', residual=True),
    cases.chosen((4, 8), 'float32', activation=True),
    cases.chosen((4, 8), 'float32', groups=4),
    cases.chosen((4, 8), 'float32', result='bfloat16'),
  ):
    assert other == {}
  versions = {'jax', 'jaxlib', 'normkit', 'device'}
  assert record.entries()[0].versions.keys() == versions
  assert recorded(**times_of(2.0)) == 0
  assert len(json.loads(record.PATH.read_text())) == 1
  assert cases.chosen((4, 8), 'float32') == {}


def made(kernel, xla, chip='H200', rows=4, name='triton'):
  times = {'a': {'xla': xla, name: kernel}}
  case = CASE._replace(shape=(rows, 8))
  return device.entry(case, name, 1e-7, times)._replace(chip=chip)._asdict()


@pytest.mark.parametrize(
  ('rows', 'chosen'),
  [(3, {}), (7, {'triton': ('H200',)}), (8, {}), (99, {})],
)
def test_the_nearest_case_of_a_record_decides(recorded, rows, chosen):
  """More rows have been slower: what fewer say is no longer heard."""
  data = [made(3.0, 2.0, rows=8), made(1.0, 2.0)]
  assert recorded(platform='gpu', entries=data) == 0
  assert cases.chosen((rows, 8), 'float32') == chosen


def test_each_chip_has_its_fastest(recorded):
  data = [
    made(1.0, 9.0, 'B200'),
    made(2.0, 9.0, 'B200', name='mosaic_gpu'),
    made(4.0, 9.0, 'H200'),
    made(3.0, 9.0, 'H200', name='mosaic_gpu'),
    made(8.0, 9.0, 'A100'),
    made(7.0, 6.0, 'A100', name='mosaic_gpu'),
  ]
  assert recorded(platform='gpu', entries=data) == 0
  assert cases.chosen((4, 8), 'float32') == {
    'triton': ('B200', 'A100'),
    'mosaic_gpu': ('H200',),
  }


UNREAD = {
  'cut': '[{',
  'empty': '',
  'number': '[1]',
  'older': '[{"kernel": "triton"}]',
  'gone': None,
  'kernel': {'kernel': 'cudnn'},
  'newer': {'more': 1},
}


@pytest.mark.parametrize('text', UNREAD.values(), ids=UNREAD)
def test_a_record_that_is_not_read(recorded, text):
  """XLA runs, one is told once, and another record can be made."""
  if isinstance(text, dict):
    text = json.dumps([made(1.0, 2.0) | text])
  record.PATH.unlink() if text is None else record.PATH.write_text(text)
  with pytest.warns(UserWarning, match='run by XLA; install'):
    assert cases.chosen((4, 8), 'float32') == {}
  assert cases.chosen((4, 8), 'float32') == {}
  assert recorded(platform='gpu', entries=[made(1.0, 2.0)]) == 0
  assert cases.chosen((4, 8), 'float32') == {'triton': ('H200',)}


def test_a_record_is_refused(recorded, capsys):
  found = {'check: triton LayerNorm 4x8 float32': {'failed': 'far'}}
  for data, why in (
    (times_of(1.0) | {'platform': 'cpu'}, 'no GPU'),
    (times_of(1.0) | {'found': found}, 'checks failed: check: triton'),
    (times_of(1.0) | {'found': {}, 'entries': []}, 'no case'),
  ):
    assert recorded(**data) == 1
    assert why in capsys.readouterr().out
    assert record.PATH.read_text() == '[]'
