"""Other people's programs: whatever Flax's norms pass, all norms pass.

One row for each transformation of a program, over all norms as transforms, in
linen and in nnx. A new norm is in all of them by its row in `cases.py`.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import gc
import re
from typing import Any, NamedTuple

from cases import CASES, NORMS, Case, draw, draw_mask
import chex
from flax import linen as nn, nnx
import jax
from jax import export
from jax.experimental import jet
from jax.extend.core import jaxpr_as_fun
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest
from tiers import second_tier

import normkit as nk
import normkit.linen
import normkit.nnx
import normkit.weights

KEY = jax.random.key(0)


class Use(NamedTuple):
  """A norm as someone calls it: `run(variables, x, train, where)`.

  It returns the output and the new variables. The first ones are made when a
  test asks for them, not for each use that is collected.
  """

  name: str
  shape: tuple[int, ...]
  make: Callable[[], Any]
  run: Callable[..., Any]

  @property
  def variables(self) -> Any:
    return made(self.make)


@functools.cache
def made(make: Callable[[], Any]) -> Any:
  """No tracers, also where a program that is traced asks first."""
  with jax.ensure_compile_time_eval():
    variables = make()
  traced = [isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(variables)]
  assert not any(traced)
  return variables


def of_transform(case: Case) -> Use:
  transform = case.transform
  if hasattr(transform, 'check_batch'):  # a batch of one is one of the sizes
    transform = dataclasses.replace(transform, check_batch=False)

  def run(variables, x, train, where=None):
    params, state = variables
    y, state = transform.apply(params, state, x, train=train, where=where)
    return y, (params, state)

  def make():
    return transform.init(jnp.zeros(case.shape))

  return Use(case.name, case.shape, make, run)


def has_state(case: Case) -> bool:
  x = jax.ShapeDtypeStruct(case.shape, jnp.float32)
  return bool(jax.tree.leaves(jax.eval_shape(case.transform.init, x)[1]))


def of_linen(name: str, shape: tuple[int, ...], **options: Any) -> Use:
  module = getattr(normkit.linen, name)(**options)
  has_state = name == 'BatchNorm'

  def run(variables, x, train, where=None):
    given = {'mask': where}
    if has_state:
      given['use_running_average'] = not train
    y, updates = module.apply(variables, x, **given, mutable=['batch_stats'])
    return y, {**variables, **updates}

  call = {'use_running_average': True} if has_state else {}

  def make():
    init = jax.jit(lambda key, x: module.init(key, x, **call))
    return init(KEY, np.zeros(shape))

  return Use(f'linen.{name}', shape, make, run)


def of_nnx(name: str, shape: tuple[int, ...], **options: Any) -> Use:
  kind = getattr(normkit.nnx, name)
  graph, state = nnx.split(kind(shape[-1], rngs=nnx.Rngs(0), **options))
  leaves, tree = jax.tree.flatten(state)

  def run(variables, x, train, where=None):
    module = nnx.merge(graph, jax.tree.unflatten(tree, variables))
    given = {'use_running_average': not train} if name == 'BatchNorm' else {}
    y = module(x, mask=where, **given)
    return y, jax.tree.leaves(nnx.state(module))

  return Use(f'nnx.{name}', shape, lambda: leaves, run)


MODULES = tuple(
  of(name, shape, **options)
  for name, shape, options in (
    ('BatchNorm', (8, 3), {'momentum': 0.9}),
    ('LayerNorm', (4, 6), {}),
    ('RMSNorm', (4, 6), {}),
    ('GroupNorm', (2, 5, 6), {'num_groups': 3}),
    ('InstanceNorm', (2, 5, 3), {}),
  )
  for of in (of_linen, of_nnx)
)
TRANSFORMS = tuple(map(of_transform, NORMS))
OTHERS = tuple(of_transform(c) for c in CASES if c not in NORMS)
# Of batches, of rows, and modules.
BATCH, ROWS = (
  next(t for t in TRANSFORMS if t.name == name)
  for name in ('batch_norm', 'layer_norm')
)
FIRST = BATCH, ROWS, *MODULES[::7]
SECOND = *TRANSFORMS, *MODULES
MODULE = MODULES[:1]
# The others are the same in evaluation as in training.
WITH_STATE = (
  *(t for t, case in zip(TRANSFORMS, NORMS, strict=True) if has_state(case)),
  *MODULES[:2],
)


def rows(first=FIRST, second=SECOND):
  """Uses as parameters, those of the second tier marked."""
  marks = {False: (), True: pytest.mark.second_tier}
  return pytest.mark.parametrize(
    'use',
    [
      pytest.param(use, id=use.name, marks=marks[use not in first])
      for use in (*first, *(u for u in second if u not in first))
    ],
  )


def rows_with(name, values, first=FIRST):
  """Uses with each of two values; the first tier has the first alone.

  A transform takes both; of the two modules of a norm each takes one.
  """
  made = []
  for use in SECOND:
    index = MODULES.index(use) if use in MODULES else None
    for position, value in enumerate(values):
      if index is not None and (index + index // 2 + position) % 2:
        continue
      is_first = use in first and not position
      param = pytest.param if is_first else second_tier
      made.append(param(use, value, id=f'{use.name}-{value}'))
  return pytest.mark.parametrize(('use', name), made)


def gradients(use: Use, variables: Any, x: Any, train=True, where=None) -> Any:
  """Gradients of variables and x, the output and the new variables."""
  leaves, tree = jax.tree.flatten(variables)
  moved = [i for i, a in enumerate(leaves) if is_float(a)]

  def loss(values, x):
    new = dict(zip(moved, values, strict=True))
    given = [new.get(i, a) for i, a in enumerate(leaves)]
    y, new = use.run(jax.tree.unflatten(tree, given), x, train, where)
    return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, new)

  values = [leaves[i] for i in moved]
  return jax.grad(loss, (0, 1), has_aux=True)(values, x)


def is_float(a):
  return jnp.issubdtype(a.dtype, jnp.floating)


def specs(tree):
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def assert_near(actual, expected):
  a, e = jax.tree.leaves(actual), jax.tree.leaves(expected)
  for one, other in zip(a, e, strict=True):
    np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def assert_same(one, other, *calls):
  """Two functions near each other, at each of the arguments.

  In one program, in which what both have alike is compiled once.
  """

  def both(calls):
    return [[function(*args) for args in calls] for function in (one, other)]

  assert_near(*jax.jit(both)(calls))


# Exported, with sizes that are symbols.


def check_symbol(use, train, masked):
  """Exported once, run at several sizes; the same as without."""
  multiple = 4 if use.name == 'batch_norm_virtual' else 1
  sizes = (2, 40) if use.name == 'iterative_whitening' else (1, 40)
  symbols = f'{multiple}*b', *map(str, use.shape[1:])
  shape = export.symbolic_shape(', '.join(symbols))
  x, where = (jax.ShapeDtypeStruct(shape, d) for d in (jnp.float32, bool))

  def run(variables, x, where):
    return gradients(use, variables, x, train, where if masked else None)

  exported = export.export(jax.jit(run))(specs(use.variables), x, where)
  shapes = [(size * multiple, *use.shape[1:]) for size in sizes]
  given = [(use.variables, draw(shape), draw_mask(shape)) for shape in shapes]
  assert_same(exported.call, run, *given)


@rows(first=[ROWS], second=(*TRANSFORMS, *MODULES[::3]))
def test_a_batch_may_be_a_symbol(use):
  check_symbol(use, train=True, masked=False)


@rows(
  first=MODULE,
  second=(*TRANSFORMS, *(m for m in MODULES[1:] if m not in MODULES[::3])),
)
def test_a_masked_batch_may_be_a_symbol(use):
  check_symbol(use, train=True, masked=True)


@rows(first=MODULE, second=WITH_STATE)
def test_a_batch_to_evaluate_may_be_a_symbol(use):
  check_symbol(use, train=False, masked=False)


@pytest.mark.parametrize(
  ('transform', 'symbols'),
  [
    (nk.BatchNorm(check_batch=False), 'b, n, f'),
    second_tier(
      nk.BatchNorm(virtual_batch_size=2, check_batch=False),
      '2*b, n, f',
    ),
    second_tier(nk.LayerNorm(), 'b, n, f'),
    second_tier(nk.LayerNorm(axis=(1, 2)), 'b, n, f'),
    (nk.GroupNorm(num_groups=2), 'b, n, 2*f'),
    second_tier(nk.InstanceNorm(), 'b, n, f'),
    second_tier(nk.ScaleNorm(), 'b, n, f'),
    second_tier(nk.EvoNormS0(num_groups=2), 'b, n, 2*f'),
    second_tier(nk.FilterResponseNorm(), 'b, n, f'),
  ],
  ids=str,
)
def test_all_sizes_may_be_symbols(transform, symbols):
  """Those of the parameters too, which `init` makes from x."""
  shape = export.symbolic_shape(symbols)
  x, where = (jax.ShapeDtypeStruct(shape, d) for d in (jnp.float32, bool))

  def run(x, where):
    params, state = transform.init(x)
    return [
      transform.apply(params, state, x, train=True, where=w)
      for w in (None, where)
    ]

  exported = export.export(jax.jit(run))(x, where)
  shapes = (2, 1, 4), (4, 9, 40)
  given = [(draw(shape), draw_mask(shape)) for shape in shapes]
  assert_same(exported.call, run, *given)


def test_moments_take_symbols():
  (b,) = export.symbolic_shape('b')
  x, where = (jax.ShapeDtypeStruct((b, 3), d) for d in (jnp.float32, bool))

  def run(x, where):
    return [nk.moments(x, a, where=w) for a in (0, 1) for w in (None, where)]

  saved = export.export(jax.jit(run))(x, where).serialize()
  given = draw((70, 3)), draw_mask((70, 3))
  assert_same(export.deserialize(saved).call, run, given)


def test_a_count_of_symbols_does_not_overflow():
  """As int32 it would, from 2^31 elements on."""
  x = jax.ShapeDtypeStruct(export.symbolic_shape('b, n, 1'), jnp.float32)
  run = jax.jit(lambda x: nk.moments(x, (0, 1)).count)
  text = export.export(run)(x).mlir_module()
  assert not re.search(r'stablehlo.multiply .* tensor<i32>', text)


def test_virtual_batches_of_a_symbol_are_refused():
  (b,) = export.symbolic_shape('b')
  x = jax.ShapeDtypeStruct((b, 3), jnp.float32)
  norm = nk.BatchNorm(virtual_batch_size=4)
  params, state = norm.init(x)
  with pytest.raises(ValueError, match=r"'4\*b'"):
    export.export(
      jax.jit(lambda x: norm.apply(params, state, x, train=True)[0])
    )(x)


# Exported for GPUs, and saved: kernels would enter these in training.

WAITS = pytest.mark.second_tier
CHOSEN = (
  ('LayerNorm', (4, 256), {}),
  ('RMSNorm', (4, 256), {}),
  ('GroupNorm', (2, 4, 4, 64), {'num_groups': 2}),
  ('InstanceNorm', (2, 4, 4, 64), {}),
)


@pytest.mark.parametrize(
  'platforms', [second_tier(['cuda']), ['cpu', 'cuda']], ids=str
)
@pytest.mark.parametrize(
  'use',
  [
    pytest.param(of(*row, **options), id=f'{of.__name__} {row[0]}', marks=marks)
    for *row, options in CHOSEN
    for of, marks in (
      (of_linen, () if row[0] in ('RMSNorm', 'GroupNorm') else WAITS),
      (of_nnx, WAITS),
    )
  ],
)
def test_gradients_exported_for_gpus_are_saved(use, platforms, monkeypatch):
  """No kernel that was not asked for: they promise no compatibility."""
  record, chips = nk.kernels.record, {'triton': ('NVIDIA H200',)}
  monkeypatch.setattr(nk.kernels.cases, 'LEAST_PLACES', 1)
  monkeypatch.setattr(record, 'entries', lambda: ('some',))
  monkeypatch.setattr(record, 'kernels', lambda *_: chips)
  jax.clear_caches()
  x = draw(use.shape, jnp.bfloat16)
  assert nk.kernels.cases.chosen(x.shape, x.dtype, groups_of(use))

  def run(variables, x):
    return gradients(use, variables, x)

  given = use.variables, x
  exported = export.export(jax.jit(run), platforms=platforms)(*specs(given))
  assert 'triton' not in exported.mlir_module()
  saved = export.deserialize(exported.serialize())
  if 'cpu' in platforms:
    assert_same(saved.call, run, given)


def groups_of(use):
  if 'Group' in use.name:
    return 2
  return use.shape[-1] if 'Instance' in use.name else None


@rows(first=(), second=MODULES)
def test_programs_are_saved_with_their_gradients(use):
  def run(variables, x):
    return use.run(variables, x, True)[0]

  given = use.variables, draw(use.shape)
  platforms = 'cpu', 'cuda'
  exported = export.export(jax.jit(run), platforms=platforms)(*specs(given))
  saved = export.deserialize(exported.serialize(vjp_order=1))

  def found(*given):
    y = saved.call(*given)
    dx = saved.vjp().call(*jax.tree.leaves((given, y)))[-1]  # in one list
    return y, dx

  def expected(*given):
    y, pull = jax.vjp(run, *given)
    return y, pull(y)[1]

  assert_same(found, expected, given)


def test_a_kernel_that_is_named_is_exported():
  x = jax.ShapeDtypeStruct((4, 256), jnp.float32)
  run = jax.jit(lambda x: nk.layer_norm(x, implementation='triton'))
  with pytest.raises(ValueError, match='no compatibility guarantees'):
    export.export(run, platforms=['cuda'])(x)


class Patches(nn.Module):
  """The norms of a vision transformer and of a UNet, between their layers."""

  @nn.compact
  def __call__(self, x, train):
    x = nn.Conv(64, (2, 2), 2)(x)
    x = normkit.linen.GroupNorm(num_groups=2)(x)
    x = normkit.linen.BatchNorm(not train)(nn.relu(x))
    x = x.reshape(x.shape[0], -1, 64)
    y = normkit.linen.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(2)(y)
    return nn.Dense(3)(normkit.linen.RMSNorm()(x).mean(1))


@pytest.mark.second_tier
def test_gradients_of_a_model_are_exported():
  """In training, for any batch, for CPUs and GPUs, saved."""
  model, x = Patches(), draw((2, 8, 8, 3))
  variables = jax.jit(lambda k, x: model.init(k, x, train=False))(KEY, x)

  def loss(params, x):
    given = {**variables, 'params': params}
    y, updates = model.apply(given, x, train=True, mutable=['batch_stats'])
    return jnp.sum(jnp.sin(y)), updates

  gradient = jax.grad(loss, has_aux=True)
  shape = jax.ShapeDtypeStruct(export.symbolic_shape('b, 8, 8, 3'), x.dtype)
  exported = export.export(jax.jit(gradient), platforms=['cpu', 'cuda'])(
    specs(variables['params']), shape
  )
  saved = export.deserialize(exported.serialize())
  given = [(variables['params'], draw((size, 8, 8, 3))) for size in (1, 5)]
  assert_same(saved.call, gradient, *given)


@rows(second=TRANSFORMS)
def test_parameters_and_states_are_saved(use):
  exported = export.export(jax.jit(lambda v: v))(specs(use.variables))
  saved = export.deserialize(exported.serialize())
  found = saved.call(use.variables)
  assert jax.tree.structure(found) == jax.tree.structure(use.variables)


# Run without `jit`, under checks, with other promotion.


def steps(use, variables, x):
  """What two steps give, the second with the variables of the first."""
  first = gradients(use, variables, x)
  return first, gradients(use, first[1][1], x)


@functools.cache
def expected_steps(use):
  run = jax.jit(functools.partial(steps, use))
  return run(use.variables, draw(use.shape))


@rows(first=MODULE)
def test_without_jit(use):
  with jax.disable_jit():
    found = gradients(use, use.variables, draw(use.shape))
  assert_near(found, expected_steps(use)[0])


CHECKS = (
  lambda: jax.numpy_dtype_promotion('strict'),
  lambda: jax.numpy_rank_promotion('raise'),
  jax.checking_leaks,
  lambda: jax.debug_nans(True),
)


@functools.cache
def checked(use):
  """The gradients under all checks at once, for one compilation.

  To look for leaks, JAX collects garbage at each trace: not that of before.
  """
  gc.freeze()
  with contextlib.ExitStack() as stack:
    stack.callback(gc.unfreeze)
    for check in CHECKS:
      stack.enter_context(check())
    run = jax.jit(lambda v, x, w: gradients(use, v, x, where=w))
    return run(use.variables, draw(use.shape), draw_mask(use.shape))


@rows(first=MODULE)
def test_under_checks(use):
  checked(use)


def twice(tree):
  return jax.tree.map(lambda a: np.stack([a, a]), tree)


@rows(first=MODULE)
def test_arrays_of_numpy_mapped_inside_of_jit(use):
  given = twice((use.variables, draw(use.shape), draw_mask(use.shape)))

  def run(v, x, w):
    return gradients(use, v, x, where=w)

  found = jax.jit(lambda: jax.vmap(run)(*given))()
  assert_near(found, twice(checked(use)))


@rows()
def test_variables_may_be_donated(use):
  def run(v, x):
    return use.run(v, x, True)

  expected = jax.jit(run)(use.variables, draw(use.shape))
  given = jax.tree.map(jnp.array, use.variables)  # copies
  found = jax.jit(run, donate_argnums=0)(given, draw(use.shape))
  assert_near(found, expected)
  assert all(a.is_deleted() for a in jax.tree.leaves(given))


def assert_series(terms, desired, dtype):
  tolerance = {'float32': 1e-4, 'bfloat16': 0.1}[dtype]
  terms, desired = jax.tree.map(np.float32, (terms, desired))
  chex.assert_trees_all_close(terms, desired, atol=tolerance, rtol=tolerance)


@rows_with('dtype', ('float32', 'bfloat16'))
def test_jet(use, dtype):
  """Taylor series along a line: the first and second derivative."""
  x, v = draw(use.shape, dtype), draw(use.shape, dtype, seed=1)
  variables = use.variables  # in jet they would be its tracers

  def apply(x):
    return use.run(variables, x, True)[0]

  @jax.jit
  def both(x, v, t):
    def slope(t):
      return jax.jvp(lambda t: apply(x + t * v), (t,), (1.0,))

    terms = jet.jet(apply, (x,), ((v, jnp.zeros_like(v)),))
    (y, first), (_, second) = jax.jvp(slope, (t,), (1.0,))
    return terms, (y, [first, second])

  terms, desired = both(x, v, 0.0)
  assert_series(terms, desired, dtype)


@pytest.mark.parametrize('change', [jax.grad, jax.jacfwd, jax.vmap])
@rows_with('dtype', ('float32', 'bfloat16'))
def test_jet_of_what_is_transformed(use, dtype, change):
  """Its tracers are inside of others there."""
  if use.name == 'derf' and change is not jax.vmap:
    pytest.skip('jax.lax.erf has a rule of its own, which jet does not take')
  x = draw(use.shape, dtype)
  inputs = jnp.stack([x, 2 * x]) if change is jax.vmap else x
  variables = use.variables

  def apply(x):
    y = use.run(variables, x, True)[0]
    return y if change is jax.vmap else jnp.sum(jnp.sin(y))

  run = change(apply)

  @jax.jit
  def both(x, v):
    y, (slope,) = jet.jet(run, (x,), ((v,),))
    return (y, slope), jax.jvp(run, (x,), (v,))

  assert_series(*both(inputs, draw(inputs.shape, dtype, seed=1)), dtype)


@pytest.mark.parametrize('dtype', ['bfloat16', second_tier('float32')])
@rows()
def test_strict_promotion(use, dtype):
  """Modules name the dtype, as they would otherwise promote, as Flax's do."""
  if dtype == 'bfloat16' and SECOND.index(use) % 2:
    dtype = 'float16'  # no other promotion
  if use in MODULES:
    use = with_options(use, {'dtype': dtype})
  x, where = draw(use.shape, dtype), draw_mask(use.shape)
  with jax.numpy_dtype_promotion('strict'):
    for mask in None, where:
      for train in True, False:
        run = functools.partial(gradients, use, train=train, where=mask)
        found = jax.eval_shape(run, use.variables, x)
        assert found[0][1].dtype == x.dtype


