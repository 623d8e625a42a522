"""Norms by Mosaic GPU: interpreted on the CPU, compiled for H200 and B200.

Interpreted, shared memory, barriers and copies run as on the device, and the
numbers are held to float64; compiled, programs are held to the bytes that they
may move, NVIDIA's assembler says what registers they take, and its input how
they load and store.
"""

import dataclasses
import functools
import importlib
import itertools
import os
import re
import tempfile
from typing import NamedTuple

from cases import CASES, draw
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_conformance import (
  assert_close,
  assert_gradients,
  expected,
  inputs,
  train_and_eval,
)
from test_kernels import DTYPES, Rows, assert_norm, assert_right, norm_of
from tiers import thinned

from benchmarks import targets, traffic
import normkit as nk
from normkit.kernels import cases, configs, dispatch, mosaic_gpu
from normkit.kernels.rows import Spec

NAME = 'mosaic_gpu'


@pytest.fixture
def interpreted(monkeypatch):
  """Its kernels run interpreted on the CPU."""
  jax.clear_caches()
  monkeypatch.setattr(dispatch, 'interpreted', NAME)
  yield
  jax.clear_caches()


@pytest.mark.parametrize(
  ('shape', 'center', 'dtype'),
  [
    ((5, 100), True, 'float32'),
    ((3, 2, 1300), False, 'bfloat16'),
    *thinned(
      [(1,), (40, 1), (1, 7), (37, 768), (3, 1024), (2, 9000)],
      [True, False],
      DTYPES,
      every=1000,
    )[1:],
  ],
  ids=str,
)
def test_values_and_gradients(interpreted, shape, center, dtype):
  """Rows of a part of a warp, of a warp, of one warpgroup and of several."""
  del interpreted
  reference = functools.partial(Rows, center=center)
  assert_norm(norm_of(center, NAME), reference, shape, dtype)


def test_statistics_and_sums(interpreted):
  """A residual, and two warpgroups on a row; far from zero too."""
  del interpreted
  x = 1e4 + draw((2, 5000))
  spec = Spec(1e-6, True, jnp.dtype(jnp.float32))
  residual = draw(x.shape, seed=1)
  given = {'x': x, 'residual': residual}
  found = mosaic_gpu.forward(given, spec, with_statistics=True, interpret=True)
  exact = np.asarray(x, np.float64) + np.asarray(residual, np.float64)
  mean = found['pivot'].astype(np.float64) + found['offset']
  assert_right(found['total'], exact, 1e-7)
  assert_right(mean, exact.mean(-1, keepdims=True), 1e-7)
  assert_right(found['var'], exact.var(-1, keepdims=True), 1e-5)


def test_gradients_of_sums(interpreted):
  """Of the norm and of the sum before it."""
  del interpreted
  x, residual, dy, dtotal = (draw((5, 40), seed=i) for i in range(4))
  scale = draw(40, seed=4)
  add = functools.partial(nk.add_rms_norm, implementation=NAME)
  pull = jax.vjp(add, x, residual, scale)[1]
  dx, dscale, _ = Rows(x + residual, scale, 0.0, False).gradients(dy)
  desired = dx + dtotal, dx + dtotal, dscale
  for actual, value in zip(pull((dy, dtotal)), desired, strict=True):
    assert_right(actual, value, 1e-5)


@pytest.mark.second_tier
@pytest.mark.parametrize('name', ['layer_norm', 'rms_norm'])
@pytest.mark.parametrize('dtype', DTYPES)
def test_conformance(interpreted, name, dtype):
  """The suite of all norms, values and gradients."""
  del interpreted
  (case,) = (c for c in CASES if c.name == name)
  transform = dataclasses.replace(case.transform, implementation=NAME)
  case = case._replace(transform=transform)
  args = inputs(case, jnp.dtype(dtype))
  outputs, _ = jax.jit(train_and_eval(case))(*args)
  chex.assert_type(outputs, jnp.dtype(dtype))
  assert_close(outputs, expected(case, *args)[0], DTYPES[dtype])
  if dtype == 'float32':
    assert_gradients(case, args)


