"""Kernels: interpreted on the CPU, and compiled for others.

Interpreted, they run on the CPU and are held to float64; compiled for H200,
A100 and TPU, their programs are held to the bytes that they may move.
"""

import dataclasses
import functools
import importlib
import subprocess

from cases import CASES, draw, draw_mask, precision
import chex
import jax
from jax import export, lax
from jax.extend.core import jaxpr_as_fun
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest
from test_bytes import DEVICES, on, on_both
from test_conformance import (
  assert_close,
  assert_gradients,
  expected,
  inputs,
  train_and_eval,
)
from tiers import second_tier, thinned

from benchmarks import targets, traffic
from benchmarks.bytes import measure
from benchmarks.kernels import CASES as BLOCKS, NAMES, block, moved
import normkit as nk
from normkit import testing
from normkit.kernels import cases, dispatch, mosaic_tpu, record

KERNEL_CASES = [
  pytest.param(case, id=case.name)
  for case in CASES
  if case.name
  in (
    'layer_norm',
    'rms_norm',
    'group_norm',
    'instance_norm',
    'instance_norm_no_batch',
  )
]
DTYPES = {'float32': 1e-5, 'bfloat16': 2e-2, 'float16': 4e-3}


# Mosaic GPU has its own tests: interpreted, it takes seconds a program.
PLATFORMS = 'triton', 'mosaic_tpu'


@pytest.fixture(params=PLATFORMS, scope='module')
def platform(request):
  """Of the module's scope, so that the tests of each come together."""
  return request.param


@pytest.fixture
def name(platform, monkeypatch):
  """An implementation, whose kernels run interpreted on the CPU.

  As if a device had shown that Triton's win, or none would be chosen.
  """
  monkeypatch.setattr(dispatch, 'interpreted', platform)
  record_wins_of_triton(monkeypatch)
  return platform


CHIP = 'NVIDIA H200'


def record_wins_of_triton(monkeypatch):
  """In every case, on one chip."""
  monkeypatch.setattr(record, 'entries', lambda: ('some',))
  monkeypatch.setattr(record, 'kernels', lambda *_: {'triton': (CHIP,)})


@pytest.fixture
def recorded(monkeypatch):
  """As if a device had shown that Triton's kernels win."""
  jax.clear_caches()
  record_wins_of_triton(monkeypatch)
  monkeypatch.setattr(dispatch, 'chip', lambda: CHIP)
  yield
  jax.clear_caches()


TRACED_FOR = [None]


@pytest.fixture(autouse=True)
def programs_of_one_platform(request):
  """What was traced for another platform, or to run none, is dropped."""
  if 'name' in request.fixturenames:
    request.getfixturevalue('name')
  if dispatch.interpreted != TRACED_FOR[0]:
    jax.clear_caches()
  TRACED_FOR[0] = dispatch.interpreted


@dataclasses.dataclass
class Rows:
  """Layer, RMS or group norm in float64, and the gradients of sum(y * dy)."""

  x: np.ndarray
  scale: np.ndarray | float
  bias: np.ndarray | float
  center: bool
  groups: int | None = None
  epsilon: float = 1e-6

  def __post_init__(self):
    x = np.asarray(self.x, np.float64)
    mean = self.mean(x) if self.center else 0
    self.root = 1 / np.sqrt(self.mean((x - mean) ** 2) + self.epsilon)
    self.normalized = (x - mean) * self.root
    self.y = self.normalized * np.asarray(self.scale, np.float64) + np.asarray(
      self.bias, np.float64
    )

  def mean(self, values):
    if self.groups is None:
      return values.mean(-1, keepdims=True)
    split = values.reshape(len(values), -1, self.groups, self.size)
    mean = np.broadcast_to(split.mean((1, 3), keepdims=True), split.shape)
    return mean.reshape(values.shape)

  @property
  def size(self):
    return self.x.shape[-1] // self.groups

  def gradients(self, dy):
    g = np.asarray(dy, np.float64)
    h, n = g * np.asarray(self.scale, np.float64), self.normalized
    rest = n * self.mean(h * n)
    if self.center:
      rest = rest + self.mean(h)
    rows = tuple(range(g.ndim - 1))
    return (h - rest) * self.root, (g * n).sum(rows), g.sum(rows)


def norm_of(center, implementation, **options):
  """`(x, scale, bias) -> y`; RMS norm leaves the bias out."""
  options |= {'implementation': implementation}
  if center:
    return functools.partial(nk.layer_norm, **options)
  return lambda x, scale, bias: nk.rms_norm(x, scale, **options)


def group_norm_of(groups, implementation, **options):
  """`(x, scale, bias) -> y`; as many groups as channels are instance norm."""

  options |= {'implementation': implementation}

  def norm(x, scale, bias):
    if groups == x.shape[-1]:
      return nk.instance_norm(x, scale, bias, **options)
    return nk.group_norm(x, scale, bias, num_groups=groups, **options)

  return norm


def assert_right(actual, desired, tolerance):
  desired = np.asarray(desired)
  size = max(np.abs(desired).max(), 1)
  np.testing.assert_allclose(
    np.asarray(actual, np.float64) / size, desired / size, atol=tolerance
  )


SHAPES_OF_ROWS = (
  (1,),
  (5, 1),
  (1, 7),
  (3, 2, 100),
  (300, 128),
  (37, 768),
  (2, 9000),
)
# TPUs have no float16: test_refused_where_it_cannot_run holds the error.
# Of as many dtypes one in so many of the combinations is there.
OF_PLATFORMS = ('triton', [*DTYPES]), ('mosaic_tpu', ['float32', 'bfloat16'])


@pytest.mark.parametrize(
  ('platform', 'shape', 'center', 'dtype'),
  [
    row
    for one, dtypes in OF_PLATFORMS
    for row in thinned(
      *([one], SHAPES_OF_ROWS, [True, False], dtypes),
      every=12,
      keep=len(dtypes),
    )
  ],
  indirect=['platform'],
  ids=str,
)
def test_values_and_gradients(name, shape, center, dtype):
  assert_norm(
    norm_of(center, name), functools.partial(Rows, center=center), shape, dtype
  )