@rows(first=[t for t in TRANSFORMS if t.name == 'streaming_norm'])
def test_strict_promotion_where_numbers_are_wide(use):
  """Python's are float64 there: they take the dtype of the statistics."""
  x, variables = draw(use.shape), use.variables
  with jax.enable_x64(True), jax.numpy_dtype_promotion('strict'):
    found = jax.eval_shape(functools.partial(gradients, use), variables, x)
  assert found[0][1].dtype == x.dtype


@rows_with('kind', (AxisType.Explicit, AxisType.Auto), first=MODULE)
def test_meshes(use, kind):
  """With variables from outside of the mesh, and a second step."""
  grid = jax.make_mesh((2,), ('d',), axis_types=(kind,))
  x = draw(use.shape)
  axis = next(i for i, size in enumerate(x.shape) if size % 2 == 0)
  spec = P(*(None,) * axis, 'd')
  placed = jax.device_put(x, NamedSharding(grid, spec))
  found = jax.jit(functools.partial(steps, use))(use.variables, placed)
  assert_near(found, expected_steps(use))


@rows_with('dtype', ('float32', 'bfloat16'))
def test_for_one_platform(use, dtype):
  """For tools that read the program: no choice is left in it."""
  x = draw(use.shape, dtype)

  def run(variables, x):
    return gradients(use, variables, x)

  with nk.for_platform('cpu'):
    program = jax.make_jaxpr(run)(use.variables, x)
  assert 'normkit_form' not in str(program)

  def found(*given):
    return jaxpr_as_fun(program)(*jax.tree.leaves(given))

  assert_same(found, run, (use.variables, x))