@pytest.mark.second_tier
@pytest.mark.parametrize('named', [True, False])
def test_transformed(interpreted, named):
  """vmap of x and of the parameters, and a preference instead of a name."""
  del interpreted
  x, scale, dy = draw((3, 4, 40)), draw((3, 40), seed=1), draw((3, 4, 40))
  norm = functools.partial(nk.rms_norm, implementation=NAME if named else None)

  def gradients(x, scale, dy):
    return jax.vjp(norm, x, scale)[1](dy)

  with nk.implementation(NAME):
    found = jax.jit(jax.vmap(gradients))(x, scale, dy)
  each = [
    Rows(*a, 0.0, False).gradients(d)
    for *a, d in zip(x, scale, dy, strict=True)
  ]
  for index, actual in enumerate(found):
    assert_right(actual, np.stack([e[index] for e in each]), 1e-5)


SHAPES = [(3, 5120), (40, 100)]
BROKEN = {
  'a ring': ('with_barrier', lambda *_: None),
  'a meeting': ('meet', lambda _: None),
}


def run_all(shape):
  """Both kernels, all that they may do."""
  x, scale = draw(shape), draw(shape[-1], seed=1)
  spec = Spec(1e-6, True, x.dtype)
  given = {'x': x, 'scale': scale, 'bias': scale, 'residual': x}
  found = mosaic_gpu.forward(given, spec, with_statistics=True, interpret=True)
  given = {'x': x, 'scale': scale, 'dy': x, 'dtotal': x}
  wanted = 'dx', 'dscale', 'dbias'
  found |= mosaic_gpu.backward(given, spec, wanted, interpret=True)
  jax.block_until_ready(found)


@pytest.fixture
def races(monkeypatch):
  """The interpreter looks for races; whether it has found one."""
  callbacks = importlib.import_module(
    'jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks'
  )
  options = {'detect_races': True}
  made = mosaic_gpu.interpreter(**options)
  monkeypatch.setattr(mosaic_gpu, 'interpreter', lambda: made)
  jax.clear_caches()
  yield lambda: callbacks.get_races().races_found
  jax.clear_caches()


@pytest.mark.second_tier
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_no_races(races, shape):
  run_all(shape)
  assert not races()


# Compiled for devices that are not here.


class Report(NamedTuple):
  """What is known of a compiled kernel.

  Attributes:
    moved: bytes that the program moves, in passes over x.
    spilled: bytes of registers that go to memory.
    registers: of a thread.
    code: what the assembler got.
  """

  moved: float
  spilled: int
  registers: int
  code: str


def said_by(run):
  """What a call prints, by whatever language."""
  with tempfile.TemporaryFile() as file:
    saved = [os.dup(number) for number in (1, 2)]
    for number in 1, 2:
      os.dup2(file.fileno(), number)
    try:
      result = run()
    finally:
      for number, old in zip((1, 2), saved, strict=True):
        os.dup2(old, number)
        os.close(old)
    file.seek(0)
    return result, file.read().decode(errors='replace')


@functools.cache
def report(target, kind, size, dtype, center=True, extra=()):
  """Of 2^27 elements or so, an H200's programs over and over."""
  rows = 2**27 // max(size, 1024)
  x = jax.ShapeDtypeStruct((rows, size), dtype)
  parameter = jax.ShapeDtypeStruct((size,), jnp.float32)
  spec = Spec(1e-6, center, jnp.dtype(dtype))
  names = ['scale', 'bias'] if center and kind != 'backward' else ['scale']
  given = dict.fromkeys(('x', *extra), x) | dict.fromkeys(names, parameter)
  if kind == 'backward':
    given['dy'] = x
    wanted = ('dx', 'dscale', 'dbias')[: 2 + center]
    run = functools.partial(mosaic_gpu.backward, spec=spec, wanted=wanted)
  else:
    options = {'with_statistics': kind == 'training forward'}
    run = functools.partial(mosaic_gpu.forward, spec=spec, **options)
  # A folder of its own, or a program of JAX's cache would say nothing.
  with tempfile.TemporaryDirectory() as folder:
    options = {'xla_dump_to': folder}
    compiled, said = said_by(
      lambda: targets.compile_for(target, run, given, options=options)
    )
  (found,) = re.findall(
    r'(\d+) bytes spill stores, (\d+) bytes spill loads.*\n.*Used (\d+) reg',
    said,
  )
  stores, loads, registers = map(int, found)
  moved = traffic.measure(compiled.as_text()).bytes
  passes = moved / (x.size * x.dtype.itemsize)
  return Report(passes, stores + loads, registers, said)


