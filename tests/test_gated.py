"""Gated RMS norm with a gate of its own: values, gradients, modules, errors."""

import functools
import itertools

from cases import draw, draw_mask, precision
import chex
import family
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_memory import kept
from tiers import thinned

import normkit as nk
from normkit import testing
import normkit.linen
import normkit.nnx

SHAPE, STEP = (3, 4, 6), 1e-6
SMALL = 3, 2, 4  # for differences
ORDERS = {'norm_first': True, 'gate_first': False}
KEY = jax.random.key(0)


def given(dtype=jnp.float32, shape=SHAPE):
  """x, gate, scale and the gradient of y."""
  x, gate, dy = (draw(shape, dtype, seed) for seed in range(3))
  return x, gate, draw(shape[-1:], dtype, 3), dy


def reference(x, gate, scale, last, size, where=None):
  arrays = [np.asarray(a, np.float64) for a in (x, gate, scale)]
  where = None if where is None else np.asarray(where)
  return family.gated(*arrays, last, size, where=where)


def gradients(x, gate, scale, dy, *options):
  """Central differences of the reference."""
  args = [np.array(a, np.float64) for a in (x, gate, scale)]
  dy = np.asarray(dy, np.float64)

  def partial(i, at):
    ends = []
    for step in STEP, -STEP:
      moved = [a.copy() for a in args]
      moved[i][at] += step
      ends.append(np.sum(dy * reference(*moved, *options)))
    return (ends[0] - ends[1]) / (2 * STEP)

  return [
    np.reshape([partial(i, at) for at in np.ndindex(a.shape)], a.shape)
    for i, a in enumerate(args)
  ]


def run(last, size, where=None, **options):
  return functools.partial(
    nk.gated_rms_norm,
    norm_before_gate=last,
    group_size=size,
    where=where,
    **options,
  )


@pytest.mark.parametrize(
  ('last', 'size', 'masked', 'dtype'),
  thinned(
    ORDERS.values(),
    [None, 2],
    [False, True],
    [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64],
    every=5,
    keep=3,
  ),
)
def test_values_and_gradients(last, size, masked, dtype):
  with precision(dtype):
    *args, dy = given(dtype, SMALL)
    where = draw_mask(SMALL) if masked else None

    @jax.jit
    def pulled(dy, *args):
      y, pull = jax.vjp(run(last, size, where), *args)
      return y, pull(dy)

    y, found = pulled(dy, *args)
    assert y.dtype == dtype
    unit = max(float(jnp.finfo(dtype).eps), 1e-8)
    desired = reference(*args, last, size, where)
    np.testing.assert_allclose(
      np.float64(y), desired, atol=8 * unit, rtol=8 * unit
    )
    wanted = gradients(*args, dy, last, size, where)
    for actual, value in zip(found, wanted, strict=True):
      assert actual.dtype == dtype
      error = np.abs(np.float64(actual) - value).max() / np.abs(value).max()
      assert error <= max(8 * unit, 1e-6)  # of the differences