SHAPES_OF_GROUPS = (
  ((2, 6), 3),
  ((1, 5, 7, 40), 4),
  ((3, 5, 7, 64), 16),
  ((2, 23, 100), 10),
  ((2, 4, 4, 3), 3),
  ((2, 20, 20, 72), 72),
  ((2, 5, 300), 1),
)


def rows_of_groups():
  """On GPUs float32, which has other widths, and one of 16 bits, in turns."""
  for platform, *turns in (
    ('triton', ('float32', 'bfloat16'), ('float32', 'float16')),
    ('mosaic_tpu', ('float32',), ('bfloat16',)),
  ):
    for place, case in enumerate(SHAPES_OF_GROUPS):
      for dtype in turns[place % 2]:
        is_first = (place, dtype) == (0, 'float32')
        row = pytest.param if is_first else second_tier
        yield row(platform, case, dtype)


@pytest.mark.parametrize(
  ('platform', 'case', 'dtype'),
  [*rows_of_groups()],
  indirect=['platform'],
  ids=str,
)
def test_groups(name, case, dtype):
  shape, groups = case
  reference = functools.partial(Rows, center=True, groups=groups)
  assert_norm(group_norm_of(groups, name), reference, shape, dtype)


def assert_norm(norm, of, shape, dtype):
  x, dy = draw(shape, dtype), draw(shape, dtype, seed=1)
  scale, bias = draw(shape[-1:], seed=2), draw(shape[-1:], seed=3)
  reference = of(x, scale, bias)
  if not reference.center:
    reference = of(x, scale, 0.0)

  @jax.jit
  def run(x, scale, bias, dy):
    return norm(x, scale, bias), jax.vjp(norm, x, scale, bias)[1](dy)

  y, found = run(x, scale, bias, dy)
  assert_right(y, reference.y, DTYPES[dtype])
  found = found[: 2 + reference.center]
  for actual, value in zip(found, reference.gradients(dy), strict=False):
    assert_right(actual, value, DTYPES[dtype])


@functools.partial(jax.jit, static_argnums=0)
def pulled(function, given, change):
  """Values and gradients, by one program."""
  values, pull = jax.vjp(function, *given)
  return values, pull(change)


@pytest.mark.parametrize(
  ('places', 'held'), [(1568, 8), (2304, 8), (2305, 4), (4609, None)]
)
def test_groups_of_many_places_are_narrower(places, held):
  """A Triton program then holds less than the 32 channels of a line."""
  shape = 2, places, 72
  assert cases.group_width(shape, jnp.float32, 72) == held
  why = cases.refusal('triton', shape, jnp.float32, 72)
  assert (why is None) == (held is not None)


@pytest.mark.parametrize(
  'shape', [(9, 50_000), second_tier((5, 3, 33_000))], ids=str
)
def test_last_block_and_last_piece(name, shape):
  """A row or two beyond a TPU's block, or pieces beyond what a GPU holds."""
  x, residual, dy = (draw(shape, seed=i) for i in range(3))
  scale, bias = draw(shape[-1], seed=3), draw(shape[-1], seed=4)
  add = functools.partial(nk.add_layer_norm, implementation=name)
  given = x, residual, scale, bias
  (y, total), found = pulled(add, given, (dy, jnp.zeros_like(dy)))
  reference = Rows(x + residual, scale, bias, True)
  assert_right(total, x + residual, 1e-7)
  assert_right(y, reference.y, 1e-5)
  dx, dscale, dbias = reference.gradients(dy)
  for actual, value in zip(found, (dx, dx, dscale, dbias), strict=True):
    assert_right(actual, value, 1e-5)


@pytest.mark.parametrize('case', KERNEL_CASES)
class TestConformance:
  """The suite of all norms, by kernels."""

  def by_kernel(self, case, name):
    transform = dataclasses.replace(case.transform, implementation=name)
    return case._replace(transform=transform)

  @pytest.mark.second_tier
  @pytest.mark.parametrize('platform', ['triton'], indirect=True)
  def test_check_norm(self, case, name):
    """Masks go to XLA, all else in training to what is chosen, on GPUs."""
    testing.check_norm(case.transform, draw(case.shape), case.reference)

  @pytest.mark.parametrize(
    'dtype', ['float32', second_tier('bfloat16'), second_tier('float16')]
  )
  def test_values(self, case, name, dtype):
    if (name, dtype) == ('mosaic_tpu', 'float16'):
      pytest.skip('TPUs have no float16: test_refused holds the error')
    case = self.by_kernel(case, name)
    args = inputs(case, jnp.dtype(dtype))
    outputs, _ = jax.jit(train_and_eval(case))(*args)
    chex.assert_type(outputs, jnp.dtype(dtype))
    assert_close(outputs, expected(case, *args)[0], DTYPES[dtype])

  @pytest.mark.second_tier
  def test_gradients(self, case, name):
    case = self.by_kernel(case, name)
    assert_gradients(case, inputs(case))


def called(name, monkeypatch):
  """The kernels of an implementation that are called from here on."""
  module = importlib.import_module(f'normkit.kernels.{name}')
  jax.clear_caches()
  calls = []

  def spy(kind, run, *args, **options):
    calls.append(kind)
    return run(*args, **options)

  for kind in 'forward', 'backward':
    run = functools.partial(spy, kind, getattr(module, kind))
    monkeypatch.setattr(module, kind, run)
  return calls


def test_chosen_in_training(name, monkeypatch):
  """Without a name: XLA's form, and kernels where a derivative is taken."""
  calls = called(name, monkeypatch)
  x, scale = draw((4, 8)), jnp.ones(8)
  jax.jit(nk.rms_norm)(x, scale)
  assert not calls
  pull = jax.jit(jax.grad(lambda x, s: nk.rms_norm(x, s).sum(), (0, 1)))
  dx, dscale = pull(x, scale)
  assert set(calls) == ({'forward', 'backward'} if name == 'triton' else set())
  desired = Rows(x, scale, 0.0, False).gradients(np.ones(x.shape))
  assert_right(dx, desired[0], 1e-5)
  assert_right(dscale, desired[1], 1e-5)