def test_platforms_choose_their_forms():
  """Also where what is inside of them was traced before."""

  def program():
    loss = jax.grad(lambda x: nk.layer_norm(x).sum())
    return str(jax.make_jaxpr(loss)(jnp.ones((4, 6), jnp.bfloat16)))

  programs = [program()]
  for name in ('cpu', 'cuda'):
    with nk.for_platform(name):
      programs.append(program())
  assert len(set(programs)) == len(programs)
  assert ['normkit_form' in p for p in programs] == [True, False, False]
  assert program() == programs[0]
  with pytest.raises(ValueError, match="'gpu' is no platform; give one of"):
    nk.for_platform('gpu').__enter__()


# Options that are arrays, traced or not.


def with_options(use, options):
  """What a use gives with other options, made inside of the program."""
  kind, _, name = use.name.rpartition('.')
  if not kind:
    case = next(c for c in CASES if c.name == name)
    transform = dataclasses.replace(case.transform, **options)
    return of_transform(case._replace(transform=transform))
  others = {'num_groups': 3} if name == 'GroupNorm' else {}
  of = {'linen': of_linen, 'nnx': of_nnx}[kind]
  return of(name, use.shape, **others, **options)


def options_of(use):
  """The options that may be arrays, with some values."""
  if use.name in ('derf', 'dyt'):
    return {}
  options = {'epsilon': 0.5, 'momentum': 0.25}
  if use.name.endswith('BatchNorm'):
    return options
  case = next((c for c in CASES if c.name == use.name), None)
  if getattr(getattr(case, 'transform', None), 'momentum', None) is None:
    del options['momentum']
  return options


