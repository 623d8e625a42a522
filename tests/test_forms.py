"""A function in a form for each platform: traced when it is lowered."""

import cProfile
import functools
import pstats

import chex
from flax import linen as nn
import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

from normkit import forms, platforms
from normkit._primitives import Sizes
from normkit.affine import FEW_ROWS
import normkit.linen

X, DY = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
FORMS = 'default', 'cpu alone', 'cpu', 'cuda alone'


def linear(names, x, v):
  """cos(x) v, whatever the platform; `names` are those that were traced."""

  def form(name, x, v):
    names.append(name)
    return jnp.cos(x) * v

  found = {n: lambda *a, n=n: form(n, *a) for n in ('default', 'cpu', 'tpu')}
  return forms.choose(found, (x,), jax.typeof(v), (v,))


def test_one_form_is_traced_and_only_when_lowered():
  names = []
  traced = jax.jit(lambda x, v: linear(names, x, v)).trace(X, DY)
  assert 'forms=default/cpu/tpu' in str(traced.jaxpr)
  assert not names
  for platform, name in ('tpu', 'tpu'), ('cuda', 'default'), ('cpu', 'cpu'):
    names.clear()
    lowered = traced.lower(lowering_platforms=(platform,))
    assert names == [name]
  np.testing.assert_allclose(lowered.compile()(X, DY), np.cos(X) * DY, 1e-6)


def test_derivatives_transpose_and_vmap():
  """By x, by what it is linear in, and again: sin, cos and their products."""

  def run(x, v):
    return linear([], x, v)

  def transpose(x, v):
    return jax.linear_transpose(lambda v: run(x, v), v)(v)[0]

  def square(x, v):
    return (jax.grad(lambda x: run(x, v).sum())(x) ** 2).sum()

  @jax.jit
  def derivatives(x, v):
    return {
      'both': jax.jvp(run, (x, v), (v, x))[1],
      'linear': jax.jvp(lambda v: run(x, v), (v,), (x,))[1],
      'transpose': transpose(x, v),
      'of the transpose': jax.grad(lambda x: (transpose(x, v) * v).sum())(x),
      'twice': jax.grad(square)(x, v),
      'vmap': jax.vmap(run, (0, None))(x, v[0]),
      'vmap of grad': jax.vmap(jax.grad(lambda v, x: run(x, v).sum()), (1, 1))(
        v, x
      ),
    }

  cos, sin = np.cos(X), np.sin(X)
  desired = {
    'both': -sin * DY**2 + cos * X,
    'linear': cos * X,
    'transpose': cos * DY,
    'twice': 2 * sin * cos * DY**2,
    'of the transpose': -sin * DY**2,
    'vmap': cos * DY[0],
    'vmap of grad': cos.T,
  }
  found = derivatives(X, DY)
  chex.assert_trees_all_close(found, desired, rtol=1e-4, atol=1e-5)


def test_for_several_platforms():
  """One program, which chooses where it runs."""
  run = jax.jit(lambda x, v: linear([], x, v))
  exported = export.export(run, platforms=('cpu', 'cuda', 'tpu'))(X, DY)
  np.testing.assert_allclose(exported.call(X, DY), np.cos(X) * DY, 1e-6)


def test_of_one_device():
  """Each device of `shard_map` runs a program of its own."""
  mesh = jax.make_mesh((2,), ('data',), (AxisType.Auto,))
  names = []

  def run(x):
    found = {n: lambda x, n=n: (names.append(n), x + 1)[1] for n in FORMS}
    return forms.choose(found, (x,), jax.typeof(x))

  local = jax.shard_map(run, mesh=mesh, in_specs=P('data'), out_specs=P('data'))
  placed = jax.device_put(jnp.ones((4, 4)), NamedSharding(mesh, P('data')))
  for function, x in (run, X), (run, placed), (local, placed):
    jax.jit(function)(x)
  assert names == ['cpu alone', 'cpu', 'cpu alone']
  for chosen, desired in (
    (('cuda',), {'cuda alone'}),
    (('rocm',), {'default'}),
    (('cpu', 'cuda', 'rocm'), {'cpu alone', 'cuda alone', 'default'}),
    (('tpu', 'rocm'), {'default'}),
  ):
    names.clear()
    exported = export.export(jax.jit(run), platforms=chosen)(X)
    assert set(names) == desired
    has_choice = 'stablehlo.case' in exported.mlir_module()
    assert has_choice == (len(desired) > 1)


def test_of_a_size():
  """That which arrays have in the program, where `vmap` has added an axis."""
  names = []

  def form(name, x, v):
    names.append(name)
    return jnp.cos(x) * v

  def run(x, v):
    found = {n: functools.partial(form, n) for n in ('default', 'cpu')}
    sizes = {'cpu': Sizes(range(X.size + 1))}
    return forms.choose(found, (x,), jax.typeof(v), (v,), sizes)

  many, all_dy = np.stack([X, -X]), np.stack([DY, DY])
  grads = jax.grad(lambda x, v: run(x, v).sum(), 1)
  calls = {
    'cpu': ((run, X, DY), (grads, X, DY), (jax.vmap(run), X, DY)),
    'default': (
      (jax.vmap(run), many, all_dy),
      (jax.vmap(run, (0, None)), many, DY),
      (jax.vmap(jax.grad(lambda x: run(x, x).sum())), many),
    ),
  }
  for name, each in calls.items():
    for function, *arrays in each:
      traced = jax.jit(function).trace(*arrays)
      names.clear()  # the default is traced for its shape, too
      traced.lower()
      assert set(names) == {name}
  summed = jax.vjp(lambda v: jax.vmap(run, (0, None))(many, v), DY)[1](all_dy)
  np.testing.assert_allclose(summed[0], 2 * np.cos(X) * DY, 1e-5)