def test_nothing_is_chosen_without_a_record(name, monkeypatch):
  """No kernel that no device has shown to win, in training neither."""
  monkeypatch.undo()
  assert record.entries() == ()
  monkeypatch.setattr(dispatch, 'interpreted', name)
  calls = called(name, monkeypatch)
  x, image = draw((4, 8)), draw((2, 7, 7, 12), 'bfloat16')
  for norm, given in (nk.rms_norm, x), (group_norm_of(4, None), image):
    parameters = [jnp.ones(12)] * 2 if given is image else []
    jax.jit(jax.grad(lambda x: norm(x, *parameters).sum()))(given)  # noqa: B023
  jax.jit(jax.grad(lambda x: nk.add_rms_norm(x, x)[0].sum()))(x)
  assert not calls


def test_preferred(name, monkeypatch):
  """For whatever names nothing itself; the rest is XLA's."""
  monkeypatch.setattr(record, 'entries', lambda: ())
  calls = called(name, monkeypatch)
  x, where = draw((4, 8)), draw_mask((4, 8))
  with nk.implementation(name):
    y = jax.jit(lambda x: nk.layer_norm(x))(x)
    assert calls == ['forward']
    calls.clear()
    dx = jax.jit(jax.grad(lambda x: (nk.layer_norm(x) * x).sum()))(x)
    assert set(calls) == {'forward', 'backward'}
    calls.clear()
    jax.jit(lambda x: nk.layer_norm(x, implementation='xla'))(x)
    jax.jit(lambda x: nk.layer_norm(x, where=where))(x)
    nk.batch_norm(x, nk.BatchNorm().init(x)[1], train=True)
    assert not calls
    with nk.implementation('xla'):
      jax.jit(lambda x: nk.layer_norm(x))(x)
    assert not calls
  exact = Rows(x, 1.0, 0.0, True)
  assert_right(y, exact.y, 1e-5)
  assert_right(dx, exact.y + exact.gradients(x)[0], 1e-5)
  jax.jit(lambda x: nk.layer_norm(x))(x)
  assert not calls  # outside again


def test_preferred_where_it_runs(name, monkeypatch):
  """`jit` traces anew what it has traced outside, and once."""
  monkeypatch.setattr(record, 'entries', lambda: ())
  calls = called(name, monkeypatch)
  x = draw((4, 8))
  step = jax.jit(jax.value_and_grad(lambda x: nk.rms_norm(x).sum()))
  for _ in range(2):
    step(x)
    assert not calls
  found = []
  for _ in range(2):
    with nk.implementation(name):
      step(x)
      found.append(sorted(set(calls)))
      calls.clear()
  assert found == [['backward', 'forward'], []]
  step(x)
  assert not calls


def test_a_derivative_is_of_its_forward(name, monkeypatch):
  """Of a program that was traced elsewhere, too."""
  monkeypatch.setattr(record, 'entries', lambda: ())
  calls, x = called(name, monkeypatch), draw((4, 8))

  def program():
    return jaxpr_as_fun(jax.make_jaxpr(lambda x: nk.rms_norm(x))(x))

  def backward(norm):
    calls.clear()
    jax.jit(jax.grad(lambda x: norm(x)[0].sum()))(x)
    return 'backward' in calls

  outside = program()
  with nk.implementation(name):
    inside = program()
    assert not backward(outside)
  assert backward(inside)


def test_preferred_by_the_environment(name, monkeypatch):
  calls = called(name, monkeypatch)
  x = draw((4, 8))
  monkeypatch.setenv('NORMKIT_IMPLEMENTATION', name)
  jax.jit(lambda x: nk.rms_norm(x))(x)
  assert calls == ['forward']
  with nk.implementation('xla'):
    jax.jit(lambda x: nk.rms_norm(x))(x)
  assert calls == ['forward']
  monkeypatch.setenv('NORMKIT_IMPLEMENTATION', 'cudnn')
  with pytest.raises(
    ValueError, match=r"NORMKIT_IMPLEMENTATION must be.*'cudnn'"
  ):
    nk.rms_norm(x)
  with (
    pytest.raises(ValueError, match=r"implementation must be.*'cudnn'"),
    nk.implementation('cudnn'),
  ):
    pass
  with pytest.raises(ValueError, match='name: None'), nk.implementation(None):
    pass


def test_groups_chosen_in_training(name):
  """In half precision, on GPUs, and right by what XLA kept for them too."""
  x, dy = (draw((2, 7, 7, 12), 'bfloat16', seed=i) for i in range(2))
  scale, bias = draw(12, seed=2), draw(12, seed=3)

  def gradients(norm, x, dy):
    return jax.vjp(norm, x, scale, bias)[1](dy)

  norm = group_norm_of(4, None)
  text = str(jax.make_jaxpr(functools.partial(gradients, norm))(x, dy))
  assert 'normkit_choice' in text
  desired = Rows(x, scale, bias, True, 4).gradients(dy)
  found = jax.jit(functools.partial(gradients, norm))(x, dy)
  for actual, value in zip(found, desired, strict=True):
    assert_right(actual, value, DTYPES['bfloat16'])


SIZES_CHOSEN = {
  (2, 7, 7, 12): True,
  (2, 6, 8, 12): False,
  (2, 64, 64, 4): True,
  (2, 64, 65, 4): False,
  (128, 7, 7, 12): True,
  (129, 7, 7, 12): False,
  (64, 28, 28, 512): True,
  (65, 28, 28, 512): False,
}