@rows(first=[BATCH, MODULES[7]])
def test_options_may_be_arrays(use):
  """As from a schedule; the same as the numbers, and differentiable."""
  numbers = options_of(use)
  x, where = draw(use.shape), draw_mask(use.shape)

  def run(options):
    made = with_options(use, options)
    y, new = made.run(use.variables, x, True, where)
    plain, _ = made.run(use.variables, x, False)
    return y, plain, jax.tree.leaves(new)

  def total(options):
    outputs = run(options)
    if use.name.startswith('nnx'):  # what is stored has no gradient, as Flax's
      outputs = outputs[:2]
    return sum(jnp.sum(a) for a in jax.tree.leaves(outputs))

  @jax.jit
  def all_of_it(options):
    return (run(options), run(numbers)), jax.value_and_grad(total)(options)

  def value(options):
    return float(all_of_it(jax.tree.map(jnp.asarray, options))[1][0])

  both, (_, slopes) = all_of_it(jax.tree.map(jnp.asarray, numbers))
  assert_near(*both)
  for name in numbers:
    step = {**numbers, name: numbers[name] + 1e-2}
    back = {**numbers, name: numbers[name] - 1e-2}
    expected = (value(step) - value(back)) / 2e-2
    np.testing.assert_allclose(slopes[name], expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize('debias', [False, True])
@pytest.mark.parametrize('momentum', [0.0, 0.25, 1.0])
def test_a_momentum_that_is_an_array(momentum, debias):
  """At its ends too: with debias one is the cumulative average."""
  x = draw((2, 8, 3))
  params, state = nk.BatchNorm().init(x[0])

  def run(momentum, **options):
    norm = nk.BatchNorm(momentum=momentum, **options)
    new = state
    for batch in x:
      _, new = norm.apply(params, new, batch, train=True)
    return new

  is_mean = debias and momentum == 1
  expected = run(None) if is_mean else run(momentum, debias=debias)
  assert_near(run(jnp.array(momentum), debias=debias), expected)


@pytest.mark.parametrize('name', ['epsilon', 'momentum'])
def test_arrays_that_are_no_option(name):
  for value in (jnp.ones(3), jnp.array(1), np.array(True), jnp.array(1j)):
    with pytest.raises(TypeError, match=f'{name} must be a Python number'):
      nk.BatchNorm(**{name: value})


def test_a_kernel_does_not_take_an_epsilon_that_is_an_array():
  x = draw((4, 256))
  with pytest.raises(NotImplementedError, match='epsilon is an array'):
    nk.layer_norm(x, epsilon=jnp.array(1e-6), implementation='triton')


def test_a_transform_with_an_array_does_not_hash():
  with pytest.raises(TypeError, match='unhashable'):
    hash(nk.BatchNorm(momentum=jnp.array(0.9)))
  with pytest.raises(TypeError, match='unhashable'):
    hash(nk.LayerNorm(epsilon=np.array(1e-6)))


def test_weights_take_an_epsilon_that_is_an_array():
  kernel = draw((4, 6))
  calls = (
    lambda e: normkit.weights.weight_norm(kernel, epsilon=e),
    lambda e: normkit.weights.weight_standardize(kernel, epsilon=e),
    lambda e: normkit.weights.weight_standardize(
      kernel, epsilon=e, scaled=True
    ),
  )
  found = jax.jit(lambda e: [call(e) for call in calls])(jnp.array(0.5))
  assert_near(found, jax.jit(lambda: [call(0.5) for call in calls])())


# What other people write, and other trainers do.


@pytest.mark.parametrize(
  'name', [n for n in normkit.nnx.__all__ if n[0].isupper()]
)
def test_view_info_knows_every_module(name):
  rngs = nnx.Rngs(0)
  kind = getattr(normkit.nnx, name)
  make = {
    'Norm': lambda: kind(nk.BatchNorm(), jnp.ones((2, 3))),
    'RNN': lambda: kind(nnx.GRUCell(3, 4, rngs=rngs), rngs=rngs),
    'BatchNormLSTMCell': lambda: kind(3, 4, max_length=5, rngs=rngs),
  }
  if name.endswith('Cell'):
    make.setdefault(name, lambda: kind(3, 4, rngs=rngs))
  if name.startswith(('Weight', 'Spectral')):
    make[name] = lambda: kind(nnx.Linear(3, 4, rngs=rngs), rngs=rngs)
  module = make.get(name, lambda: kind(32, rngs=rngs))()
  told = nnx.view_info(module)
  assert ('use_running_average' in told) == hasattr(module, 'set_view')


def test_a_width_is_no_flag():
  """As people write who come from PyTorch: it would evaluate for good."""
  for width in (1, 16):
    with pytest.raises(ValueError, match=f'use_running_average={width} is a'):
      normkit.linen.BatchNorm(width)
  for flag in (None, True, False, np.True_, 0):
    assert normkit.linen.BatchNorm(flag).use_running_average == flag


@rows(first=TRANSFORMS, second=OTHERS)
def test_complex_parameters_of_a_real_result(use):
  """Their imaginary part would be lost."""
  params, state = use.variables
  for name, value in params._asdict().items():
    if value is None:
      continue
    given = params._replace(**{name: value + 1j})
    with pytest.raises(TypeError, match=f'cannot hold the complex .*{name}'):
      use.run((given, state), draw(use.shape), False)


def test_options_are_checked_when_a_transform_is_made():
  for size, error in ((-3, ValueError), (0, ValueError), (2.5, TypeError)):
    with pytest.raises(error, match='virtual_batch_size must be'):
      nk.BatchNorm(virtual_batch_size=size)
    _, state = nk.BatchNorm().init(jnp.ones((2, 3)))
    with pytest.raises(error, match='virtual_batch_size must be'):
      nk.batch_norm(
        jnp.ones((2, 3)), state, train=False, virtual_batch_size=size
      )
  for groups in ([[0, 2]], [[0], [0]], 'ab', [1], 3):
    with pytest.raises(ValueError, match='axis_index_groups'):
      nk.LayerNorm(axis_name='i', axis_index_groups=groups)
  with pytest.raises(ValueError, match='without axis_name'):
    nk.BatchNorm(axis_index_groups=[[0, 1]])
  norm = nk.BatchNorm(axis_name='i', axis_index_groups=[[0, 1], [2, 3]])
  assert norm.axis_index_groups == ((0, 1), (2, 3))


COUNTED = (
  of_linen('BatchNorm', (8, 3), momentum=None),
  of_nnx('BatchNorm', (8, 3), momentum=None),
  *(u for u in TRANSFORMS if u.name in ('batch_norm', 'iterative_whitening')),
)


@pytest.mark.parametrize('use', COUNTED, ids=lambda use: use.name)
def test_a_count_stays_an_integer(use):
  """Also where a trainer averages all statistics, as Flax's example does."""
  averaged = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), use.variables
  )
  train = functools.partial(use.run, train=True)
  _, new = jax.eval_shape(train, averaged, draw(use.shape))
  chex.assert_trees_all_equal_shapes_and_dtypes(new, use.variables)