def test_the_first_that_fits():
  """Of several for one platform."""
  names = []

  def run(x):
    runs = {
      name: lambda x, name=name: (names.append(name), x + 1)[1]
      for name in ('default', 'cpu small', 'cpu', 'cpu large')
    }
    sizes = {'cpu small': Sizes(range(3, 6)), 'cpu': Sizes(range(4, 8))}
    return forms.choose(runs, (x,), jax.typeof(x), (), sizes)

  for size in (2, 3, 5, 6, 8):
    jax.jit(run)(jnp.ones(size))
  assert names == ['cpu large', 'cpu small', 'cpu small', 'cpu', 'cpu large']


@pytest.mark.parametrize(('size', 'name'), [(12, 'cpu'), (13, 'default')])
def test_of_a_platform_that_was_named(size, name):
  names = []

  def form(name, x):
    names.append(name)
    return x

  runs = {n: functools.partial(form, n) for n in FORMS}
  x = jnp.ones(size)
  sizes = {'cpu': Sizes(range(13)), 'cpu alone': Sizes(range(99))}
  with normkit.for_platform('cpu'):
    platforms.dependent(runs, (x,), jax.typeof(x), sizes=sizes)
  assert names == [name]


@pytest.mark.parametrize(
  ('rows', 'has_products'),
  [(1, False), (FEW_ROWS - 1, False), (FEW_ROWS, True)],
)
@pytest.mark.parametrize('is_one_scale', [True, False])
def test_products_of_rows_that_vmap_makes_many(
  rows, has_products, is_one_scale
):
  """They are slower for one row, and so where each has a scale of its own."""

  def loss(x, scale):
    norm = jax.vmap(normkit.rms_norm, (0, None if is_one_scale else 0))
    return norm(x, scale).sum()

  shape = rows, 9000
  scale = jnp.ones(shape[is_one_scale:])
  lowered = jax.jit(jax.grad(loss, (0, 1))).lower(jnp.ones(shape), scale)
  has_some = 'dot_general' in lowered.as_text()
  assert has_some == (has_products and is_one_scale)


def test_by_the_settings_that_it_was_traced_with():
  """Of 64 bits, though nothing is when the program is lowered."""
  with jax.enable_x64(True):
    x, v = (np.asarray(a, np.float64) for a in (X, DY))
    traced = jax.jit(lambda x, v: linear([], x, v)).trace(x, v)
  compiled = traced.lower().compile()
  with jax.enable_x64(True):
    np.testing.assert_allclose(compiled(x, v), np.cos(x) * v, 1e-14)


def test_without_jit():
  with jax.disable_jit():
    found = linear([], jnp.asarray(X), jnp.asarray(DY))
  np.testing.assert_allclose(found, np.cos(X) * DY, 1e-6)


@pytest.mark.parametrize('rows', [6, 600])  # of a CPU's own form, the others
def test_tracing_costs_little_more_than_flax(rows):
  """Function calls of a layer norm's training step: of a new shape, and again.

  The step of another shape comes before: it pays for what is loaded once. Each
  library has shapes of its own, or the second finds what the first has traced.
  """

  def calls(module, rows):
    def loss(variables, x):
      return module.apply(variables, x).sum()

    x = jax.ShapeDtypeStruct((rows, 11, 40), jnp.float32)
    given = jax.eval_shape(module.init, jax.random.key(0), x), x
    profile = cProfile.Profile()
    profile.runcall(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1))), *given)
    return pstats.Stats(profile).total_calls

  (ours, again), (theirs, theirs_again) = (
    [calls(module, n) for n in (2 * r, 3 * r, r, r)][2:]
    for module, r in (
      (normkit.linen.LayerNorm(), rows),
      (nn.LayerNorm(), rows + 1),
    )
  )
  assert ours < 1.5 * theirs
  assert again < 0.54 * theirs_again


@pytest.mark.parametrize(
  ('dtype', 'rows', 'platform', 'is_apart'),
  [
    ('bfloat16', 40, 'cpu', True),
    ('float16', 40, 'cpu', True),
    ('bfloat16', 40, 'cuda', False),
    ('float32', 40, 'cpu', False),
    ('bfloat16', 4000, 'cpu', False),
  ],
)
def test_what_is_small_is_widened_apart(dtype, rows, platform, is_apart):
  """On a CPU, from half precision; other compilers would write it out."""
  x = jax.ShapeDtypeStruct((rows, 70), dtype)
  traced = jax.jit(jax.grad(lambda x: normkit.rms_norm(x).sum())).trace(x)
  lowered = traced.lower(lowering_platforms=(platform,))
  assert ('optimization_barrier' in lowered.as_text()) == is_apart
