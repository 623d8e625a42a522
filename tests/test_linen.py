"""normkit.linen beside flax.linen, and any transform as a module."""

from cases import CASES, NORMS, draw, draw_mask
import chex
from flax import errors, linen as nn, serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import second_tier, thinned

import normkit as nk
from normkit import linen, testing

KEY = jax.random.key(0)
RANDOM = {
  'scale_init': nn.initializers.normal(),
  'bias_init': nn.initializers.normal(),
}
# The module's name, its options and the shape of x.
ROWS = {
  'batch': ('BatchNorm', {}, (8, 3)),
  'batch-random': ('BatchNorm', RANDOM, (4, 2, 3)),
  'batch-axis': ('BatchNorm', {'axis': 1, 'momentum': 0.5}, (4, 3, 5)),
  'batch-axes': ('BatchNorm', {'axis': (-1, 1), 'epsilon': 1e-3}, (6, 2, 2, 3)),
  'batch-plain': ('BatchNorm', {'use_scale': False, 'use_bias': False}, (8, 3)),
  'batch-float16': ('BatchNorm', {'dtype': jnp.float16}, (8, 3)),
  'layer': ('LayerNorm', {}, (4, 6)),
  'layer-random': ('LayerNorm', RANDOM, (4, 6)),
  'layer-axes': (
    'LayerNorm',
    {'reduction_axes': (1, -1), 'feature_axes': (1, 2), 'epsilon': 1e-3},
    (2, 3, 4),
  ),
  'layer-other-features': (
    'LayerNorm',
    {'reduction_axes': (1, 2), 'feature_axes': -1},
    (2, 3, 4),
  ),
  'layer-param-dtype': ('LayerNorm', {'param_dtype': jnp.bfloat16}, (4, 6)),
  'rms': ('RMSNorm', {}, (4, 6)),
  'rms-plain': ('RMSNorm', {'use_scale': False, 'reduction_axes': 0}, (6, 4)),
  'group': ('GroupNorm', {'num_groups': 3}, (2, 5, 6)),
  'group-size': ('GroupNorm', {'num_groups': None, 'group_size': 2}, (2, 5, 6)),
  'group-axes': (
    'GroupNorm',
    {'num_groups': 2, 'reduction_axes': (1, 3), **RANDOM},
    (2, 3, 2, 4),
  ),
  'instance': ('InstanceNorm', {}, (2, 5, 3)),
  'instance-axes': (
    'InstanceNorm',
    {'feature_axes': (1, -1), 'use_bias': False},
    (2, 2, 6, 3),
  ),
}
each_row = pytest.mark.parametrize(
  ('name', 'options', 'shape'), ROWS.values(), ids=ROWS
)
# Each module with a mask and without; each option with either.
SOME_MASKED = [
  (second_tier if index % 5 else pytest.param)(row, masked)
  for index, row in enumerate(ROWS)
  for masked in (
    (False, True)
    if row in ('batch', 'layer', 'rms', 'group', 'instance')
    else (index % 2 == 0,)
  )
]
each_case = pytest.mark.parametrize(
  'case',
  [
    (pytest.param if case in NORMS[::4] else second_tier)(case, id=case.name)
    for case in CASES
  ],
)


def pair(name, options):
  """Our module and Flax's."""
  return getattr(linen, name)(**options), getattr(nn, name)(**options)


def init(module, x, key=KEY, then=lambda tree: tree, **options):
  """The variables; compiled, they cost nothing that does not reach them."""
  if isinstance(module, (linen.BatchNorm, nn.BatchNorm)):
    options = {'use_running_average': False}
  return jax.jit(lambda x: then(module.init(key, x, **options)))(x)


def moved(variables):
  """Other variables of the same tree; variances stay positive."""
  return jax.tree.map(
    lambda v: v + abs(0.1 * draw(v.shape, v.dtype)), variables
  )


def run(module, variables, x, mask, train):
  """The gradients of a loss, the output and the updated statistics."""
  options = {'mask': mask, 'mutable': ['batch_stats'] if train else []}
  if isinstance(module, (linen.BatchNorm, nn.BatchNorm)):
    options['use_running_average'] = not train

  def loss(params, x):
    y, updates = module.apply({**variables, 'params': params}, x, **options)
    return jnp.sin(y.astype(jnp.float32)).sum(), (y, updates)

  gradients = jax.grad(loss, (0, 1), has_aux=True)
  return gradients(variables.get('params', {}), x)


def assert_same(actual, desired, tolerance=2e-5):
  chex.assert_trees_all_equal_shapes_and_dtypes(actual, desired)
  chex.assert_trees_all_close(actual, desired, rtol=tolerance, atol=tolerance)


@each_row
def test_same_variables(name, options, shape):
  """The tree, its dtypes, and what a random initializer draws."""
  ours, theirs = (init(m, draw(shape)) for m in pair(name, options))
  chex.assert_trees_all_equal_structs(ours, theirs)
  testing.assert_state_unchanged(ours, theirs)


@pytest.mark.parametrize(('row', 'masked'), SOME_MASKED)
def test_same_results(row, masked):
  """Outputs, updates and gradients, in training and not."""
  name, options, shape = ROWS[row]
  ours, theirs = pair(name, options)
  x = draw(shape)
  mask = np.random.default_rng(1).random(shape) < 0.8 if masked else None
  variables = init(theirs, x, then=moved)
  tolerance = 2e-3 if options.get('dtype') == jnp.float16 else 2e-5
  modes = (True, False) if name == 'BatchNorm' else (True,)

  @jax.jit
  def both(*args):
    return [[run(m, *args, train) for train in modes] for m in (ours, theirs)]

  assert_same(*both(variables, x, mask), tolerance)