@pytest.mark.parametrize('last', ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_masked_values_do_not_leak(last, value):
  """Nor does a masked gate, into any gradient."""
  *args, dy = given()
  where = np.ones(SHAPE, bool)
  where[0, 0, 1] = False
  x, gate, scale = args

  @jax.jit
  def pulled(x, gate):
    y, pull = jax.vjp(run(last, 2, where), x, gate, scale)
    return y, pull(jnp.where(where, dy, 0))

  clean = pulled(*(np.where(where, a, np.float32(0)) for a in (x, gate)))
  found = pulled(*(np.where(where, a, np.float32(value)) for a in (x, gate)))
  chex.assert_trees_all_equal(found, clean)


@pytest.mark.parametrize('last', ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize('size', [None, 128])
@pytest.mark.parametrize('rounds', [False, True])
def test_what_is_kept(last, size, rounds):
  """x and the gate in their own dtype, and numbers of a row."""
  x = jax.ShapeDtypeStruct((512, 1024), jnp.bfloat16)
  scale = jax.ShapeDtypeStruct((1024,), jnp.float32)
  norm = run(last, size, round_before_scale=rounds)
  bytes_of_both = 2 * x.size * x.dtype.itemsize
  assert bytes_of_both <= kept(norm, x, x, scale) <= 1.05 * bytes_of_both


def test_transformations():
  x, gate, scale, _ = given()
  norm = run(False, 2)
  y = norm(x, gate, scale)

  @jax.jit
  def transformed(*args):
    mapped = jax.vmap(norm, (0, 0, None))(*args)
    _, scanned = jax.lax.scan(
      lambda carry, row: (carry, norm(*row, args[2])), 0, args[:2]
    )
    primal, tangent = jax.jvp(norm, args, args)
    _, pull = jax.vjp(norm, *args)
    slope = sum(map(jnp.vdot, pull(jnp.ones_like(primal)), args))
    return (mapped, scanned, primal), (tangent.sum(), slope)

  same, slopes = transformed(x, gate, scale)
  for other in same:
    np.testing.assert_allclose(other, y, rtol=1e-6)
  np.testing.assert_allclose(*slopes, rtol=1e-4)


@pytest.mark.parametrize('last', ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize('size', [None, 2])
def test_pools_over_devices(last, size):
  """Each device holds a part of every row, or of every group."""
  x, gate, _, _ = given(shape=(2, 4, 6))
  each = jax.vmap(run(last, size, axis_name='d'), axis_name='d')
  x, gate, pooled = jax.device_get((x, gate, jax.jit(each)(x, gate)))
  sets = 6 if size is None else size

  def together(a):  # the devices' parts of a group beside each other
    return np.moveaxis(a.reshape(2, 4, -1, sets), 0, 2).reshape(4, -1)

  whole = jax.jit(run(last, 2 * sets))(together(x), together(gate))
  np.testing.assert_allclose(together(pooled), whole, rtol=1e-5, atol=1e-6)


def test_other_axes_and_no_gate():
  x, gate, _, _ = given()
  moved = [jnp.moveaxis(a, -1, 0) for a in (x, gate)]
  first = run(False, 2, axis=0)(*moved)
  np.testing.assert_allclose(
    jnp.moveaxis(first, 0, -1), run(False, 2)(x, gate), rtol=1e-6
  )
  np.testing.assert_allclose(
    run(True, None, axis=(1, 2))(x, None),
    nk.rms_norm(x, axis=(1, 2)),
    rtol=1e-6,
  )


def test_a_gate_of_another_dtype():
  """All is taken in the wider of both; the result is of x's."""
  with precision(jnp.float64):
    x, gate, scale, _ = given(jnp.float64)
    x = x.astype(jnp.float32)
    y = run(False, 2, dtype=jnp.float64)(x, gate, scale)
    desired = reference(x, gate, scale, False, 2)
    np.testing.assert_allclose(y, desired, rtol=1e-12)
  narrow = gate.astype(jnp.bfloat16)
  y, pull = jax.vjp(run(True, 2), x, narrow)
  assert (y.dtype, pull(y)[1].dtype) == (jnp.float32, jnp.bfloat16)
  np.testing.assert_allclose(
    y, reference(x, narrow, np.ones(6), True, 2), rtol=1e-5
  )


MODULES = {
  'plain': {},
  'mamba': {'norm_before_gate': False, 'group_size': 3},
  'offset': {'scale_offset': 1.0, 'activation': jax.nn.sigmoid},
  'rounds': {'round_before_scale': True, 'param_dtype': jnp.bfloat16},
  'without_scale': {'use_scale': False, 'dtype': jnp.float32},
}


@pytest.mark.parametrize('options', MODULES.values(), ids=MODULES)
def test_modules(options):
  """As the transform is, with the same parameters."""
  x, gate, scale, _ = given(jnp.bfloat16)
  transform, where = nk.GatedRMSNorm(**options), draw_mask(SHAPE)
  params, state = transform.init(x)
  linen = normkit.linen.GatedRMSNorm(**options)
  layer = normkit.nnx.GatedRMSNorm(6, rngs=nnx.Rngs(0), **options)
  variables = linen.init(KEY, x, gate)
  if params.scale is not None:
    chex.assert_trees_all_equal(variables['params'], {'scale': params.scale})
    chex.assert_trees_all_equal(layer.scale[...], params.scale)
    params = nk.NormParams(scale.astype(params.scale.dtype))
    variables, layer.scale[...] = {'params': {'scale': params[0]}}, params[0]
  found = [
    linen.apply(variables, x, gate, mask=where),
    layer(x, gate, mask=where),
  ]
  wide = nk.GatedRMSNorm(**options | {'dtype': found[0].dtype})
  y, _ = wide.apply(params, state, x, gate, train=True, where=where)
  for actual in found:
    assert actual.dtype == y.dtype
    np.testing.assert_allclose(
      np.float32(actual), np.float32(y), rtol=1e-6, atol=1e-6
    )


def test_modules_want_a_gate():
  """None is one that is left out; forgotten it is an error."""
  x = given()[0]
  linen = normkit.linen.GatedRMSNorm()
  layer = normkit.nnx.GatedRMSNorm(6, rngs=nnx.Rngs(0))
  variables = linen.init(KEY, x, None)
  for call in functools.partial(linen.apply, variables), layer:
    np.testing.assert_allclose(call(x, None), nk.rms_norm(x), rtol=1e-6)
    with pytest.raises(TypeError, match='gate'):
      call(x)


def test_the_transform_is_static():
  norm = nk.GatedRMSNorm(activation=jax.nn.sigmoid, group_size=2)
  assert hash(norm) == hash(
    nk.GatedRMSNorm(activation=jax.nn.sigmoid, group_size=2)
  )
  x, gate, _, _ = given()
  params, state = norm.init(x)

  @functools.partial(jax.jit, static_argnums=0)
  def apply(norm, x, gate):
    return norm.apply(params, state, x, gate, train=False)[0]

  np.testing.assert_allclose(
    apply(norm, x, gate),
    nk.gated_rms_norm(x, gate, activation=jax.nn.sigmoid, group_size=2),
    rtol=1e-6,
  )


BAD = {
  'gate of shape': ({'gate': jnp.ones((3, 4, 1))}, ValueError),
  'gate must be an array': ({'gate': [1.0]}, TypeError),
  'gate must have a floating': ({'gate': jnp.ones(SHAPE, int)}, TypeError),
  'gate must be real': ({'gate': jnp.ones(SHAPE, complex)}, TypeError),
  'x must be real': ({'x': jnp.ones(SHAPE, complex)}, TypeError),
  'activation must be': ({'activation': 'silu'}, TypeError),
  'group_size=4 does not': ({'group_size': 4}, ValueError),
  'group_size=0 does not': ({'group_size': 0}, ValueError),
  'group_size must be': ({'group_size': 2.0}, TypeError),
  'along one axis': ({'group_size': 2, 'axis': (1, 2)}, ValueError),
  'norm_before_gate must': ({'norm_before_gate': 1}, TypeError),
  'round_before_scale must': ({'round_before_scale': 'yes'}, TypeError),
  'scale_offset must be': ({'scale_offset': None}, TypeError),
  'no axis is left': ({'axis': ()}, ValueError),
  'scale of shape': ({'scale': jnp.ones(5)}, ValueError),
  'has no kernel': ({'implementation': 'triton'}, NotImplementedError),
}


@pytest.mark.parametrize(('words', 'row'), BAD.items(), ids=BAD)
def test_errors(words, row):
  """At trace time, with the argument's name."""
  options, error = row
  arrays = {'x': jnp.ones(SHAPE), 'gate': jnp.ones(SHAPE)} | options
  x, gate = arrays.pop('x'), arrays.pop('gate')
  with pytest.raises(error, match=words):
    jax.eval_shape(lambda: nk.gated_rms_norm(x, gate, **arrays))


NOT_ELEMENTWISE = {
  'sum': (jnp.sum, ValueError, r'shape \(\) of one of shape \(3, 4\)'),
  'rows': (lambda z: z[:, :1], ValueError, r'shape \(3, 1\) of one'),
  'more': (lambda z: z[None], ValueError, r'shape \(1, 3, 4\) of one'),
  'booleans': (lambda z: z > 0, TypeError, 'makes bool of float32'),
  'integers': (lambda z: z.astype(int), TypeError, r'makes int\d+ of float32'),
  'complex': (lambda z: z + 0j, TypeError, r'makes complex\d+ of float32'),
  'two': (lambda z: (z, z), TypeError, 'makes tuple'),
  'nothing': (lambda z: None, TypeError, 'makes NoneType'),
}


@pytest.mark.parametrize(
  ('activation', 'error', 'words'),
  NOT_ELEMENTWISE.values(),
  ids=NOT_ELEMENTWISE,
)
def test_activations_that_are_not_elementwise(activation, error, words):
  """The same error by XLA and by kernel, of a gate and after a sum."""
  x = jnp.ones((3, 4))
  norms = nk.gated_rms_norm, nk.add_rms_norm, nk.add_layer_norm
  for norm, name in itertools.product(norms, (None, 'xla', 'mosaic_gpu')):
    run = functools.partial(norm, activation=activation, implementation=name)
    with pytest.raises(error, match=f'activation .*{words}'):
      jax.eval_shape(run, x, x)


@pytest.mark.parametrize('change', [jax.jit, jax.grad, jax.vmap])
def test_activations_of_what_is_traced(change):
  """Of a parameter of its own an activation would have no derivative."""
  x = jnp.ones((3, 4))

  def norm(run, slope):
    return run(x, x, activation=lambda z: slope * z)

  for run in nk.gated_rms_norm, nk.add_rms_norm:
    with pytest.raises(TypeError, match='closes over an array'):
      jax.eval_shape(
        change(functools.partial(norm, run)),
        jnp.ones(3 if change is jax.vmap else ()),
      )


def test_activations_of_another_precision():
  """Rounded by itself, or real of complex numbers: these are elementwise."""
  x = jnp.linspace(-2, 2, 12).reshape(3, 4)

  def rounded(z):
    return jnp.tanh(z).astype(jnp.bfloat16)

  y = nk.gated_rms_norm(jnp.ones((3, 4)), x, activation=rounded, epsilon=0.0)
  np.testing.assert_allclose(y, np.tanh(x), rtol=1e-2)
  unit = np.asarray(nk.rms_norm(x))
  for activation, desired in (jnp.abs, abs(unit)), (jnp.square, -(unit**2)):
    y, _ = nk.add_rms_norm(1j * x, 0j * x, activation=activation)
    np.testing.assert_allclose(y, desired, rtol=1e-5)


class Deaf(nk.GatedRMSNorm):
  """Wrong: its gate has no gradient."""

  def apply(self, params, state, x, gate=None, **options):
    gate = None if gate is None else jax.lax.stop_gradient(gate)
    return super().apply(params, state, x, gate, **options)


@pytest.mark.second_tier
def test_check_norm_gives_a_gate():
  x = draw((4, 6))
  reference = family.gated_rms_norm()
  grows = {'gate': jnp.positive, 'normalizes': False}
  testing.check_norm(nk.GatedRMSNorm(), x, reference, **grows)
  testing.check_gradients(Deaf(), x)  # it is never given one
  with pytest.raises(AssertionError, match='Deaf, derivatives'):
    testing.check_norm(Deaf(), x, gate=jnp.sin)