@pytest.mark.parametrize(
  ('shape', 'takes'), SIZES_CHOSEN.items(), ids=map(str, SIZES_CHOSEN)
)
@pytest.mark.usefixtures('recorded')
def test_sizes_of_groups_chosen(shape, takes):
  """Where XLA's form does not fuse a ReLU after the norm, by its bytes."""
  norm = functools.partial(nk.group_norm, num_groups=shape[-1] // 4)
  scale = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
  for dtype in jnp.bfloat16, jnp.float16, jnp.float32:
    given = jax.ShapeDtypeStruct(shape, dtype), scale, scale
    assert is_chosen(norm, given) == (takes and dtype != jnp.float32)


@pytest.mark.parametrize('groups', [None, 12, 3])
def test_tangents_by_statistics_of_kernels(name, groups):
  """Forward mode is XLA's, by what a kernel of the forward has found."""
  x, dx = (draw((2, 7, 7, 12), 'bfloat16', seed=i) for i in range(2))
  scale = draw(12, seed=2)
  norm = norm_of(True, None) if groups is None else group_norm_of(groups, None)
  _, dy = jax.jvp(lambda x: norm(x, scale, 0 * scale), (x,), (dx,))
  # The derivative by x is symmetric, but for the scale.
  desired = Rows(x, 1.0, 0.0, True, groups).gradients(dx)[0]
  assert_right(dy, desired * np.asarray(scale), DTYPES['bfloat16'])


def test_derivatives_of_what_is_chosen():
  """Of a linear function by itself, so that its transpose stays its own."""
  transposed = []

  def transpose(factor, values):
    transposed.append(values)
    return factor * values

  x, factor = draw(3), draw(3, seed=1)
  run = functools.partial(dispatch.choose_linear, jnp.multiply, transpose)

  def tangent(moved):
    return jax.jvp(lambda x: run(factor, x), (x,), (moved,))[1].sum()

  chex.assert_trees_all_close(jax.grad(tangent)(x), factor)
  assert transposed
  found = jax.jvp(lambda x: dispatch.choose(jnp.sin, {}, x), (x,), (factor,))
  chex.assert_trees_all_close(found[1], np.cos(x) * factor, rtol=1e-6)


@pytest.mark.parametrize(
  ('places', 'fits'),
  [
    ((128, 64, 64), True),
    ((128, 128, 64), False),
    ((512, 1, 128), True),
    ((1024, 1, 128), False),
  ],
)
def test_tiles_of_a_tpu_are_filled_up(places, fits):
  """To 128 lanes and 16 places: 2^20 elements then, all that may be held."""
  why = cases.refusal('mosaic_tpu', (2, *places), jnp.float32, 8)
  assert (why is None) == fits


def test_what_a_tpu_holds_fits():
  """An example's x, dy and dx in float32, two of each, in what it has."""
  held = 2 * 3 * 4 * cases.MOSAIC_GROUP
  assert held < mosaic_tpu.MEMORY < 128 * 2**20


def test_far_from_zero(name):
  """The mean in two parts: nothing is lost to its size."""
  x = 1e5 + draw((3, 1000))
  y = nk.layer_norm(x, implementation=name)
  assert_right(y, Rows(x, 1.0, 0.0, True).y, 1e-6)
  x = x.reshape(3, 10, 100)
  y = nk.group_norm(x, num_groups=5, implementation=name)
  assert_right(y, Rows(x, 1.0, 0.0, True, 5).y, 1e-6)


@functools.partial(jax.jit, static_argnums=0)
def twice(loss, given, moved):
  """First and second slope in a direction; that slope's gradients, thrice."""

  def slope(*given):
    return jax.jvp(loss, given, moved)[1]

  def gradients(function):
    return jax.grad(function, tuple(range(len(given))))

  by_modes = (
    gradients(slope)(*given),
    jax.jvp(gradients(loss), given, moved)[1],
    jax.vjp(gradients(loss), *given)[1](moved),
  )
  return jax.jvp(slope, given, moved), by_modes


@pytest.mark.second_tier
@pytest.mark.parametrize('kind', ['layer', 'rms', 'groups'])
def test_second_order(name, kind):
  """Each mode of the other, in a direction, by dy too; by epsilon of 0.1."""
  center, groups = kind != 'rms', 2 if kind == 'groups' else None
  if kind == 'groups':
    norm = group_norm_of(groups, name, epsilon=0.1)
  else:
    norm = norm_of(center, name, epsilon=0.1)
  shapes = (2, 3, 6), 6, 6, (2, 3, 6)
  given, moved = (
    tuple(draw(shape, seed=first + i) for i, shape in enumerate(shapes))
    for first in (0, 4)
  )

  def loss(x, scale, bias, dy):
    return (norm(x, scale, bias) * dy).sum()

  def exact(step):
    """The gradients after a step in the direction."""
    x, scale, bias, dy = (
      np.asarray(a, np.float64) + step * np.asarray(d, np.float64)
      for a, d in zip(given, moved, strict=True)
    )
    found = Rows(x, scale, bias * center, center, groups, 0.1)
    dx, dscale, dbias = found.gradients(dy)
    return dx, dscale, dbias * center, found.y

  def along(gradients):
    pairs = zip(gradients, moved, strict=True)
    return sum((g * np.asarray(d)).sum() for g, d in pairs)

  pairs = zip(exact(1e-4), exact(-1e-4), strict=True)
  desired = [(after - before) / 2e-4 for after, before in pairs]
  slopes, by_modes = twice(loss, given, moved)
  assert_right(slopes[0], along(exact(0)), 1e-5)
  assert_right(slopes[1], along(desired), 1e-5)
  for found in by_modes:
    for actual, value in zip(found, desired, strict=True):
      assert_right(actual, value, 1e-5)


def test_activation_and_residual(name):
  x, residual, dy = (draw((5, 40), seed=i) for i in range(3))
  scale, bias, dtotal = draw(40, seed=3), draw(40, seed=4), draw((5, 40))
  add = functools.partial(
    nk.add_layer_norm, activation=jnp.tanh, implementation=name
  )
  (y, total), found = pulled(add, (x, residual, scale, bias), (dy, dtotal))
  reference = Rows(x + residual, scale, bias, True)
  assert_right(total, x + residual, 1e-7)
  assert_right(y, np.tanh(reference.y), 1e-5)
  dx, dscale, dbias = reference.gradients(dy * (1 - np.tanh(reference.y) ** 2))
  desired = dx + dtotal, dx + dtotal, dscale, dbias
  for actual, value in zip(found, desired, strict=True):
    assert_right(actual, value, 1e-5)


@pytest.mark.parametrize('implementation', ['xla', None])
def test_residual_by_xla(implementation):
  x, residual, scale = (draw((5, 40), seed=i) for i in range(3))
  add = functools.partial(nk.add_rms_norm, implementation=implementation)
  (y, total), pull = jax.vjp(add, x, residual, scale)
  reference = [Rows(x[i] + residual[i], scale[i], 0.0, False) for i in range(5)]
  assert_right(y, np.stack([r.y for r in reference]), 1e-5)
  assert_right(total, x + residual, 1e-7)
  dx = pull((x, residual))[0]
  desired = [
    np.asarray(r.gradients(d)[0]) for r, d in zip(reference, x, strict=True)
  ]
  assert_right(dx, np.stack(desired) + residual, 1e-5)


def spread(kind, norm, mesh):
  """Gradients of sum(norm * weight) with rows over the devices of a mesh."""

  def loss(x, scale, bias, weight):
    return (norm(x, scale, bias) * weight).sum()

  gradients = jax.grad(loss, (0, 1, 2))
  if kind == 'auto':
    return jax.jit(gradients)
  if kind == 'checked':
    rows = functools.partial(
      jax.shard_map, mesh=mesh, in_specs=(P('d'), P(), P(), P('d'))
    )
    return jax.jit(rows(gradients, out_specs=(P('d'), P(), P())))

  def local(*args):
    dx, dscale, dbias = gradients(*args)
    return dx, lax.psum(dscale, 'd'), lax.psum(dbias, 'd')

  return jax.pmap(local, 'd', in_axes=(0, None, None, 0), out_axes=0)


@pytest.mark.parametrize(
  ('platform', 'use', 'kind'),
  thinned(
    PLATFORMS,
    [
      (True, 'float32', None),
      (False, 'float32', None),
      (False, 'bfloat16', None),
      (True, 'float32', 4),
      (False, 'bfloat16', 40),
    ],
    ['auto', 'explicit', 'checked', 'pmap'],
    every=4,
    keep=2,
  ),
  indirect=['platform'],
  ids=str,
)
def test_devices(name, use, kind):
  named, dtype, groups = use
  shape = (8, 16, 40) if groups is None else (8, 49, 40)  # chosen from 49 on
  x, weight = draw(shape, dtype), draw(shape, seed=1)
  scale, bias = draw(40, seed=2), draw(40, seed=3)
  axis = AxisType.Explicit if kind == 'explicit' else AxisType.Auto
  mesh = jax.make_mesh((4,), ('d',), axis_types=(axis,))
  norm = norm_of(True, name if named else None)
  if groups is not None:
    norm = group_norm_of(groups, name if named else None)
  desired = Rows(x, scale, bias, True, groups).gradients(weight)
  if kind == 'pmap':
    xs, weights = (
      jax.device_get(a).reshape(4, 2, *a.shape[1:]) for a in (x, weight)
    )
    found = spread(kind, norm, mesh)(xs, scale, bias, weights)
    dx, dscale, dbias = jax.device_get(found)
    found = dx.reshape(x.shape), dscale[0], dbias[0]
  else:
    with jax.set_mesh(mesh):
      place = NamedSharding(mesh, P('d'))
      x, weight = jax.device_put((x, weight), place)
      run = spread('auto' if kind == 'explicit' else kind, norm, mesh)
      found = run(x, scale, bias, weight)
  for actual, value in zip(found, desired, strict=True):
    assert_right(actual, value, DTYPES[dtype])


@pytest.mark.parametrize(
  ('rows', 'scales'), [(P('d'), P('e')), (P('d', 'e'), P())], ids=str
)
def test_sharded_features(name, rows, scales):
  """Of x or of the scale alone: no kernel sees a part of a row."""
  x, dy, scale = draw((8, 40)), draw((8, 40), seed=1), draw(40, seed=2)
  reference = Rows(x, scale, 0.0, False)
  mesh = jax.make_mesh((2, 2), ('d', 'e'), axis_types=(AxisType.Explicit,) * 2)
  with jax.set_mesh(mesh):
    specs = rows, P('d', 'e'), scales
    x, dy, scale = (
      jax.device_put(a, NamedSharding(mesh, spec))
      for a, spec in zip((x, dy, scale), specs, strict=True)
    )
    y, pull = jax.vjp(nk.rms_norm, x, scale)
    found = y, *pull(dy)
    with pytest.raises(NotImplementedError, match='are sharded'):
      nk.rms_norm(x, scale, implementation=name)
  desired = reference.y, *reference.gradients(dy)[:2]
  for actual, value in zip(found, desired, strict=True):
    assert_right(actual, value, 1e-5)


@pytest.mark.parametrize('named', [True, second_tier(False)])
def test_transformed(name, named):
  """vmap of x, of the parameters, of gradients; scan; checkpoint."""
  x, scale, bias = draw((4, 3, 40)), draw((4, 40), seed=1), draw(40, seed=2)
  norm = norm_of(True, name if named else None)

  def loss(x, scale, bias):
    return (norm(x, scale, bias) * jnp.arange(40.0)[None]).sum()

  def looped(x, scale, bias):
    def step(total, row):
      lean = jax.checkpoint(loss, policy=nk.products_saveable)
      return total + lean(*row, bias), None

    return lax.scan(step, 0.0, (x, scale))[0]

  def mapped(x, scale, bias):
    return jax.vmap(loss, (0, 0, None))(x, scale, bias).sum()

  weight = np.broadcast_to(np.arange(40.0), x.shape[1:])
  each = [
    Rows(*row, bias, True).gradients(weight)
    for row in zip(x, scale, strict=True)
  ]
  dx, dscale, dbias = (np.stack(parts) for parts in zip(*each, strict=True))
  for total in looped, mapped:
    found = jax.jit(jax.grad(total, (0, 1, 2)))(x, scale, bias)
    for actual, value in zip(found, (dx, dscale, dbias.sum(0)), strict=True):
      assert_right(actual, value, 1e-5)
  single = jax.vmap(jax.grad(loss, (0, 1, 2)), (0, 0, None))
  for actual, value in zip(
    jax.jit(single)(x, scale, bias), (dx, dscale, dbias), strict=True
  ):
    assert_right(actual, value, 1e-5)


REFUSED = {
  'mask': (dict(where=jnp.ones((2, 4), bool)), 'mask'),
  'axis': (dict(axis=0), 'not the last'),
  'scale': (dict(scale=jnp.ones((2, 4))), 'more than one number a feature'),
  'column': (dict(scale=jnp.ones((2, 1))), 'each element'),
  'length': (dict(x=jnp.ones((1, 65_537))), '65,536'),
  'complex': (dict(x=jnp.ones((2, 4), jnp.complex64)), 'complex64'),
}


@pytest.mark.parametrize(('given', 'match'), REFUSED.values(), ids=REFUSED)
def test_refused(name, given, match):
  """Before anything runs, with the reason."""
  given = {'x': jnp.ones((2, 4)), 'implementation': name} | given
  with pytest.raises(NotImplementedError, match=match):
    jax.make_jaxpr(lambda: nk.layer_norm(**given))()


REFUSED_GROUPS = {
  'mask': (dict(where=jnp.ones((2, 4, 6), bool)), 'mask'),
  'order': (dict(x=jnp.ones((2, 4, 3, 6)), axis=1), 'last one|channels'),
  'batch': (dict(batch_axis=1), 'last one|channels'),
  'scale': (dict(scale=jnp.ones((2, 1, 6))), 'each element'),
  'size': (dict(x=jnp.ones((1, 2**18, 6))), 'fit'),
}


@pytest.mark.parametrize(
  ('given', 'match'), REFUSED_GROUPS.values(), ids=REFUSED_GROUPS
)
def test_refused_groups(name, given, match):
  given = {'x': jnp.ones((2, 4, 6)), 'implementation': name} | given
  for norm in functools.partial(nk.group_norm, num_groups=2), nk.instance_norm:
    with pytest.raises(NotImplementedError, match=match):
      jax.make_jaxpr(lambda norm=norm: norm(**given))()


def test_refused_where_it_cannot_run():
  x = jnp.ones((2, 4))
  with pytest.raises(NotImplementedError, match='lowered for'):
    nk.rms_norm(x, implementation='triton')
  with pytest.raises(NotImplementedError, match='float16'):
    nk.rms_norm(x.astype(jnp.float16), implementation='mosaic_tpu')
  with precision(jnp.float64), pytest.raises(NotImplementedError, match='64'):
    nk.rms_norm(jnp.ones((2, 4), jnp.float64), implementation='triton')


def test_refused_where_some_axes_are_mapped():
  """Of the others XLA would still partition the program."""
  mesh = jax.make_mesh((4, 2), ('d', 'm'), (AxisType.Auto,) * 2)
  norm = functools.partial(nk.rms_norm, implementation='triton')
  run = jax.shard_map(
    norm, mesh=mesh, in_specs=P('d'), out_specs=P('d'), axis_names={'d'}
  )
  made = jax.jit(run).trace(jnp.ones((4, 8)))
  with pytest.raises(NotImplementedError, match='over all axes of the mesh'):
    made.lower(lowering_platforms=('cuda',))


class NoHash:
  """A function that `jax.jit` cannot know again."""

  __hash__ = None

  def __call__(self, z):
    return z


OTHER_ACTIVATIONS = {
  'erfc': lambda x: jax.nn.gelu(x, approximate=False),
  'of a row': jax.nn.softmax,
  'a shape': lambda x: x.reshape(2, 4) + jnp.ones((2, 4), x.dtype),
}


@pytest.mark.parametrize(
  'activation', OTHER_ACTIVATIONS.values(), ids=OTHER_ACTIVATIONS
)
def test_activations_that_no_kernel_has(name, monkeypatch, activation):
  """By name an error, before anything is lowered; preferred, XLA's form."""
  calls, x = called(name, monkeypatch), draw((2, 4))

  def norm(x, implementation=None):
    options = {'activation': activation, 'implementation': implementation}
    return nk.add_layer_norm(x, x, **options)[0]

  with pytest.raises(NotImplementedError, match='activation in primitives'):
    jax.make_jaxpr(lambda x: norm(x, name))(x)
  with nk.implementation(name):
    jax.jit(lambda x: jax.vjp(norm, x)[1](x))(x)
  assert not calls


ADD_ERRORS = {
  'shape': (dict(residual=jnp.ones(4)), ValueError, 'alike'),
  'dtype': (dict(residual=jnp.ones((2, 4), jnp.float16)), ValueError, 'alike'),
  'activation': (dict(activation='gelu'), TypeError, 'function'),
  'hash': (dict(activation=NoHash()), TypeError, 'has no hash.*__hash__'),
}


@pytest.mark.parametrize(
  ('given', 'error', 'match'), ADD_ERRORS.values(), ids=ADD_ERRORS
)
def test_errors_of_sums(given, error, match):
  given = {'x': jnp.ones((2, 4)), 'residual': jnp.ones((2, 4))} | given
  with pytest.raises(error, match=match):
    nk.add_layer_norm(**given)


# Compiled for devices that are not here.

SHAPES = {'wide': (8192, 4096), 'widest': (4096, 8192), 'narrow': (32_768, 768)}
LIMITS = {'forward': 2.01, 'training forward': 2.02, 'backward': 3.3}


def programs(norm, shape, dtype):
  """Forward, forward with what it keeps, and backward, with their inputs."""
  x = jax.ShapeDtypeStruct(shape, dtype)
  parameter = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
  given = x, parameter, parameter

  def pullback(*given):
    return jax.vjp(norm, *given)

  def training_forward(*given):
    y, pull = pullback(*given)
    return y, [leaf for leaf in jax.tree.leaves(pull) if leaf.size < x.size]

  kept = jax.eval_shape(pullback, *given)[1]
  return {
    'forward': (norm, given),
    'training forward': (training_forward, given),
    'backward': (lambda pull, dy: pull(dy), (kept, x)),
  }


SOME = 'bfloat16', 'float32'


def assert_passes(target, norm, shape, dtype, limits, folder):
  """By kind; on H200 registers hold a row, and none goes to memory."""
  n = np.prod(shape) * jnp.dtype(dtype).itemsize
  # With JAX 0.10 alone XLA writes out what Triton makes.
  is_told = target == 'h200' and jax.__version_info__ < (0, 11)
  options = {'xla_dump_to': str(folder)} if is_told else None
  for kind, (function, given) in programs(norm, shape, dtype).items():
    made = targets.compile_for(target, function, *given, options=options)
    moved = traffic.measure(made.as_text()).bytes / n
    assert moved <= limits[kind], kind
  if is_told:
    assert_no_spills(folder)


def assert_no_spills(folder):
  if targets.ptxas() is None:
    pytest.skip('spills need an assembler: pip install -e ".[targets]"')
  written = [path.read_text() for path in folder.glob('*.ptx')]
  kernels = [text for text in written if '.entry normkit' in text]
  assert len(kernels) == 3
  command = targets.ptxas(), '-v', '-arch=sm_90a', '-o', folder / 'out', '-'
  for text in kernels:
    said = subprocess.run(
      command, input=text, capture_output=True, text=True, check=True
    ).stderr
    assert ' 0 bytes spill stores, 0 bytes spill loads' in said


@pytest.mark.parametrize(
  ('target', 'shape', 'center', 'dtype'),
  on_both(SHAPES.values(), [True, False], SOME),
  ids=str,
)
@pytest.mark.optimized
def test_passes(tmp_path, target, shape, center, dtype):
  norm = norm_of(center, NAMES[target])
  assert_passes(target, norm, shape, dtype, LIMITS, tmp_path)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.optimized
@pytest.mark.parametrize('target', DEVICES)
def test_passes_of_long_rows(target, dtype):
  norm = norm_of(True, NAMES[target])
  shape = 2048, 65_536
  n = np.prod(shape) * jnp.dtype(dtype).itemsize
  # The kernel on H200 loads a quarter of a row again: 2.25 n, not counted here.
  limits = (2.01, 5.2) if target == 'h200' else (2.01, 3.02)
  made = programs(norm, shape, dtype)
  for kind, limit in zip(('forward', 'backward'), limits, strict=True):
    assert measure(target, *made[kind]).bytes / n <= limit, kind


OF_GROUPS = {'backward': 3.1}
IMAGES = {
  'groups': ((24, 48, 48, 128), 16),
  'channels': ((64, 32, 32, 512), 512),
}


@pytest.mark.parametrize(
  ('target', 'image', 'dtype'),
  [
    *on_both(IMAGES.values(), SOME),
    *(on('h200', ((8, 28, 28, 512), 32), dtype) for dtype in SOME),
  ],
  ids=str,
)
@pytest.mark.optimized
def test_passes_of_groups(tmp_path, target, image, dtype):
  shape, groups = image
  norm, limits = group_norm_of(groups, NAMES[target]), LIMITS | OF_GROUPS
  assert_passes(target, norm, shape, dtype, limits, tmp_path)


def is_chosen(run, given):
  """Whether a kernel may take the place of XLA's form in training."""

  def step(*given):
    return jax.vjp(run, *given[:-1])[1](given[-1])

  return 'normkit_choice' in str(jax.make_jaxpr(step)(*given, given[0]))


OF_IMAGES = 'GroupNorm', 'InstanceNorm'


@pytest.mark.parametrize(
  ('target', 'norm', 'kind', 'dtype'),
  [
    on('h200', norm, kind, dtype)
    for place, (norm, kind) in enumerate(BLOCKS)
    for turn, dtype in enumerate(SOME)
    # Of rows the dtypes take turns: each kind of block has both.
    if norm in OF_IMAGES or (place + turn + (norm == 'RMSNorm')) % 2
  ],
)
@pytest.mark.optimized
@pytest.mark.usefixtures('recorded')
def test_chosen_moves_no_more(target, norm, kind, dtype):
  """In a block, forward and in training: a kernel is a wall to XLA's fusion.

  Images have groups in few pieces, whose kernels compile in half the time; in
  float32 nothing is chosen for them. Nor is it on TPUs, whose programs take a
  quarter of a minute each: test_chosen_in_training holds that, `python -m
  benchmarks kernels` the bytes.
  """
  of_images = norm in OF_IMAGES
  shape = (128, 28, 32, 256) if of_images else None
  by_xla, chosen = (
    block(kind, norm, implementation, dtype, shape)
    for implementation in ('xla', None)
  )
  assert not is_chosen(*by_xla)
  assert is_chosen(*chosen) == (not of_images or dtype == 'bfloat16')
  if not is_chosen(*chosen):
    return
  pairs = zip(moved(target, *chosen), moved(target, *by_xla), strict=True)
  for one, other in pairs:
    assert one <= 1.002 * other  # the sums of 132 programs are added up


@pytest.mark.parametrize('wide', [False, True], ids=['', 'x64'])
@pytest.mark.parametrize(
  'shape',
  [(1000, 1), (5, 7), (3, 2, 100), (10, 7, 2000), (65_536, 128)],
  ids=str,
)
@pytest.mark.parametrize('target', DEVICES[:2])
def test_odd_shapes_compile(target, shape, wide):
  norm = norm_of(True, NAMES[target])
  with jax.enable_x64(wide):
    for function, given in programs(norm, shape, 'bfloat16').values():
      text = targets.compile_for(target, function, *given).as_text()
      assert 'normkit_' in text


def test_no_rows(name):
  x = jnp.ones((0, 4))
  assert jax.grad(lambda x: nk.layer_norm(x).sum())(x).shape == x.shape
  with pytest.raises(NotImplementedError, match='without elements'):
    nk.layer_norm(x, implementation=name)


def test_with_64_bits_enabled(name):
  with jax.enable_x64(True):
    x, scale = draw((5, 40)), draw(40, seed=1)
    norm = functools.partial(nk.rms_norm, implementation=name)
    y, pull = jax.vjp(norm, x, scale)
    chex.assert_type([y, *pull(y)], jnp.float32)
    assert_right(y, Rows(x, scale, 0.0, False).y, 1e-5)


@pytest.mark.parametrize('moved', [0, 1, 2])
def test_one_gradient_of_a_sum(name, moved):
  """Of x, the residual or the scale alone."""
  given = [draw((5, 40), seed=i) for i in range(2)] + [draw(40, seed=2)]
  dy, dtotal = (draw((5, 40), seed=i) for i in (3, 4))

  def loss(value):
    now = [*given[:moved], value, *given[moved + 1 :]]
    y, total = nk.add_rms_norm(*now, implementation=name)
    return (y * dy + total * dtotal).sum()

  dx, dscale, _ = Rows(given[0] + given[1], given[2], 0.0, False).gradients(dy)
  desired = (dx + dtotal, dx + dtotal, dscale)[moved]
  assert_right(jax.grad(loss)(given[moved]), desired, 1e-5)


@pytest.mark.skipif(
  not targets.is_installed('a100'),
  reason='no compiler for a100: pip install -e ".[targets]"',
)
@pytest.mark.parametrize('length', [100, 8192, 65_536])
def test_older_chip(length):
  made = programs(norm_of(True, 'triton'), (1024, length), 'bfloat16')
  for kind, (function, given) in made.items():
    text = targets.compile_for('a100', function, *given).as_text()
    assert 'normkit_' in text or (kind == 'backward' and length > 8192)


def sharded_text(target, axis, implementation):
  """A step with rows over the devices of a mesh, compiled."""
  count = 2 if target == 'h200' else 4
  devices = np.array(targets.devices(target, count))
  mesh = jax.sharding.Mesh(devices, ('d',), axis_types=(axis,))
  place = functools.partial(NamedSharding, mesh)
  x = jax.ShapeDtypeStruct((1024, 4096), jnp.bfloat16, sharding=place(P('d')))
  scale = jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=place(P()))

  def step(x, scale):
    norm = functools.partial(nk.layer_norm, implementation=implementation)
    return jax.vjp(norm, x, scale)[1](x)

  with jax.set_mesh(mesh):
    return jax.jit(step).lower(x, scale).compile().as_text()


