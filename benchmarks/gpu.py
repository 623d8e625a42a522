"""Kernels on a device: numbers against float64, then times, then whole models.

Most important first, within a budget of seconds; what is known is written after
every case. The work is done in a process of its own: a kernel that hangs or
takes the process with it is left out of the rest.
"""

import argparse
from collections.abc import Callable
import json
import math
import os
import pathlib
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax

from benchmarks import device, report
from benchmarks.device import GATED, KINDS
from benchmarks.shapes import (
  Case,
  blocks_of,
  checked,
  checks_of,
  kinds_of,
  norms_of,
)
from normkit.kernels import record

HUNG = 120  # seconds without an answer
LOST = 3  # exit status: the device is to be taken anew


def answers() -> bool:
  """Whether the device still computes, after a failure."""
  try:
    return float(jax.numpy.ones(3).sum()) == 3
  except Exception:
    return False


class Session:
  """What was found so far, in a file, and the time that is left."""

  def __init__(self, path: pathlib.Path, until: float) -> None:
    self.path, self.until = path, until
    self.read()

  def read(self) -> None:
    self.data: dict[str, Any] = {'found': {}, 'running': None}
    if self.path.exists():
      self.data = json.loads(self.path.read_text())

  @property
  def found(self) -> dict[str, Any]:
    """What each step gave, by its key; or 'failed' and why."""
    return self.data['found']

  @property
  def left(self) -> float:
    return self.until - time.time()

  def write(self, **values: Any) -> None:
    self.data |= values
    part = self.path.with_suffix('.part')
    part.write_text(json.dumps(self.data, indent=1))
    part.replace(self.path)

  def do(self, key: str, work: Callable[..., Any], *given: Any) -> None:
    """Does what is not done yet, while there is time, and keeps the reason."""
    if key in self.found or self.left < 0:
      return
    print(f'{self.left:.0f} s left: {key}', flush=True)
    self.write(running=key)
    try:
      self.found[key] = work(*given)
    except Exception as error:
      why = str(error).strip().split('\n')[0][:300]
      self.found[key] = {'failed': f'{type(error).__name__}: {why}'}
    self.write(running=None)
    if not self.good(key) and not answers():
      raise SystemExit(LOST)

  def good(self, key: str) -> bool:
    return key in self.found and 'failed' not in self.found[key]

  @property
  def failures(self) -> list[str]:
    return [k for k in self.found if not self.good(k)]


def check_key(name: str, case: Case) -> str:
  return f'check: {name} {checked(case)}'


class Run(NamedTuple):
  """What the parts need: the session, kernels, seconds for each timing."""

  session: Session
  kernels: list[str]
  seconds: float
  is_dry: bool

  def taken(self, case: Case) -> list[str]:
    """The kernels whose numbers are right for a case."""
    good = self.session.good
    return [n for n in self.kernels if good(check_key(n, case))]


def check_numbers(run: Run) -> None:
  for case in checks_of(run.is_dry):
    for name in run.kernels:
      if device.refusal(name, case) is None:
        key, small = check_key(name, case), checked(case)
        run.session.do(key, device.check, name, small)


def time_norms(run: Run) -> None:
  for case in norms_of(run.is_dry):
    given = case, run.taken(case), run.seconds
    run.session.do(f'norm: {case}', device.norm_times, *given)


def time_blocks(run: Run) -> None:
  for case in blocks_of(run.is_dry):
    good = run.taken(case)
    for kind in kinds_of(case, run.is_dry) if good else ():
      given = case, kind, good, run.seconds
      run.session.do(block_key(case, kind), device.block_times, *given)


def time_models(run: Run) -> None:
  good = [n for n in run.kernels if is_sound(run.session, n)]
  for name, make in device.models_of(run.is_dry).items():
    # Interpreted, more of them would take minutes to compile.
    some = good[-1:] * (name == 'transformer') if run.is_dry else good
    given = make, some, run.seconds
    run.session.do(f'model: {name}', device.step_times, *given)


# Each part, and the share of the time after which it starts nothing more.
PARTS: dict[str, tuple[Callable[[Run], None], float]] = {
  'check': (check_numbers, 0.4),
  'norms': (time_norms, 0.6),
  'blocks': (time_blocks, 0.9),
  'models': (time_models, 0.98),
}


