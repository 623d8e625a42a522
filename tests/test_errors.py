"""Bad input: one row each, raised while tracing, with a message that helps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normkit as nk


def ones(shape, dtype=np.float32):
  """Of the table below: an array that costs no compilation."""
  return jax.device_put(np.ones(shape, dtype))


X = ones((4, 3, 6))
STATE = nk.BatchNormState(jnp.zeros(6), ones(6), jnp.zeros(6, jnp.int32))
FUNCTIONS = {
  'batch_norm': lambda x=X, *a, state=STATE, train=True, **k: nk.batch_norm(
    x, state, *a, train=train, **k
  ),
  'layer_norm': lambda x=X, *a, **k: nk.layer_norm(x, *a, **k),
  'gated_rms_norm': lambda x=X, *a, **k: nk.gated_rms_norm(
    x, jnp.ones_like(x) if isinstance(x, jax.Array) else X, *a, **k
  ),
  'rms_norm': lambda x=X, *a, **k: nk.rms_norm(x, *a, **k),
  'group_norm': lambda x=X, *a, num_groups=2, **k: nk.group_norm(
    x, *a, num_groups=num_groups, **k
  ),
  'instance_norm': lambda x=X, *a, **k: nk.instance_norm(x, *a, **k),
  'normalize': lambda x=X, *a, axis=-1, **k: nk.normalize(
    x, *a, axis=axis, **k
  ),
}

# What every norm refuses: arguments, the exception, what its message names.
COMMON = {
  'integer': (dict(x=ones((4, 3, 6), int)), TypeError, 'x must .*int32'),
  'boolean': (dict(x=ones((4, 3, 6), bool)), TypeError, 'x must .*bool'),
  'float8': (
    dict(x=ones((4, 3, 6), jnp.float8_e4m3fn)),
    TypeError,
    'x must have at least 16 bits',
  ),
  'list': (dict(x=[1.0, 2.0]), TypeError, 'x must be an array, got list'),
  'axis-high': (dict(axis=3), ValueError, 'axis=3 is out of range.*rank 3'),
  'axis-low': (dict(axis=-4), ValueError, 'axis=-4 is out of range'),
  'axis-twice': (dict(axis=(2, -1)), ValueError, 'names an axis twice'),
  'axis-float': (dict(axis=1.0), TypeError, 'axis must be an integer'),
  'axis-bool': (dict(axis=True), TypeError, 'axis must be an integer'),
  'scale-shape': (dict(scale=ones(5)), ValueError, r'scale .*\(5,\) fits'),
  'scale-rank': (
    dict(scale=ones((4, 2, 6))),
    ValueError,
    'scale .*does not broadcast',
  ),
  'where-dtype': (dict(where=ones(6)), TypeError, 'where must be boolean'),
  'where-shape': (
    dict(where=ones((5, 1, 1), bool)),
    ValueError,
    r'where of shape \(5, 1, 1\) does not broadcast',
  ),
  'where-larger': (
    dict(where=ones((2, 4, 3, 6), bool)),
    ValueError,
    'where .*does not broadcast',
  ),
  'epsilon-negative': (dict(epsilon=-1e-5), ValueError, 'epsilon .*-1e-05'),
  'epsilon-nan': (dict(epsilon=float('nan')), ValueError, 'epsilon .*nan'),
  'epsilon-inf': (dict(epsilon=float('inf')), ValueError, 'epsilon .*inf'),
  'epsilon-array': (dict(epsilon=ones(2)), TypeError, 'epsilon must'),
  'dtype-integer': (dict(dtype=jnp.int32), TypeError, 'dtype must .*int32'),
  'dtype-real': (
    dict(x=ones((4, 3, 6), jnp.complex64), dtype=jnp.float32),
    TypeError,
    'dtype=float32 cannot hold the complex|state.mean of dtype|x must be real',
  ),
  'implementation': (
    dict(implementation='cuda'),
    ValueError,
    "implementation must .*'cuda'",
  ),
  'implementation-absent': (
    dict(implementation='triton'),
    NotImplementedError,
    "implementation='triton'",
  ),
  'groups-alone': (
    dict(axis_index_groups=[[0, 1]]),
    ValueError,
    'axis_index_groups.* without axis_name',
  ),
}
EMPTY = ones((0, 0, 6))
SPECIFIC = {
  'batch_norm': {
    'empty': (dict(x=EMPTY), ValueError, 'no elements along the reduced axes'),
    'bias-shape': (dict(bias=ones(5)), ValueError, r'bias of shape \(5,\)'),
    'momentum-high': (dict(momentum=1.5), ValueError, 'momentum .*1.5'),
    'momentum-low': (dict(momentum=-0.1), ValueError, 'momentum .*-0.1'),
    'momentum-nan': (dict(momentum=float('nan')), ValueError, 'momentum .*nan'),
    'momentum-type': (dict(momentum='x'), TypeError, 'momentum must'),
    'debias-none': (
      dict(momentum=None, debias=True),
      ValueError,
      'debias=True needs a momentum below 1',
    ),
    'debias-one': (
      dict(momentum=1.0, debias=True),
      ValueError,
      'debias=True needs a momentum below 1',
    ),
    'one': (
      dict(x=ones((1, 1, 6))),
      ValueError,
      'train=True with one element a feature',
    ),
    'train-array': (dict(train=jnp.array(True)), TypeError, 'train must be'),
    'train-none': (dict(train=None), TypeError, 'train must be'),
    'state-shape': (
      dict(state=nk.BatchNormState(*(s[:5] for s in STATE))),
      ValueError,
      r'state.mean has shape \(5,\).*\(6,\)',
    ),
    'state-structure': (
      dict(state=nk.EmptyState()),
      ValueError,
      'state must be BatchNormState',
    ),
    'state-real': (
      dict(x=X.astype(jnp.complex64)),
      TypeError,
      'state.mean of dtype float32 cannot hold',
    ),
  },
  'layer_norm': {
    'empty': (
      dict(x=EMPTY, axis=(0, 1)),
      ValueError,
      'no elements along the reduced axes',
    ),
    'no-axis': (dict(axis=()), ValueError, 'no axis is left'),
  },
  'group_norm': {
    'groups': (dict(num_groups=4), ValueError, 'num_groups=4 .*6 channels'),
    'groups-zero': (dict(num_groups=0), ValueError, 'num_groups=0'),
    'groups-type': (dict(num_groups=2.0), TypeError, 'num_groups must'),
    'several-axes': (dict(axis=(1, 2)), ValueError, 'the one axis of the chan'),
    'batch-axis': (
      dict(batch_axis=-1),
      ValueError,
      'batch_axis=-1 and axis share',
    ),
    'empty': (dict(x=ones((2, 0, 6))), ValueError, 'no elements along'),
  },
  'instance_norm': {
    'no-space': (dict(x=ones((4, 6))), ValueError, 'no axis is left'),
    'batch-axis': (
      dict(batch_axis=2),
      ValueError,
      'batch_axis=2 and axis share',
    ),
    'empty': (dict(x=ones((2, 0, 6))), ValueError, 'no elements along'),
  },
}
ROWS = [
  pytest.param(FUNCTIONS[f], *row, id=f'{f}-{name}')
  for f in FUNCTIONS
  for name, row in (COMMON | SPECIFIC.get(f, {})).items()
]


@pytest.mark.parametrize(('function', 'arguments', 'error', 'message'), ROWS)
def test_raises(function, arguments, error, message):
  with pytest.raises(error, match=message):
    function(**arguments)


@pytest.mark.parametrize(
  ('make', 'error', 'message'),
  [
    (lambda: nk.BatchNorm(momentum=2), ValueError, 'momentum'),
    (lambda: nk.BatchNorm(epsilon=-1), ValueError, 'epsilon'),
    (lambda: nk.BatchNorm(momentum=None, debias=True), ValueError, 'debias'),
    (lambda: nk.LayerNorm(param_dtype=int), TypeError, 'param_dtype'),
    (lambda: nk.LayerNorm(dtype=int), TypeError, 'dtype'),
    (lambda: nk.LayerNorm(axis=[0.5]), TypeError, 'axis'),
    (lambda: nk.LayerNorm(12), TypeError, 'positional'),
    (lambda: nk.GroupNorm(), TypeError, 'num_groups'),
    (lambda: nk.LayerNorm().init(ones((2, 3), int)), TypeError, 'x must'),
    (lambda: nk.LayerNorm(axis=2).init(ones((2, 3))), ValueError, 'axis=2'),
    (
      lambda: nk.GroupNorm(num_groups=2).init(ones((2, 3))),
      ValueError,
      'num_groups=2',
    ),
  ],
)
def test_transform_raises(make, error, message):
  with pytest.raises(error, match=message):
    make()


def test_raises_while_tracing():
  """The message comes before anything runs: shapes are enough."""
  shape = jax.ShapeDtypeStruct((4, 0), jnp.float32)
  with pytest.raises(ValueError, match='no elements'):
    jax.eval_shape(nk.layer_norm, shape)


def test_no_examples_are_no_error_where_none_is_needed():
  """Each example is normalized by itself: of none there are no outputs."""
  x = ones((0, 3, 6))
  assert nk.group_norm(x, num_groups=2).shape == x.shape
  assert nk.instance_norm(x).shape == nk.layer_norm(x).shape == x.shape


def test_train_must_be_given():
  with pytest.raises(TypeError, match='train'):
    nk.batch_norm(X, STATE)
  bn = nk.BatchNorm()
  with pytest.raises(TypeError, match='train'):
    bn.apply(*bn.init(X), X)


def test_wrong_params_or_state():
  params, state = nk.LayerNorm().init(X)
  with pytest.raises(ValueError, match='params must be NormParams'):
    nk.LayerNorm(use_bias=False).apply(params, state, X, train=True)
  with pytest.raises(ValueError, match='params must be NormParams'):
    nk.LayerNorm().apply((None, None), state, X, train=True)
  with pytest.raises(ValueError, match='state must be EmptyState'):
    nk.LayerNorm().apply(params, STATE, X, train=True)


def test_one_value_over_all_devices():
  """One element on each of several devices is a batch; masks do not count."""
  x = X[:, :1, 0]
  state = nk.BatchNormState(jnp.zeros(1), ones(1), jnp.zeros(1, jnp.int32))

  def apply(x, where=None, **options):
    return nk.batch_norm(x[None], state, train=True, where=where, **options)

  jax.vmap(lambda x: apply(x, axis_name='b'), axis_name='b')(x)
  with pytest.raises(ValueError, match='one element a feature'):
    groups = [[0], [1, 2, 3]]
    jax.vmap(
      lambda x: apply(x, axis_name='b', axis_index_groups=groups),
      axis_name='b',
    )(x)
  mask = jnp.array([[True], [False], [False], [False]])
  y, new = nk.batch_norm(x, state, train=True, where=mask)
  assert not y[0].any()
  assert new.count == 1


def test_one_place_over_all_devices():
  """One element on each of several devices is a set; alone it is none."""
  x = jnp.sin(jnp.arange(72.0)).reshape(X.shape)
  pooled = jax.vmap(
    lambda x: nk.instance_norm(x, axis_name='b'), axis_name='b'
  )(x)
  whole = nk.instance_norm(x.transpose(1, 0, 2)).transpose(1, 0, 2)
  np.testing.assert_allclose(pooled, whole, rtol=1e-5)
  x = jnp.array([1.0, 3.0])
  pooled = jax.vmap(
    lambda x: nk.normalize(x, axis=(), epsilon=0.0, axis_name='b'),
    axis_name='b',
  )(x)
  assert pooled.tolist() == [-1, 1]


@pytest.mark.parametrize(
  'groups', [[[0, 1]], [[0, 1], [1, 2, 3]], [[0, 1], [2, 4]], [[0, 1, 2, 3, 4]]]
)
def test_groups_must_be_a_partition(groups):
  with pytest.raises(ValueError, match='not a partition of the 4 indices'):
    jax.vmap(
      lambda x: nk.layer_norm(x, axis_name='b', axis_index_groups=groups),
      axis_name='b',
    )(X)
