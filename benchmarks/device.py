"""Norms and models on a device: numbers against float64, then times.

Programs of one case are compiled side by side and run in turn, in a new order
each round; a time is the median of these rounds. Where a call is too short to
time, a program has several, each on what the last one gave.
"""

from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import functools
import importlib.util
import math
import time
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import jaxlib
import numpy as np

from benchmarks import kernels as blocks, models, speed
from benchmarks.exact import error, exact
from benchmarks.shapes import Case
import normkit as nk
from normkit.kernels import cases, dispatch, record

TOLERANCES = {'float32': 2e-5, 'bfloat16': 2e-2, 'float16': 3e-3}
KINDS = {'forward': 2, 'training forward': 2, 'backward': 3}  # passes, at least
GATED = {'forward': 3, 'training forward': 3, 'backward': 5}
LONG_ENOUGH = 2**28  # bytes of x in one program
MOST_CALLS = 16
MOST_DRAWN = 2**20 + 1  # no multiple of a row's length
BATCH = 2e-3  # seconds of calls that are waited for together
Calls = dict[str, Callable[[], Any]]


def names() -> list[str]:
  """The kernels that JAX and the device have; on a CPU those of GPUs."""
  platform = {'gpu': 'cuda', 'cpu': 'cuda'}.get(
    jax.default_backend(), jax.default_backend()
  )
  found = [n for n, where in dispatch.PLATFORMS.items() if where == platform]
  # Mosaic GPU before Triton
  return sorted(n for n in found if dispatch.lacking(n) is None)


def refusal(name: str, case: Case) -> str | None:
  given = case.shape, jnp.dtype(case.dtype), case.groups
  others = (case.parameters,) if case.of else ()
  is_sum = case.more in ('residual', 'silu')
  return cases.refusal(
    name,
    *given,
    residual=is_sum,
    activation=jax.nn.silu if case.more == 'silu' else None,
    parameters=others,
    rounds=case.more == 'rounding',
    gate=case.gate is not None,
  )