def work(session: Session, args: argparse.Namespace) -> None:
  """Everything, in this process."""
  found = jax.devices()[0]
  session.write(
    chip=found.device_kind,
    platform=found.platform,
    jax=jax.__version__,
    date=time.strftime('%Y-%m-%d %H:%M', time.gmtime()),
  )
  names = [n for n in device.names() if n in args.kernel]
  run = Run(session, names, 0.0 if args.dry else 0.3, args.dry)
  for name in args.part:
    part, share = PARTS[name]
    session.until = args.until - (1 - share) * args.seconds
    part(run)
    session.write(entries=entries(run))


def block_key(case: Case, kind: str) -> str:
  return f'block: {case}: {kind}'


def is_sound(session: Session, name: str) -> bool:
  """Whether no check of a kernel has failed, and there was one."""
  keys = [k for k in session.found if k.startswith(f'check: {name} ')]
  return bool(keys) and all(map(session.good, keys))


def entries(run: Run) -> list[dict[str, Any]]:
  """What is known of the cases that have the times of all their blocks."""
  session, found = run.session, []
  for case in blocks_of(run.is_dry):
    keys = {k: block_key(case, k) for k in kinds_of(case, run.is_dry)}
    if not all(map(session.good, keys.values())):
      continue
    times = {kind: session.found[key] for kind, key in keys.items()}
    for name in run.taken(case):
      error = max(session.found[check_key(name, case)].values())
      found.append(device.entry(case, name, error, times)._asdict())
  return found


def save(session: Session, path: pathlib.Path = record.PATH) -> int:
  """Writes the record into the package, or says why not."""
  bad = [k for k in session.failures if k.startswith('check')]
  if session.data.get('platform') in (None, 'cpu'):
    print('nothing is recorded: no GPU or TPU was timed.')
    return 1
  if bad:
    print(f'nothing is recorded: these checks failed: {"; ".join(bad)}')
    return 1
  new = session.data.get('entries', [])
  if not new:
    print('nothing is recorded: no case has the times of all its blocks.')
    return 1

  def case(entry: dict[str, Any]) -> str:
    names = 'chip', 'kernel', 'center', 'dtype', 'shape', 'groups'
    return json.dumps([entry[n] for n in names])

  old = _old(path)
  merged = {case(e): e for e in [*old, *new]}
  part = path.with_suffix('.part')
  part.write_text(json.dumps(list(merged.values()), indent=1) + '\n')
  part.replace(path)
  print(f'{len(new)} cases are recorded in {path}')
  return 0


def _old(path: pathlib.Path) -> list[dict[str, Any]]:
  """What is recorded there; nothing of what this version cannot read."""
  try:
    return [e._asdict() for e in record.read(path)]
  except record.UNREADABLE:
    return []


def supervise(session: Session, args: argparse.Namespace) -> None:
  """Runs the work in a process, anew where a case hangs or ends it."""
  options = [f'--json={args.json}', f'--until={session.until}']
  options += [f'--seconds={args.seconds}', '--part', *args.part]
  options += ['--kernel', *args.kernel]
  command = [sys.executable, '-m', 'benchmarks', 'gpu', *options]
  while session.left > 0:
    process = subprocess.Popen(command)
    why = _watch(process, session)
    if why is None:
      return
    session.read()
    key = session.data.get('running')
    if key is None and process.returncode != LOST:
      print(f'given up: {why}')
      return
    if key is not None:
      session.found[key] = {'failed': why}
      session.write(running=None)


def _watch(process: Any, session: Session) -> str | None:
  """Why the process did not finish, or None."""
  changed = time.time()
  stamp = None
  while process.poll() is None:
    time.sleep(0.2)
    now = session.path.stat().st_mtime if session.path.exists() else None
    if now != stamp:
      stamp, changed = now, time.time()
    if session.left < 0 or time.time() - changed > HUNG:
      process.kill()
      process.wait()
      return None if session.left < 0 else f'no answer in {HUNG} s'
  return f'ended with {process.returncode}' if process.returncode else None