KINDS = 'forward', 'training forward', 'backward'
TABLE = [64, 100, 768, 1000, 4096, 5120, 8192, 12_288, 16_384, 65_536]
# Each row's statistics are 12 bytes, and each program's sums two rows.
LIMITS = {'forward': 2.01, 'training forward': 2.1, 'backward': 3.13}


def is_taken(kind, size, dtype):
  if kind == 'backward':
    return cases.has_backward(NAME, (2, size), jnp.dtype(dtype))
  return cases.refusal(NAME, (2, size), jnp.dtype(dtype)) is None


CHOSEN = [
  pytest.param(*row, marks=marks)
  for row in itertools.product(KINDS, TABLE, DTYPES)
  for marks in (
    ()
    if row in [('backward', 768, 'float32'), ('forward', 1000, 'bfloat16')]
    else (pytest.mark.second_tier,),
  )
  if is_taken(*row)
]


@pytest.fixture
def told(monkeypatch):
  """The assembler's report and its input are printed."""
  for name in 'PTXAS', 'PTX':
    monkeypatch.setenv(f'MOSAIC_GPU_DUMP_{name}', '1')


COMPILERS = [
  pytest.param(
    target,
    marks=pytest.mark.skipif(
      not targets.is_installed(target),
      reason=f'no compiler for {target}: pip install -e ".[targets]"',
    ),
  )
  for target in ('h200', 'b200')
]


def case_of(kind, size, dtype, center=True):
  """The case of `configs` that `report` compiles."""
  dtype, wide = jnp.dtype(dtype), jnp.dtype(jnp.float32)
  if kind == 'backward':
    sums = 2 if center else 1
    return configs.Case(size, (dtype,) * 2, (dtype,), (wide,), sums)
  return configs.Case(size, (dtype,), (dtype,), (wide,) * (1 + center))


def resident(config, registers):
  """Programs on a multiprocessor: what is asked for, if registers allow it."""
  threads = config.warpgroups * configs.THREADS
  fit = 65_536 // (-(-registers // 8) * 8 * threads)
  return min(config.resident, fit)


@pytest.mark.usefixtures('told')
@pytest.mark.optimized
@pytest.mark.parametrize('target', COMPILERS)
@pytest.mark.parametrize(('kind', 'size', 'dtype'), CHOSEN)
def test_compiled(target, kind, size, dtype):
  """Bytes, registers, loads and stores, and what is under way."""
  found = report(target, kind, size, dtype)
  itemsize = jnp.dtype(dtype).itemsize
  is_padded = size * itemsize % 16 != 0
  assert found.spilled == 0
  if not is_padded:
    assert found.moved <= LIMITS[kind]
  assert_wide(found.code)
  case = case_of(kind, size, dtype)
  config = configs.config(case)
  under_way = configs.under_way(case, config, resident(config, found.registers))
  assert under_way >= configs.CHIPS[9].under_way


def assert_wide(code):
  """What is as large as x comes and goes by asynchronous copies alone."""
  assert 'cp.async.bulk.tensor' in code
  body = code[code.index('.entry') :]
  narrow = re.findall(r'\bld\.global(?!\.v4|\.nc\.v4)\S*', body)
  assert not narrow, set(narrow)