def draw(case: Case) -> speed.Arrays:
  """x, scale, bias and the gradient of the result; the same numbers again
  in large ones, which would take seconds to draw."""
  rng = np.random.default_rng(0)

  def some(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    drawn = rng.standard_normal(min(math.prod(shape), MOST_DRAWN), np.float32)
    return np.resize(drawn.astype(jnp.dtype(dtype)), shape)

  x, dy = (some(case.shape, case.dtype) for _ in range(2))
  scale, bias = (some(case.parameters, 'float32') for _ in range(2))
  if case.gate:
    bias = some(case.shape, case.dtype)
  return speed.Arrays(x, scale, bias, dy)


def function(case: Case, name: str) -> Callable[..., Any]:
  """`(x, scale, bias) -> y` by an implementation."""
  options = {'implementation': name, 'epsilon': speed.EPSILON}
  if case.gate:
    options |= {'norm_before_gate': case.gate == 'last'}
    return lambda x, scale, gate: nk.gated_rms_norm(x, gate, scale, **options)
  if case.more in ('residual', 'silu'):
    options |= {'activation': jax.nn.silu} if case.more == 'silu' else {}
    if case.center:
      return lambda x, *given: nk.add_layer_norm(x, x, *given, **options)[0]
    return lambda x, scale, bias: nk.add_rms_norm(x, x, scale, **options)[0]
  if case.norm == 'RMSNorm':
    options['round_before_scale'] = case.more == 'rounding'
    return lambda x, scale, bias: nk.rms_norm(x, scale, **options)
  if case.norm == 'LayerNorm':
    return functools.partial(nk.layer_norm, **options)
  return functools.partial(nk.group_norm, num_groups=case.groups, **options)


@contextlib.contextmanager
def running(name: str) -> Iterator[None]:
  """On a CPU kernels run interpreted."""
  saved = dispatch.interpreted
  if jax.default_backend() == 'cpu' and name in dispatch.PLATFORMS:
    dispatch.interpreted = name
  try:
    yield
  finally:
    dispatch.interpreted = saved


# Numbers.


def check(name: str, case: Case) -> dict[str, float]:
  """How far y and the gradients are from float64; raises if too far."""
  arrays = draw(case)
  norm = function(case, name)

  def training(x, scale, bias, dy):
    y, pull = jax.vjp(norm, x, scale, bias)
    return y, pull(dy)

  programs = {
    f'{name}: forward': (norm, arrays[:3]),
    f'{name}: training': (training, arrays),
  }
  y, (again, found) = (
    jax.block_until_ready(run(*programs[key][1]))
    for key, run in compiled(programs).items()
  )
  wanted_y, *gradients = exact(case, arrays)
  last = 'dgate' if case.gate else 'dbias'
  errors = {
    part: error(actual, wanted)
    for part, actual, wanted in zip(
      ('forward', 'training forward', 'dx', 'dscale', last),
      (y, again, *found),
      (wanted_y, wanted_y, *gradients),
      strict=True,
    )
  }
  limit = TOLERANCES[case.dtype]
  if far := {n: e for n, e in errors.items() if not e <= limit}:
    raise ArithmeticError(f'far from float64: {far}, of at most {limit}')
  return errors


# Times.


def compiled(programs: dict[str, tuple[Any, tuple[Any, ...]]]) -> Any:
  """Each of these programs, compiled; by its name as 'kernel: ...'."""
  lowered = {}
  for key, (run, given) in programs.items():
    library = key.split(':')[0]
    with running(library):
      lowered[key] = jax.jit(run).lower(*given)
  with futures.ThreadPoolExecutor(8) as pool:
    made = pool.map(lambda one: one.compile(), lowered.values())
    return dict(zip(lowered, made, strict=True))


def interleave(
  calls: Calls, seconds: float, rounds: int = 5, wait: Any = None
) -> dict[str, float]:
  """Median seconds of a call of each; on a CPU they run, untimed."""
  wait = wait or jax.block_until_ready
  if jax.default_backend() == 'cpu':
    for call in calls.values():
      wait(call())
    return dict.fromkeys(calls, math.nan)
  repeats = {}
  for name, call in calls.items():
    wait(call())
    begin = time.perf_counter()
    wait(call())
    once = time.perf_counter() - begin
    repeats[name] = min(max(math.ceil(BATCH / once), 1), 32)
  times: dict[str, list[float]] = {name: [] for name in calls}
  order = np.random.default_rng(0)
  start = time.perf_counter()
  for turn in range(200):
    if turn >= rounds and time.perf_counter() - start > seconds:
      break
    for name in order.permutation(list(calls)):
      begin = time.perf_counter()
      for _ in range(repeats[name]):
        last = calls[name]()
      wait(last)
      times[name].append((time.perf_counter() - begin) / repeats[name])
  return {name: float(np.median(t)) for name, t in times.items()}


def norm_times(
  case: Case, kernels: list[str], seconds: float
) -> dict[str, dict[str, float]]:
  """Seconds of forward, training forward and backward, by each library.

  Beside each those of a copy of x, read and written.
  """
  arrays = jax.tree.map(jax.device_put, draw(case))
  count = -(-LONG_ENOUGH // arrays.x.nbytes)
  count = 1 if jax.default_backend() == 'cpu' else min(count, MOST_CALLS)
  norms = {n: function(case, n) for n in ('xla', *kernels)}
  if case.has_peers:
    norms['flax'] = speed.of_flax(case.norm)
  programs = {}
  for name, norm in norms.items():
    with running(name):
      made = _programs(norm, arrays, count)
    programs |= {f'{name}: {kind}': program for kind, program in made.items()}
  copy = _programs(lambda x, *_: x + 1, arrays, count)['forward']
  made = compiled({'copy: forward': copy, **programs})
  pulls = {n: made[f'{n}: saved'](*arrays[:3])[1] for n in norms}
  found = {}
  torch = _torch_calls(case, arrays, count)
  for kind in KINDS:
    calls = {'copy': functools.partial(made['copy: forward'], *arrays[:3])}
    for name in norms:
      given = arrays[:3] if kind != 'backward' else (pulls[name], arrays.dy)
      calls[name] = functools.partial(made[f'{name}: {kind}'], *given)
    calls |= {name: made[kind] for name, made in torch.items()}
    times = interleave(calls, seconds, wait=_wait)
    found[kind] = {n: t / count for n, t in times.items()}
  return found


def _programs(norm: Any, arrays: speed.Arrays, count: int) -> dict[str, Any]:
  """Chains of calls, which no fusion crosses; and what a backward needs."""

  def forward(x, scale, bias):
    for _ in range(count):
      x = lax.optimization_barrier(norm(x, scale, bias))
    return x

  def training(x, scale, bias):
    kept = []
    for _ in range(count):
      y, pull = jax.vjp(norm, x, scale, bias)
      kept += [a for a in jax.tree.leaves(pull) if a.size < x.size]
      x = lax.optimization_barrier(y)
    return x, kept

  def backward(pull, dy):
    sums = []
    for _ in range(count):
      dy, *rest = lax.optimization_barrier(pull(dy))
      sums.append(rest)
    return dy, sums

  def saved(x, scale, bias):
    return jax.vjp(norm, x, scale, bias)

  given = arrays[:3]
  pull = jax.eval_shape(saved, *given)[1]
  return {
    'forward': (forward, given),
    'training forward': (training, given),
    'backward': (backward, (pull, arrays.dy)),
    'saved': (saved, given),
  }


def _wait(value: Any) -> None:
  if not type(value).__module__.startswith('torch'):
    jax.block_until_ready(value)
    return
  import torch

  if torch.cuda.is_available():
    torch.cuda.synchronize()


def _torch_calls(
  case: Case, arrays: speed.Arrays, count: int
) -> dict[str, Calls]:
  """Of torch, eager and compiled, where it is installed and sees the device."""
  if importlib.util.find_spec('torch') is None:
    return {}
  import torch

  on_cpu = jax.default_backend() == 'cpu'
  if not case.has_peers:
    return {}
  if not on_cpu:
    if not torch.cuda.is_available():
      return {}
    torch.compiler.reset()  # or it compiles for any shape, and then no more
  device = 'cpu' if on_cpu else 'cuda'
  dtype = getattr(torch, case.dtype)
  x, scale, bias, dy = (
    torch.from_numpy(np.array(a, np.float32)).to(device, dtype) for a in arrays
  )
  given = [a.detach().requires_grad_() for a in (x, scale, bias)]

  def calls(norm: Any) -> Calls:
    y = norm(*given)

    def forward():
      with torch.no_grad():
        for _ in range(count):
          last = norm(x, scale, bias)
      return last

    def training():
      for _ in range(count):
        last = norm(*given)
      return last

    def backward():
      options = {'retain_graph': True, 'allow_unused': True}
      for _ in range(count):
        last = torch.autograd.grad(y, given, dy, **options)
      return last[0]

    return dict(zip(KINDS, (forward, training, backward), strict=True))

  kinds = {'torch': False} | ({} if on_cpu else {'torch compiled': True})
  return {
    n: calls(speed.of_torch(case.norm, is_compiled))
    for n, is_compiled in kinds.items()
  }


def block_times(
  case: Case, kind: str, kernels: list[str], seconds: float
) -> dict[str, float]:
  """Seconds of a block in training, by XLA and by each kernel."""
  programs: dict[str, Any] = {}
  for name in 'xla', *kernels:
    given = kind, case.norm, name, case.dtype, case.shape
    run, shapes = blocks.block(*given, has_bias=True)

    def step(*given, run=run):
      y, pull = jax.vjp(run, *given[:-1])
      return y, pull(given[-1])

    programs[name] = step, (*shapes, shapes[0])
  return _time_programs(programs, seconds)


def step_times(
  make: Callable[[str], Any], kernels: list[str], seconds: float
) -> dict[str, float]:
  """Seconds of a model's training step, by Flax, XLA and each kernel."""
  programs = {}
  for name in 'flax', 'xla', *kernels:
    step, shapes = make('flax' if name == 'flax' else 'normkit')

    def traced(*given, step=step, name=name):
      with nk.implementation('xla' if name == 'flax' else name):
        return step(*given)

    programs[name] = traced, shapes
  return _time_programs(programs, seconds)


def _time_programs(programs: Any, seconds: float) -> dict[str, float]:
  made = compiled(programs)
  (shapes,) = {str(s): s for _, s in programs.values()}.values()
  given = jax.jit(functools.partial(_drawn, shapes))()
  calls = {n: functools.partial(run, *given) for n, run in made.items()}
  return interleave(calls, seconds)


def _drawn(shapes: Any) -> Any:
  """Small numbers, so that nothing overflows however deep the model is.

  Drawn once for all arrays: many draws take longer to compile than a model.
  """
  sizes = [s.size for s in jax.tree.leaves(shapes)]
  numbers = 0.02 * jax.random.normal(jax.random.key(0), max(sizes))

  def take(s: Any) -> Any:
    if jnp.issubdtype(s.dtype, jnp.integer):
      return jnp.zeros(s.shape, s.dtype)
    return numbers[: s.size].reshape(s.shape).astype(s.dtype)

  return jax.tree.map(take, shapes)


def models_of(is_dry: bool) -> dict[str, Callable[[str], Any]]:
  """Whole steps; ResNet-50 with group norm."""
  if is_dry:
    small = {'tokens': 4, 'width': 64, 'layers': 1}
    return {
      'transformer': lambda of: models.transformer_step(of, 'RMSNorm', **small),
      'UNet': lambda of: models.unet_step(of, 1, 2, (32,)),
      'ResNet-50': lambda of: models.resnet_step(
        of, 'GroupNorm', 1, 32, stages=(1,)
      ),
    }
  return {
    'transformer': lambda of: models.transformer_step(of, 'RMSNorm'),
    'UNet': lambda of: models.unet_step(of, 8, 64, (128, 256, 512)),
    'ResNet-50': lambda of: models.resnet_step(of, 'GroupNorm', 64),
  }


def versions() -> dict[str, str]:
  """Of what a time depends on."""
  found = {m.__name__: m.__version__ for m in (jax, jaxlib)}
  found['normkit'] = nk.__version__
  return found | {'device': jax.devices()[0].client.platform_version}


def entry(
  case: Case, name: str, error: float, times: dict[str, dict[str, float]]
) -> record.Entry:
  """What is recorded of a case: times of its blocks in milliseconds."""
  return record.Entry(
    chip=jax.devices()[0].device_kind,
    versions=versions(),
    date=time.strftime('%Y-%m-%d', time.gmtime()),
    kernel=name,
    center=case.center,
    dtype=case.dtype,
    shape=case.shape,
    groups=case.groups,
    error=error,
    milliseconds={
      kind: (1e3 * found['xla'], 1e3 * found[name])
      for kind, found in times.items()
    },
  )