@pytest.mark.parametrize(
  ('name', 'dtype'),
  thinned(
    ['BatchNorm', 'LayerNorm', 'RMSNorm', 'InstanceNorm'],
    [jnp.bfloat16, jnp.int32, jnp.complex64],
    every=3,
  ),
)
def test_same_dtypes(name, dtype):
  """The output is as wide as the parameters; integers become floats."""
  x = draw((2, 6, 3)).astype(dtype)
  ours, theirs = pair(name, {})
  variables = init(theirs, x)
  testing.assert_state_unchanged(init(ours, x), variables)
  options = {'mutable': ['batch_stats']}
  if name == 'BatchNorm':
    options['use_running_average'] = False
  both = jax.jit(
    lambda v, x: [m.apply(v, x, **options) for m in (ours, theirs)]
  )
  assert_same(*both(variables, x))


class Model(nn.Module):
  """A layer and each norm, of one library."""

  norms: object

  @nn.compact
  def __call__(self, x, train):
    x = nn.Dense(6)(x)
    x = self.norms.BatchNorm(use_running_average=not train)(x)
    x = self.norms.LayerNorm()(x)
    x = self.norms.RMSNorm()(x)
    x = self.norms.GroupNorm(num_groups=3)(x)
    return self.norms.InstanceNorm()(x)


@pytest.mark.parametrize(('saved', 'loaded'), [(linen, nn), (nn, linen)])
def test_checkpoints_load(saved, loaded):
  """Bytes that a model with one library's norms wrote, read by the other's."""
  x = draw((2, 5, 4))
  model, other = Model(saved), Model(loaded)
  variables = init(model, x, then=moved, train=True)
  template = init(other, x, jax.random.key(1), train=True)
  again = serialization.from_bytes(template, serialization.to_bytes(variables))
  testing.assert_state_unchanged(variables, jax.tree.map(jnp.asarray, again))
  apply = jax.jit(lambda m, v: m.apply(v, x, train=False), static_argnums=0)
  assert_same(apply(other, again), apply(model, variables))


@pytest.mark.parametrize('train', [True, False])
def test_same_pooling(train):
  """Over a mapped axis, which initialising ignores."""
  x = draw((4, 6, 3))
  options = {'axis_name': 'devices', 'use_running_average': not train}
  results = []
  for module in pair('BatchNorm', options):
    variables = moved(jax.jit(module.init)(KEY, x[0]))
    results.append(
      jax.jit(
        jax.vmap(
          lambda x, m=module, v=variables: m.apply(
            v, x, mutable=['batch_stats']
          ),
          axis_name='devices',
        )
      )(x)
    )
  assert_same(*results)


@pytest.mark.parametrize('module', [linen.BatchNorm, nn.BatchNorm])
def test_batch_norm_raises_what_flax_raises(module):
  x = draw((8, 3))
  for constructor, call in [(True, True), (False, True), (None, None)]:
    norm = module(use_running_average=constructor)
    with pytest.raises(ValueError, match='use_running_average'):
      norm.init(KEY, x, use_running_average=call)
  norm = module(use_running_average=False)
  variables = norm.init(KEY, x)
  with pytest.raises(errors.ModifyScopeVariableError):
    norm.apply(variables, x)


@pytest.mark.parametrize('module', [linen.BatchNorm, nn.BatchNorm])
def test_batch_norm_of_one_example(module):
  """Zeros, then the bias, while initialising and after."""
  norm = module(use_running_average=False, bias_init=nn.initializers.ones)
  y, variables = norm.init_with_output(KEY, jnp.ones((1, 3)))
  assert (y == 1).all()
  y, _ = norm.apply(variables, jnp.ones((1, 3)), mutable=['batch_stats'])
  assert (y == 1).all()


@each_case
def test_any_transform(case):
  """The variables are the transform's; applying the module applies it."""
  x, mask = draw(case.shape), draw_mask(case.shape)
  module = linen.Norm(case.transform)
  variables = init(module, x, train=True)
  params, state = case.transform.init(x)
  for collection, tree in ('params', params), ('batch_stats', state):
    fields = {k: v for k, v in tree._asdict().items() if v is not None}
    testing.assert_state_unchanged(variables.get(collection, {}), fields)

  @jax.jit
  def uses(variables, params, state, x, mask):
    found = []
    for train in (True, False):
      y, after = case.transform.apply(params, state, x, train=train, where=mask)
      desired = y, {'batch_stats': after._asdict()} if after else {}
      actual = module.apply(
        variables, x, train=train, mask=mask, mutable=['batch_stats']
      )
      found.append((actual, desired))
    return found

  for pair in uses(variables, params, state, x, mask):
    assert_same(*pair)


def test_any_transform_without_mutable():
  """Evaluation writes nothing; training does, and must be let."""
  module = linen.Norm(nk.BatchNorm())
  x = draw((8, 3))
  variables = module.init(KEY, x, train=False)
  assert module.apply(variables, x, train=False).shape == x.shape
  with pytest.raises(errors.ModifyScopeVariableError):
    module.apply(variables, x, train=True)