@pytest.mark.parametrize('target', DEVICES[:2])
@pytest.mark.usefixtures('recorded')
def test_sharded_rows_stay(target):
  """Explicit meshes run the kernel on each device's rows, others XLA's form."""
  name = NAMES[target]
  explicit = sharded_text(target, AxisType.Explicit, name)
  assert 'normkit_backward' in explicit
  auto = sharded_text(target, AxisType.Auto, None)
  assert 'normkit_backward' not in auto
  for text in explicit, auto:
    assert 'all-gather' not in text
  with pytest.raises(NotImplementedError, match='gather'):
    sharded_text(target, AxisType.Auto, name)


@pytest.mark.parametrize(
  ('sizes', 'manual', 'takes'),
  [
    ((1, 1), '', True),
    ((4, 1), '', False),
    ((1, 2), '', False),
    ((4, 2), 'de', True),
    ((4, 2), 'd', False),
    ((4, 2), 'e', False),
    ((4, 1), 'd', True),
  ],
)
@pytest.mark.usefixtures('recorded')
def test_programs_of_several_devices(sizes, manual, takes):
  """XLA partitions what is not manual, and cannot partition a kernel."""
  mesh = jax.make_mesh(sizes, ('d', 'e'), axis_types=(AxisType.Auto,) * 2)
  rows = NamedSharding(mesh, P(('d', 'e')))
  x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16, sharding=rows)

  def lowered(implementation):
    norm = functools.partial(nk.layer_norm, implementation=implementation)

    def step(x):
      return jax.vjp(norm, x)[1](x)[0]

    if manual:
      spec = P(tuple(manual))
      step = jax.shard_map(
        step, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=set(manual)
      )
    made = jax.jit(step).trace(x).lower(lowering_platforms=('cuda',))
    return 'triton' in made.as_text()

  assert lowered(None) == takes
  if takes:
    assert lowered('triton')
  else:
    with pytest.raises(NotImplementedError, match='would gather'):
      lowered('triton')


