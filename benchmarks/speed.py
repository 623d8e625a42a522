"""Time of each norm beside its peers, forward and with the backward.

Every library runs the same work on the same arrays, one call of each in turn,
many times over in one process; what is reported is the median of the ratios to
Flax's call in the same round, with the middle half of them.
"""

import argparse
from collections.abc import Callable
import ctypes
import functools
import importlib.util
import json
import pathlib
import platform
import time
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from benchmarks import report
import normkit as nk

GROUPS = 32
EPSILON = 1e-5
CPU_SHAPES = {
  'LayerNorm': [(4096, 768), (16_384, 256), (2048, 4096)],
  'RMSNorm': [(4096, 768), (2048, 4096)],
  'BatchNorm': [(32, 56, 56, 64), (64, 14, 14, 512)],
  'GroupNorm': [(32, 56, 56, 64)],
  'InstanceNorm': [(16, 64, 64, 32)],
}
Function = Callable[..., Any]


class Arrays(NamedTuple):
  """What a norm takes, and the gradient of its output."""

  x: Any
  scale: Any
  bias: Any
  dy: Any


def draw(shape: tuple[int, ...], dtype: str) -> Arrays:
  rng = np.random.default_rng(0)
  x, dy = (rng.standard_normal(shape, np.float32) for _ in range(2))
  scale, bias = (rng.standard_normal(shape[-1], np.float32) for _ in range(2))
  dtype = jnp.dtype(dtype)
  return Arrays(x.astype(dtype), scale, bias, dy.astype(dtype))


# Each gives `(x, scale, bias) -> y` of a norm, or None where it has none.


def of_normkit(norm: str, implementation: str | None = None) -> Function | None:
  options = {'epsilon': EPSILON, 'implementation': implementation}

  def batch(x, scale, bias):
    zeros = jnp.zeros(x.shape[-1])
    state = nk.BatchNormState(zeros, zeros + 1, zeros.astype(int))
    return nk.batch_norm(x, state, scale, bias, train=True, **options)[0]

  def rms(x, scale, bias):
    del bias
    return nk.rms_norm(x, scale, **options)

  return {
    'LayerNorm': functools.partial(nk.layer_norm, **options),
    'RMSNorm': rms,
    'BatchNorm': batch,
    'GroupNorm': functools.partial(nk.group_norm, num_groups=GROUPS, **options),
    'InstanceNorm': functools.partial(nk.instance_norm, **options),
  }[norm]


def of_flax(norm: str, fast: bool = True) -> Function:
  options: dict[str, Any] = {'epsilon': EPSILON, 'use_fast_variance': fast}
  if norm == 'BatchNorm':
    options['use_running_average'] = False

  def apply(x, scale, bias):
    params = {'scale': scale} | ({} if norm == 'RMSNorm' else {'bias': bias})
    channels = x.shape[-1]
    stats = {'mean': jnp.zeros(channels), 'var': jnp.ones(channels)}
    variables = {'params': params, 'batch_stats': stats}
    module = getattr(nn, norm)(dtype=x.dtype, **options)
    return module.apply(variables, x, mutable=['batch_stats'])[0]

  return apply


def of_haiku(norm: str) -> Function:
  import haiku as hk

  names = {
    'LayerNorm': lambda: hk.LayerNorm(-1, True, True, EPSILON),
    'RMSNorm': lambda: hk.RMSNorm(-1, EPSILON),
    'BatchNorm': lambda: hk.BatchNorm(True, True, 0.9, EPSILON),
    'GroupNorm': lambda: hk.GroupNorm(GROUPS, eps=EPSILON),
    'InstanceNorm': lambda: hk.InstanceNorm(True, True, EPSILON),
  }
  options = {'is_training': True} if norm == 'BatchNorm' else {}
  function = hk.transform_with_state(lambda x: names[norm]()(x, **options))

  def apply(x, scale, bias):
    params, state = jax.eval_shape(function.init, jax.random.key(0), x)

    def value(path, leaf):
      chosen = bias if path[-1].key == 'offset' else scale
      return chosen.astype(leaf.dtype).reshape(leaf.shape)

    params = jax.tree.map_with_path(value, params)
    state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), state)
    return function.apply(params, state, None, x)[0]

  return apply