def show(session: Session, documents: list[pathlib.Path]) -> None:
  """Tables of what was found."""
  data, found = session.data, session.found
  title = f'{data.get("chip")}, jax {data.get("jax")}, {data.get("date")}'
  checks = [k for k in found if k.startswith('check')]
  good = sum(map(session.good, checks))
  print(f'{title}: {good} of {len(checks)} checks hold')
  for key in session.failures:
    print(f'{key}: {found[key]["failed"]}')
  rows = []
  for key in found:
    if key.startswith('norm: ') and session.good(key):
      rows += _shares(key.removeprefix('norm: '), found[key])
  header = ['share of the copy', *_libraries(found)]
  rows = [[r[0], *(r[1].get(n, '') for n in header[1:])] for r in rows]
  report.publish('device', f'{title}: norms', header, rows, documents)
  times = {
    k: found[k]
    for k in found
    if k.startswith(('block', 'model')) and session.good(k)
  }
  names = list(dict.fromkeys(n for t in times.values() for n in t))
  lines = [
    [k, *(f'{1e3 * t[n]:.3f}' if n in t else '' for n in names)]
    for k, t in times.items()
  ]
  header = ['ms of a step', *names]
  report.publish('steps', f'{title}: steps', header, lines, documents)


def _libraries(found: dict[str, Any]) -> list[str]:
  each = [
    t for k, v in found.items() if k.startswith('norm') for t in v.values()
  ]
  return list(dict.fromkeys(n for t in each if isinstance(t, dict) for n in t))


def _shares(
  case: str, kinds: dict[str, dict[str, float]]
) -> list[tuple[str, dict[str, str]]]:
  """Bytes a second that each form needs at least, over those of a copy of x.

  Of the copy itself they are given in GB/s.
  """
  shape, dtype = case.split()[1:3]
  size = math.prod(map(int, shape.split('x')))
  size *= 4 if dtype == 'float32' else 2
  passes = GATED if ' gate ' in case else KINDS
  rows = []
  for kind, times in kinds.items():
    copy = 2 * size / times['copy']
    cells = {
      n: f'{passes[kind] * size / t / copy:.2f}' for n, t in times.items()
    }
    cells['copy'] = f'{copy / 1e9:.0f} GB/s'
    rows.append((f'{case}: {kind}', cells))
  return rows


def run(args: argparse.Namespace) -> int:
  # Half is torch's.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  if args.dry:
    jax.config.update('jax_platforms', 'cpu')
    # Mosaic GPU's interpreter has one to itself, and waits for ever where there
    # are few threads, which are as many as devices.
    if jax.config.jax_num_cpu_devices < 8:
      jax.config.update('jax_num_cpu_devices', 8)
  is_child = args.until is not None
  if not is_child:
    args.json.unlink(missing_ok=True)
  args.until = args.until or time.time() + args.seconds
  session = Session(args.json, args.until)
  if is_child or args.dry:
    if jax.default_backend() == 'cpu' and not args.dry:
      session.write(platform='cpu')
      return 0
    work(session, args)
    if is_child:
      return 0
  else:
    supervise(session, args)
  session = Session(args.json, args.until)
  if session.data.get('platform') == 'cpu' and not args.dry:
    print('no GPU or TPU here: nothing to time. `bytes` compiles for them, and')
    print('`gpu --dry` runs all of this small.')
    return 1
  if args.dry:
    print(f'{len(session.found)} steps ran small, interpreted; no time is told')
    for key in session.failures:
      print(f'{key}: {session.found[key]["failed"]}')
  else:
    show(session, args.update)
  if args.record:
    return save(session)
  return bool(session.failures)


def add_command(commands: Any) -> None:
  parser = commands.add_parser('gpu', help=__doc__.splitlines()[0])
  parser.add_argument(
    '--seconds',
    type=float,
    default=480,
    help='for all of it; most matter first',
  )
  parser.add_argument('--part', nargs='*', choices=PARTS, default=list(PARTS))
  known = 'mosaic_gpu', 'triton', 'mosaic_tpu'
  parser.add_argument('--kernel', nargs='*', choices=known, default=list(known))
  parser.add_argument(
    '--dry', action='store_true', help='small, on a CPU, kernels interpreted'
  )
  parser.add_argument(
    '--record', action='store_true', help='write the record into the package'
  )
  parser.add_argument(
    '--json', type=pathlib.Path, default=pathlib.Path('gpu.json')
  )
  parser.add_argument('--until', type=float, help=argparse.SUPPRESS)
  report.add_update(parser)
  parser.set_defaults(run=run)