OBSTACLES = {
  'a GPU of 2018': ('oldest_gpu', lambda: 7.5, 'capability 8'),
  'a JAX without it': (
    'NEEDS',
    {'triton': dispatch.NEEDS['triton']._replace(module='jax.no_such')},
    'no Triton',
  ),
}


@pytest.mark.parametrize(
  ('what', 'value', 'match'), OBSTACLES.values(), ids=OBSTACLES
)
@pytest.mark.usefixtures('recorded')
def test_without_triton_xla_runs(monkeypatch, what, value, match):
  x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)

  def lowered(implementation):
    norm = functools.partial(nk.layer_norm, implementation=implementation)
    step = jax.jit(lambda x: jax.vjp(norm, x)[1](x))
    return step.trace(x).lower(lowering_platforms=('cuda',)).as_text()

  assert 'triton' in lowered(None)
  jax.clear_caches()
  monkeypatch.setattr(dispatch, what, value)
  assert 'triton' not in lowered(None)
  with pytest.raises(NotImplementedError, match=match):
    lowered('triton')


@pytest.mark.usefixtures('recorded')
@pytest.mark.parametrize('is_mapped', [False, True], ids=['', 'vmap'])
def test_a_record_is_of_one_chip(monkeypatch, is_mapped):
  """Elsewhere, or where no chip is known, it is XLA's form by None."""
  x = jax.ShapeDtypeStruct((2, 64, 256), jnp.bfloat16)

  def lowered(implementation=None, **options):
    options |= {'implementation': implementation}
    norm = functools.partial(nk.layer_norm, **options)

    def step(x):
      y, pull = jax.vjp(norm, x)
      return pull(y)

    run = jax.jit(jax.vmap(step) if is_mapped else step)
    return run.trace(x).lower(lowering_platforms=('cuda',)).as_text()

  assert 'triton' in lowered()
  assert 'triton' not in lowered(dtype=jnp.float32)  # of which no block is
  for other in None, 'NVIDIA B200':
    jax.clear_caches()
    monkeypatch.setattr(dispatch, 'chip', lambda: other)  # noqa: B023
    assert 'triton' not in lowered()
  assert 'triton' in lowered('triton')


@pytest.mark.parametrize('name', dispatch.PLATFORMS)
def test_export(name):
  """A CPU host makes the program of another platform, without its compiler."""
  platform = dispatch.PLATFORMS[name]
  x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)
  norm = functools.partial(nk.layer_norm, implementation=name)
  call = {
    'triton': '__gpu$xla.gpu.triton',
    'mosaic_gpu': 'mosaic_gpu_v2',
    'mosaic_tpu': 'tpu_custom_call',
  }[name]
  made = export.export(
    jax.jit(norm),
    platforms=[platform],
    disabled_checks=[export.DisabledSafetyCheck.custom_call(call)],
  )(x)
  assert call in str(made.mlir_module())