def of_equinox(norm: str) -> Function | None:
  """Its other norms take one example with its channels first."""
  import equinox as eqx

  if norm not in ('LayerNorm', 'RMSNorm'):
    return None

  def apply(x, scale, bias):
    if norm == 'RMSNorm':
      module = eqx.nn.RMSNorm(x.shape[-1], eps=EPSILON, use_bias=False)
      module = eqx.tree_at(lambda m: m.weight, module, scale)
    else:
      module = eqx.nn.LayerNorm(x.shape[-1], eps=EPSILON)
      module = eqx.tree_at(lambda m: (m.weight, m.bias), module, (scale, bias))
    return jax.vmap(module)(x)

  return apply


def of_tokamax(norm: str) -> Function | None:
  import tokamax

  if norm not in ('LayerNorm', 'RMSNorm'):
    return None

  def apply(x, scale, bias):
    centered = norm == 'LayerNorm'
    return tokamax.layer_norm(
      x,
      scale,
      bias if centered else None,
      epsilon=EPSILON,
      subtract_mean=centered,
    )

  return apply


def of_torch(norm: str, compiled: bool = False) -> Function:
  import torch
  from torch.nn import functional as f

  def apply(x, scale, bias):
    if norm == 'LayerNorm':
      return f.layer_norm(x, x.shape[-1:], scale, bias, EPSILON)
    if norm == 'RMSNorm':
      return f.rms_norm(x, x.shape[-1:], scale, EPSILON)
    x = x.movedim(-1, 1)  # a view: the memory stays channels last
    if norm == 'BatchNorm':
      y = f.batch_norm(x, None, None, scale, bias, True, 0.1, EPSILON)
    elif norm == 'GroupNorm':
      y = f.group_norm(x, GROUPS, scale, bias, EPSILON)
    else:
      y = f.instance_norm(x, None, None, scale, bias, True, 0.1, EPSILON)
    return y.movedim(1, -1)

  return torch.compile(apply) if compiled else apply


LIBRARIES: dict[str, Callable[[str], Function | None]] = {
  'normkit': of_normkit,
  'flax': of_flax,
  'flax slow': functools.partial(of_flax, fast=False),
  'haiku': of_haiku,
  'equinox': of_equinox,
  'torch': of_torch,
  'tokamax': of_tokamax,
}


def installed(names: list[str]) -> list[str]:
  found = [n for n in names if importlib.util.find_spec(n.split()[0])]
  if missing := [n for n in names if n not in found]:
    print(f'not installed and left out: {", ".join(missing)}')
  return found


def jax_calls(function: Function, arrays: Arrays) -> dict[str, Function]:
  """`forward` and `step`, compiled, on arrays that are in place."""
  placed = jax.tree.map(jax.device_put, arrays)

  def step(x, scale, bias, dy):
    y, pull = jax.vjp(function, x, scale, bias)
    return y, pull(dy.astype(y.dtype))

  calls = {}
  for name, run in ('forward', function), ('step', step):
    given = placed[:3] if name == 'forward' else placed
    compiled = jax.jit(run).lower(*given).compile()
    calls[name] = functools.partial(wait_for, compiled, given)
  return calls


def wait_for(compiled: Function, given: Any) -> Any:
  return jax.block_until_ready(compiled(*given))


def torch_calls(function: Function, arrays: Arrays) -> dict[str, Function]:
  import torch

  dtype = torch.bfloat16 if arrays.x.dtype == jnp.bfloat16 else torch.float32
  device = 'cpu' if jax.default_backend() == 'cpu' else 'cuda'
  x, scale, bias, dy = (
    torch.from_numpy(np.asarray(a, np.float32)).to(device, dtype)
    for a in arrays
  )

  def wait(value):
    if device == 'cuda':
      torch.cuda.synchronize()
    return value

  def forward():
    with torch.no_grad():
      return wait(function(x, scale, bias))

  def step():
    given = [a.detach().requires_grad_() for a in (x, scale, bias)]
    y = function(*given)
    return wait((y, torch.autograd.grad(y, given, dy, allow_unused=True)))

  return {'forward': forward, 'step': step}


def interleave(
  calls: dict[str, Function], seconds: float
) -> dict[str, np.ndarray]:
  """Times of each, one call of every library in turn."""
  for call in calls.values():
    call()
    call()
  times: dict[str, list[float]] = {name: [] for name in calls}
  order = np.random.default_rng(0)
  start = time.perf_counter()
  while time.perf_counter() - start < seconds or len(times['flax']) < 5:
    for name in order.permutation(list(calls)):
      begin = time.perf_counter()
      calls[name]()
      times[name].append(time.perf_counter() - begin)
  return {name: np.asarray(t) for name, t in times.items()}