def test_spectral_norm_leaves_biases_of_nnx_alone():
  @jax.jit
  def run(x):
    rngs = nnx.Rngs(0)
    layer = nnx.LinearGeneral(6, (2, 4), rngs=rngs)
    layer.bias[...] = jnp.full((2, 4), 0.1)
    return normkit.nnx.SpectralNorm(layer, rngs=rngs)(x)

  y = run(np.zeros((1, 6), np.float32))
  np.testing.assert_allclose(y, np.full((1, 2, 4), np.float32(0.1)))


def test_spectral_norm_leaves_biases_of_linen_alone():
  layer = nn.DenseGeneral((2, 4), bias_init=nn.initializers.constant(0.1))
  norm, x = normkit.linen.SpectralNorm(layer), np.zeros((1, 6), np.float32)

  @jax.jit
  def run(x):
    variables = norm.init(KEY, x, update_stats=False)
    return variables, norm.apply(variables, x, update_stats=False)

  variables, y = run(x)
  np.testing.assert_allclose(y, np.full((1, 2, 4), 0.1), rtol=1e-6)
  init = functools.partial(nn.SpectralNorm(layer).init, update_stats=False)
  flax = jax.eval_shape(init, KEY, x)
  assert jax.tree.structure(variables) == jax.tree.structure(flax)