def settle_memory() -> None:
  """Keeps freed memory, so that page faults do not drown what is timed."""
  if platform.system() == 'Linux':
    library = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4  # numbers of glibc's malloc.h
    for option, value in (trim_threshold, 2**31 - 1), (mmap_max, 0):
      if not library.mallopt(option, value):
        print('memory is not kept: page faults are timed too')


def measure(
  norm: str,
  shape: tuple[int, ...],
  dtype: str,
  libraries: list[str],
  seconds: float,
) -> list[dict[str, Any]]:
  """A row for each library and program: median, ratio to Flax and quartiles."""
  arrays = draw(shape, dtype)
  calls = {}
  for name in libraries:
    if function := LIBRARIES[name](norm):
      make = torch_calls if name.startswith('torch') else jax_calls
      calls[name] = make(function, arrays)
  rows = []
  for program in 'forward', 'step':
    times = interleave({n: c[program] for n, c in calls.items()}, seconds)
    for name, found in times.items():
      ratios = found / times['flax']
      low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
      rows.append(
        {
          'norm': norm,
          'shape': 'x'.join(map(str, shape)),
          'dtype': dtype,
          'program': program,
          'library': name,
          'milliseconds': float(np.median(found) * 1e3),
          'ratio': float(middle),
          'low': float(low),
          'high': float(high),
        }
      )
  return rows


def table(
  rows: list[dict[str, Any]], libraries: list[str]
) -> tuple[list[str], list[list[str]]]:
  """Ratios to Flax, with the middle half; Flax itself in milliseconds."""
  cases: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
  for row in rows:
    key = tuple(row[k] for k in ('norm', 'shape', 'dtype', 'program'))
    cases.setdefault(key, {})[row['library']] = row
  others = [n for n in libraries if n != 'flax']
  header = ['time over flax', 'flax, ms', *others]
  lines = []
  for key, found in cases.items():
    line = [' '.join(key), f'{found["flax"]["milliseconds"]:.2f}']
    for name in others:
      r = found.get(name)
      text = f'{r["ratio"]:.2f} ({r["low"]:.2f}-{r["high"]:.2f})' if r else ''
      line.append(text)
    lines.append(line)
  return header, lines


def plot(rows: list[dict[str, Any]], path: pathlib.Path, device: str) -> None:
  """Forward and backward together, over Flax."""
  ratios: dict[str, dict[str, float]] = {}
  for r in rows:
    if r['program'] == 'step':
      label = f'{r["norm"]} {r["shape"]} {r["dtype"]}'
      ratios.setdefault(r['library'], {})[label] = r['ratio']
  labels = list(ratios.pop('flax'))
  series = {
    name: [found.get(label, 0.0) for label in labels]
    for name, found in ratios.items()
  }
  title = f'time over flax, forward and backward ({device})'
  report.bars(path, labels, series, title, 1)


def run(args: argparse.Namespace) -> int:
  settle_memory()
  libraries = installed(list(LIBRARIES))
  cases = [
    (norm, shape, dtype)
    for norm in args.norms
    for shape in CPU_SHAPES[norm]
    for dtype in args.dtype
  ]
  rows = []
  for case in track(cases, 'timing'):
    rows += measure(*case, libraries, args.seconds)
  header, lines = table(rows, libraries)
  report.publish(
    'cpu', f'cpu, jax {jax.__version__}', header, lines, args.update
  )
  if args.json:
    args.json.write_text(json.dumps(rows, indent=1))
  if args.plot:
    plot(rows, args.plot, 'cpu')
  return 0


def add_command(commands: Any) -> None:
  parser = commands.add_parser('cpu', help=__doc__.splitlines()[0])
  parser.add_argument('--norms', nargs='*', default=list(CPU_SHAPES))
  parser.add_argument('--dtype', nargs='*', default=['float32', 'bfloat16'])
  parser.add_argument(
    '--seconds', type=float, default=3.0, help='time for each program'
  )
  parser.add_argument('--json', type=pathlib.Path)
  parser.add_argument('--plot', type=pathlib.Path)
  report.add_update(parser)
  parser.set_defaults(run=run)
