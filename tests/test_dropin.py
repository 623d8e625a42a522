"""normkit's Flax modules in place of Flax's: random uses, and what they miss.

`benchmarks.dropin` draws the uses and judges them; here it judges some, and is
itself shown to fail. The rest is what a draw does not reach: lifted transforms,
scopes and their errors, metadata, checkpoints, and the fields Flax lacks.
"""

import dataclasses
import functools
import itertools
import pathlib
import types
from typing import Any

import chex
from flax import errors, linen as nn, serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import reference
from tiers import second_tier

from benchmarks import dropin
from benchmarks.draws import AXIS_NAME, NORMS, Case, draw
from benchmarks.rules import RULES
import normkit as nk
from normkit import linen

KEY = jax.random.key(0)
# Of each norm, then of each module others, among which each option and dtype
# occurs; `python -m benchmarks dropin` compares more.
MODULES = list(itertools.product(dropin.FAMILIES, NORMS))
USES = [
  *((*module, 2, 2) for module in MODULES[::2]),
  *(second_tier(*module, 5, 3) for module in MODULES),
]


@pytest.mark.parametrize(('family', 'norm', 'uses', 'seed'), USES)
def test_random_uses(family, norm, uses, seed):
  count = dropin.measure(family, norm, uses, seed)
  assert not count.unexplained, '\n'.join(count.unexplained)
  assert count.compared
  assert count.equal or uses < 4


def use(norm, shape=(4, 6), mask=None, family='linen', **options):
  """A case of our own; `x`, `flag`, `mapped` and `stored` are its fields."""
  rng = np.random.default_rng(0)
  x = options.pop('x', 1 + 2 * rng.standard_normal(shape, np.float32))
  names = {field.name for field in dataclasses.fields(Case)} & {*options}
  fields = {name: options.pop(name) for name in names}
  dy = rng.standard_normal(x.shape)
  return Case(family, norm, options, x, mask, dy, **fields)


def normal(*shape, dtype=np.float32, offset=0.0):
  return np.asarray(offset + np.random.default_rng(1).normal(size=shape), dtype)


FAR = normal(4, 6, offset=300)
STRAY = np.where(np.eye(4, 6, dtype=bool), np.nan, normal(4, 6))
COMPLEX = normal(4, 6) + 1j * normal(4, 6)[::-1]
HALF = normal(4, 6, dtype=jnp.bfloat16, offset=3)
UNEQUAL = np.arange(24).reshape(2, 3, 4) < 16
PAIR = {'axis_name': AXIS_NAME, 'mapped': True}
GROUPS = {'num_groups': 2}
NNX = {'family': 'nnx'}
# One use or more that needs each rule.
EXAMPLES = {
  'a set without elements is defined': [
    use('LayerNorm', mask=np.zeros((4, 6), bool)),
    use('BatchNorm', (0, 6)),
  ],
  'masked values do not leak': [
    use('BatchNorm', x=STRAY.astype(np.float32), mask=np.isfinite(STRAY)),
  ],
  'no variance and no epsilon is defined': [
    use('RMSNorm', x=np.zeros((4, 6), np.float32), epsilon=0.0),
  ],
  'devices are pooled by count': [
    use('BatchNorm', (2, 3, 4), mask=UNEQUAL, **PAIR),
    use('BatchNorm', (2, 3, 4), mask=UNEQUAL, **PAIR, **NNX),
  ],
  'exact statistics': [
    use('LayerNorm', x=FAR),
    use('BatchNorm', x=FAR, use_fast_variance=False),
  ],
  'stored statistics are widened first': [
    use('BatchNorm', x=normal(4, 6, dtype=np.float64)),
  ],
  'statistics are never narrower than float32': [
    use('LayerNorm', x=HALF, force_float32_reductions=False),
    use(
      'BatchNorm',
      x=HALF,
      force_float32_reductions=False,
      param_dtype=jnp.bfloat16,
      stored=jnp.float32,
    ),
  ],
  'the variance is real': [
    use('BatchNorm', x=COMPLEX.reshape(2, 2, 6), **PAIR),
  ],
  'nnx rounds only the result': [
    use('LayerNorm', dtype=jnp.float16, **NNX),
    use('BatchNorm', dtype=jnp.bfloat16, **NNX),
  ],
  'nnx groups are channels': [
    use('GroupNorm', (2, 3, 6), reduction_axes=-1, **GROUPS, **NNX),
    use('GroupNorm', (3, 3, 3, 6), reduction_axes=(1, 3), **GROUPS, **NNX),
  ],
  'nnx groups hold the channels': [
    use('GroupNorm', (2, 3, 6), reduction_axes=1, **GROUPS, **NNX),
  ],
  'nnx batch norm keeps several axes': [
    use('BatchNorm', (3, 2, 4), axis=(1, -1), **NNX),
  ],
  'nnx counts parameters without elements': [
    use('LayerNorm', x=HALF[:0], reduction_axes=-1, feature_axes=0, **NNX),
  ],
  'masks broadcast': [
    use('GroupNorm', mask=np.ones((4, 1), bool), **GROUPS),
    use('GroupNorm', mask=np.ones((4, 1), bool), **GROUPS, **NNX),
  ],
  'axes beyond the rank raise': [
    use('BatchNorm', axis=-3),
    use('LayerNorm', reduction_axes=-3),
  ],
  'epsilon and momentum are checked': [
    use('LayerNorm', epsilon=12),
    use('RMSNorm', epsilon=-1.0),
    use('BatchNorm', momentum=1.5),
  ],
  'masks are checked': [
    use('BatchNorm', mask=np.ones((4, 7), bool)),
    use('BatchNorm', mask=np.ones((4, 6), int), **NNX),
  ],
  'complex input needs a complex dtype': [
    use('LayerNorm', x=COMPLEX.astype(np.complex64), dtype=jnp.float32),
    use('RMSNorm', x=COMPLEX.astype(np.complex64), dtype=jnp.float32, **NNX),
  ],
  'groups work under vmap': [
    use('LayerNorm', (2, 3, 4), axis_index_groups=[[0, 1]], **PAIR),
    use('BatchNorm', (2, 3, 4), axis_index_groups=[[0], [1]], **PAIR),
  ],
  'groups need an axis name': [
    use('BatchNorm', axis_index_groups=[[0, 1]]),
  ],
  'an accident is a ValueError': [
    use('BatchNorm', axis=2),
    use('LayerNorm', feature_axes=(0, 2)),
    use('GroupNorm', num_groups=None, group_size=0),
  ],
}
# Rules whose examples take a second each.
WAITING = 'stored statistics are widened first', 'the variance is real'
ROWS = [
  (second_tier if index or rule in WAITING else pytest.param)(
    rule, case, id=f'{rule}-{case.norm}-{index}'
  )
  for rule, cases in EXAMPLES.items()
  for index, case in enumerate(cases)
]


@pytest.mark.parametrize(
  'case',
  [
    (second_tier if family else pytest.param)(
      use(*row, **options, **family),
      id=f'{family.get("family", "linen")}-{row}',
    )
    for family in ({}, NNX)
    for *row, options in (
      ('InstanceNorm', {}),
      ('LayerNorm', {'reduction_axes': ()}),
      ('RMSNorm', {'reduction_axes': ()}),
      ('RMSNorm', (0, 6), {'reduction_axes': 0}),
      ('LayerNorm', (3, 0), {}),
      ('GroupNorm', (2, 0, 6), GROUPS),
      ('InstanceNorm', (2, 0, 6), {}),
    )
  ],
)
def test_nothing_to_normalize_over(case):
  """Zeros, then the bias, as in Flax."""
  verdict = dropin.compare(case)
  assert not verdict.problems
  assert verdict.rules <= {'a set without elements is defined'}


def test_every_rule_has_an_example():
  assert EXAMPLES.keys() == {rule.name for rule in RULES}


@pytest.mark.parametrize(('rule', 'case'), ROWS)
def test_rules(rule, case):
  """The rule is what explains the use: without it, it is unexplained."""
  verdict = dropin.compare(case)
  assert not verdict.problems
  assert rule in verdict.rules
  assert verdict.rules <= {
    rule,
    dropin.SAME_ERROR,
    'an accident is a ValueError',
  }


def instead(norm, **options):
  """A package whose one norm has other options than it is given."""

  def module(*args, **given):
    return getattr(linen, norm)(*args, **given | options)

  return types.SimpleNamespace(**{norm: module})


class Straight(linen.LayerNorm):
  """Layer norm without a gradient through its statistics."""

  def __call__(self, x, *, mask=None):
    y = super().__call__(x, mask=mask)
    return x + jax.lax.stop_gradient(y - x)


class Careless(linen.LayerNorm):
  """Layer norm that raises where Flax raises, but by accident."""

  def __call__(self, x, *, mask=None):
    return super().__call__(x, mask=mask) + x.sum() / {}['no such key']


WRONG = {
  'value': ('LayerNorm', instead('LayerNorm', epsilon=1e-3), 'train: y'),
  'statistics': ('BatchNorm', instead('BatchNorm', momentum=0.9), 'mean'),
  'dtype': ('RMSNorm', instead('RMSNorm', dtype=jnp.float16), 'float16'),
  'parameters': ('LayerNorm', instead('LayerNorm', use_bias=False), 'bias'),
  'gradient': ('LayerNorm', types.SimpleNamespace(LayerNorm=Straight), 'dx'),
  'initial values': (
    'LayerNorm',
    instead('LayerNorm', scale_init=nn.initializers.uniform()),
    'other values',
  ),
  'error': (
    'LayerNorm',
    types.SimpleNamespace(LayerNorm=Careless),
    'KeyError',
  ),
  'no error': ('BatchNorm', instead('BatchNorm', axis=0), 'no error'),
}


@pytest.mark.parametrize(
  ('norm', 'package', 'told'),
  [
    (second_tier if index % 2 else pytest.param)(*row, id=name)
    for index, (name, row) in enumerate(WRONG.items())
  ],
)
def test_the_driver_can_fail(norm, package, told):
  options = {'axis': 2} if told == 'no error' else {}
  verdict = dropin.compare(use(norm, **options), package)
  assert any(told in problem for problem in verdict.problems), verdict


def test_draws_repeat():
  first, again = (draw('linen', 'BatchNorm', 3, 1) for _ in range(2))
  chex.assert_trees_all_equal(first.x, again.x)
  assert str(first) == str(again) != str(draw('linen', 'BatchNorm', 3, 2))


@pytest.mark.second_tier
def test_command(capsys, tmp_path):
  """Prints both tables, puts them in a document, exits with 0."""
  page = tmp_path / 'page.md'
  page.write_text(
    '<!-- dropin -->\n<!-- /dropin -->\n<!-- rules -->\n<!-- /rules -->\n'
  )
  arguments = types.SimpleNamespace(
    count=1, seed=0, family=['linen'], update=[page]
  )
  assert dropin.run(arguments) == 0
  assert 'nothing is unexplained' in capsys.readouterr().out
  assert '| linen.BatchNorm | 1 |' in page.read_text()
  assert all(f'| {rule.name} |' in page.read_text() for rule in RULES)


def test_docs_give_a_reason_for_each_rule():
  page = pathlib.Path(__file__).parents[1] / 'docs' / 'flax.md'
  reasons = page.read_text().split('<!-- dropin -->')[0].lower()
  for rule in RULES:
    assert f'- **{rule.name.lower()}.** ' in reasons.replace('\n', ' '), rule


# Lifted transforms and the like: each must give the same with either library.


def given(*shape, **options):
  """Numbers with which nothing is computed before the program runs."""
  return jax.lax.optimization_barrier(normal(*shape, **options))


class Block(nn.Module):
  """A layer and two norms, one with statistics."""

  layers: Any

  @nn.compact
  def __call__(self, x, step=None):
    x = nn.Dense(6)(x if step is None else x + step)
    x = self.layers.BatchNorm(use_running_average=False, momentum=0.5)(x)
    return nn.tanh(self.layers.GroupNorm(num_groups=2)(x)), None


def scan_layers(layers):
  stack = nn.scan(
    Block,
    variable_axes={'params': 0, 'batch_stats': 0},
    split_rngs={'params': True},
    length=3,
  )(layers)
  return trained(stack, given(4, 6))


def scan_steps(layers):
  """Over time: the statistics are carried from step to step."""
  steps = nn.scan(
    Block,
    variable_broadcast='params',
    variable_carry='batch_stats',
    split_rngs={'params': False},
  )
  x = given(3, 4, 6)
  variables = jax.jit(Block(layers).init)(KEY, x[0])
  apply = functools.partial(steps(layers).apply, mutable=['batch_stats'])
  return jax.jit(apply)(variables, x[0], x)


def remat(layers):
  return trained(nn.remat(Block)(layers), given(4, 6))


def vmap_devices(layers):
  norm = nn.vmap(
    layers.BatchNorm,
    variable_axes={'params': None, 'batch_stats': 0},
    split_rngs={'params': False},
    axis_name='devices',
  )
  return trained(
    norm(use_running_average=False, axis_name='devices'), given(3, 4, 6)
  )


def vmap_members(layers):
  """An ensemble: parameters and statistics of its own for each member."""
  members = nn.vmap(
    Block,
    variable_axes={'params': 0, 'batch_stats': 0},
    split_rngs={'params': True},
  )
  return trained(members(layers), given(3, 4, 6))


def batch_apply(layers):
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.BatchApply(layers.InstanceNorm())(x), None

  return trained(Model(), given(2, 3, 4, 6))


def jitted(layers):
  return trained(nn.jit(Block)(layers), given(4, 6))


def map_variables(layers):
  """Parameters stored under another form."""

  def times(factor):
    return lambda tree: jax.tree.map(lambda v: v * factor, tree)

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      norm = nn.map_variables(
        layers.LayerNorm,
        'params',
        times(2),
        times(0.5),
        init=self.is_initializing(),
      )
      return norm()(x), None

  return trained(Model(), given(4, 6))


def setup_names(layers):
  class Model(nn.Module):
    def setup(self):
      self.first = layers.LayerNorm()
      self.others = [layers.RMSNorm(), layers.InstanceNorm(name=None)]

    def __call__(self, x):
      x = self.first(x)
      for other in self.others:
        x = other(x)
      return x

  return Model().init_with_output(KEY, given(2, 3, 4))


def automatic_names(layers):
  """Names and keys: `scale` draws before `bias`."""
  draws = {
    'scale_init': nn.initializers.normal(),
    'bias_init': nn.initializers.normal(),
  }

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      for norm in NORMS:
        x = module_of(layers, norm)(x)
      x = layers.LayerNorm(**draws)(x)
      return nn.Dense(2)(layers.BatchNorm(False, **draws)(x))

  return Model().init_with_output(KEY, given(2, 3, 4))


def sequential(layers):
  return trained(nn.Sequential([nn.Dense(6), layers.LayerNorm()]), given(4, 6))


def captured(layers):
  x = given(4, 6)
  model = Block(layers)
  apply = functools.partial(
    model.apply,
    capture_intermediates=True,
    mutable=['intermediates', 'batch_stats'],
  )
  return jax.jit(apply)(jax.jit(model.init)(KEY, x), x)


def forward_mode(layers):
  x = given(4, 6)
  norm = layers.LayerNorm()
  variables = norm.init(KEY, x)
  return jax.jvp(lambda x: norm.apply(variables, x), (x,), (x[::-1],))


def hessian(layers):
  x = given(3, 2)
  norm = layers.BatchNorm(use_running_average=False)
  variables = norm.init(KEY, x)

  def loss(x):
    y, _ = norm.apply(variables, x, mutable=['batch_stats'])
    return jnp.sum(y**3)

  return jax.jit(jax.hessian(loss))(x)


def shapes(layers):
  """Nothing is computed, and nothing but shapes asked of the input."""
  x = jax.ShapeDtypeStruct((4, 6), jnp.bfloat16)
  return jax.eval_shape(Block(layers).init, KEY, x)


def lazy_statistics(layers):
  """Without statistics in the variables, a mutable call makes them."""
  x = given(4, 6)
  norm = layers.BatchNorm(use_running_average=False, use_bias=False)
  params = {'params': {'scale': jnp.ones(6)}}
  return norm.apply(params, x, mutable=['batch_stats'])


def bound(layers):
  x = given(4, 6)
  norm = layers.BatchNorm(momentum=0.5)
  variables = norm.init(KEY, x, use_running_average=False)
  return norm.bind(variables)(x, True), norm.bind(variables)(
    x, use_running_average=True, mask=x > 0
  )


def initial_averages(layers):
  """Initialising: statistics as they start, the output by either kind."""
  x = given(4, 6, offset=2)
  return [
    layers.BatchNorm(use_running_average=flag).init_with_output(KEY, x)
    for flag in (False, True)
  ]


def ignored_name(layers):
  """BatchNorm does not need its axis to initialise, nor to evaluate."""
  x = given(4, 6)
  norm = layers.BatchNorm(axis_name='devices', axis_index_groups=[[0]])
  variables = norm.init(KEY, x, use_running_average=False)
  return variables, norm.apply(variables, x, use_running_average=True)


def partitioned(layers):
  """Metadata of the parameters: kept when made, and taken when applied."""
  x = given(4, 6)
  norm = layers.LayerNorm(
    scale_init=nn.with_partitioning(nn.initializers.ones, ('model',)),
    bias_init=nn.with_logical_partitioning(nn.initializers.ones, ('embed',)),
  )
  variables = norm.init(KEY, x)
  assert isinstance(variables['params']['scale'], nn.Partitioned)
  assert isinstance(variables['params']['bias'], nn.LogicallyPartitioned)
  specs = nn.get_partition_spec(variables)['params']
  assert [*specs['scale'], *specs['bias']] == ['model', 'embed']
  return variables, norm.apply(variables, x), norm.apply(nn.unbox(variables), x)


def over_a_mesh(layers):
  """A batch whose examples lie on four devices."""
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((4,), ('data',), auto, devices=jax.devices()[:4])
  spread = jax.NamedSharding(mesh, jax.P('data'))
  return trained(Block(layers), jax.device_put(normal(8, 6, offset=1), spread))


def trained(model, x):
  """Variables, and of one training call output, updates and gradients."""
  variables = jax.tree.map(lambda v: v + 0.1, jax.jit(model.init)(KEY, x))

  def loss(params, x):
    out, updates = model.apply(
      {**variables, 'params': params}, x, mutable=['batch_stats']
    )
    y = out[0] if isinstance(out, tuple) else out
    return jnp.sum(jnp.sin(y)), (out, updates)

  run = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
  return variables, run(variables['params'], x)


SAME = (
  scan_layers,
  scan_steps,
  remat,
  vmap_devices,
  vmap_members,
  batch_apply,
  jitted,
  map_variables,
  setup_names,
  automatic_names,
  sequential,
  captured,
  forward_mode,
  hessian,
  shapes,
  lazy_statistics,
  bound,
  initial_averages,
  ignored_name,
  partitioned,
  over_a_mesh,
)


def assert_near(actual, desired):
  """To the rounding of E[x^2] - E[x]^2, in units of the largest element."""
  size = max(1, np.abs(desired).max())
  np.testing.assert_allclose(actual / size, desired / size, atol=1e-4)


FIRST_SAME = jitted, shapes, bound, ignored_name
EAGER = shapes, over_a_mesh


@pytest.mark.parametrize(
  'function',
  [
    (pytest.param if f in FIRST_SAME else second_tier)(f, id=f.__name__)
    for f in SAME
  ],
)
def test_same_under(function):
  """In one program, in which what both have alike is compiled once."""

  def run():
    return function(linen), function(nn)

  ours, theirs = (run if function in EAGER else jax.jit(run))()
  chex.assert_trees_all_equal_structs(ours, theirs)
  chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
  if function is not shapes:
    jax.tree.map(assert_near, ours, theirs)


def test_tabulate():
  """The same summary, word for word."""
  ours, theirs = (
    Block(layers).tabulate(KEY, normal(4, 6), console_kwargs={'width': 120})
    for layers in (linen, nn)
  )
  plain = [text.replace(str(linen), str(nn)) for text in (ours, theirs)]
  assert plain[0] == plain[1]
  assert 'BatchNorm_0' in ours
  assert 'GroupNorm_0' in ours


def both(function):
  """Runs a test on Flax's layers, which must pass it, and on ours."""
  return pytest.mark.parametrize(
    'layers', [nn, linen], ids=['flax', 'normkit']
  )(function)


@both
@pytest.mark.parametrize(
  ('constructor', 'call'), [(None, None), (True, True), (False, True)]
)
def test_flag_once(layers, constructor, call):
  norm = layers.BatchNorm(use_running_average=constructor)
  with pytest.raises(ValueError, match='use_running_average'):
    norm.init(KEY, normal(4, 6), use_running_average=call)


@both
def test_training_must_be_mutable(layers):
  norm = layers.BatchNorm(use_running_average=False)
  variables = norm.init(KEY, normal(4, 6))
  with pytest.raises(errors.ModifyScopeVariableError):
    norm.apply(variables, normal(4, 6))


@both
@pytest.mark.parametrize('flag', [True, False])
def test_statistics_must_be_there(layers, flag):
  norm = layers.BatchNorm(use_running_average=flag)
  params = {'params': norm.init(KEY, normal(4, 6))['params']}
  with pytest.raises(errors.ScopeCollectionNotFound):
    norm.apply(params, normal(4, 6))


def module_of(layers, norm, **options):
  """A norm with what it cannot do without."""
  if norm == 'BatchNorm':
    options.setdefault('use_running_average', False)
  if norm == 'GroupNorm':
    options.setdefault('num_groups', 2)
  return getattr(layers, norm)(**options)


@both
@pytest.mark.parametrize('norm', NORMS)
def test_another_width(layers, norm):
  """Flax's batch norm alone fails before it comes to its parameters."""
  module = module_of(layers, norm)
  variables = jax.eval_shape(module.init, KEY, normal(2, 4, 6))
  accident = (layers, norm) == (nn, 'BatchNorm')
  error = TypeError if accident else errors.ScopeParamShapeError
  with pytest.raises(error):
    apply = functools.partial(module.apply, mutable=['batch_stats'])
    jax.eval_shape(apply, variables, normal(2, 4, 8))


@both
@pytest.mark.parametrize('norm', NORMS)
def test_unbound_axis(layers, norm):
  """Batch norm alone may initialise without the axis; none may train so."""
  module = module_of(layers, norm, axis_name='devices')
  x = normal(2, 4, 6)
  with pytest.raises(NameError, match='devices'):
    variables = jax.eval_shape(module.init, KEY, x)
    assert norm == 'BatchNorm'
    apply = functools.partial(module.apply, mutable=['batch_stats'])
    jax.eval_shape(apply, variables, x)


REFUSED = [
  *((norm, {'dtype': jnp.int32}) for norm in NORMS),
  ('GroupNorm', {'num_groups': None}),
  ('GroupNorm', {'group_size': 2}),
  ('GroupNorm', {'num_groups': 4}),
  ('GroupNorm', {'num_groups': 0}),
  ('GroupNorm', {'num_groups': None, 'group_size': 4}),
  ('GroupNorm', {'reduction_axes': 1}),
  ('GroupNorm', {'reduction_axes': (0, 1)}),
  ('InstanceNorm', {'feature_axes': 0}),
  ('InstanceNorm', {'feature_axes': (-1, -3)}),
]


@both
@pytest.mark.parametrize(('norm', 'options'), REFUSED)
def test_refused(layers, norm, options):
  """At the call and not before, as a model is made before it is used."""
  module = module_of(layers, norm, **options)
  with pytest.raises(ValueError, match=r'group|ax|type'):
    module.init(KEY, normal(2, 4, 6))


@pytest.mark.parametrize('norm', NORMS)
def test_fields(norm):
  """Flax's fields in their order, by position; ours after, by name alone."""
  theirs, ours = (
    [
      field
      for field in dataclasses.fields(getattr(layers, norm))
      if field.name not in ('parent', 'name')
    ]
    for layers in (nn, linen)
  )
  by_position = [field.name for field in ours if not field.kw_only]
  assert by_position == [field.name for field in theirs]
  defaults = {f.name: f.default for f in ours}
  for field in theirs:
    if 'init' not in field.name:
      assert defaults[field.name] == field.default, field.name
  given = [f.default for f in theirs]
  assert getattr(linen, norm)(*given)
  with pytest.raises((TypeError, ValueError), match=r'positional|parent'):
    getattr(linen, norm)(*given, True)


def test_a_width_is_no_epsilon():
  """As people write who come from PyTorch; a large epsilon may be meant."""
  for norm in ('LayerNorm', 'RMSNorm', 'InstanceNorm'):
    with pytest.raises(ValueError, match='epsilon=12'):
      getattr(linen, norm)(12)
    assert getattr(linen, norm)(12.0).epsilon == 12


# Checkpoints: training goes on with the other library.


class ConvNet(nn.Module):
  """A small convolutional network."""

  layers: Any

  @nn.compact
  def __call__(self, x, train):
    x = nn.Conv(8, (3, 3), use_bias=False)(x)
    x = self.layers.BatchNorm(use_running_average=not train, momentum=0.9)(x)
    x = nn.Conv(8, (3, 3), strides=2)(nn.relu(x))
    x = nn.relu(self.layers.GroupNorm(num_groups=4)(x))
    x = self.layers.InstanceNorm()(nn.Conv(4, (3, 3))(x))
    return nn.Dense(3)(x.reshape(len(x), -1))


class Transformer(nn.Module):
  """A transformer block, normalized before each part and after the last."""

  layers: Any

  @nn.compact
  def __call__(self, x, train):
    del train
    y = self.layers.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, y)
    y = self.layers.RMSNorm(dtype=jnp.float32)(x)
    x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(y)))
    return nn.Dense(3)(self.layers.LayerNorm(use_bias=False)(x).mean(1))


MODELS = {
  'cnn': (ConvNet, (16, 8, 8, 1)),
  'transformer': (Transformer, (16, 5, 8)),
}
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


@functools.partial(jax.jit, static_argnums=(0, 3))
def train(model, state, x, steps):
  """Some steps of training; returns the state after, and the losses."""
  labels = jnp.arange(len(x)) % 3

  def loss(params, stats):
    logits, updates = model.apply(
      {'params': params, **stats}, x, train=True, mutable=['batch_stats']
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), updates

  def step(state, _):
    params, stats, optimizer = state
    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(
      params, stats
    )
    moves, optimizer = OPTIMIZER.update(grads, optimizer)
    return (optax.apply_updates(params, moves), stats, optimizer), value

  return jax.lax.scan(step, state, length=steps)


@functools.partial(jax.jit, static_argnums=0)
def initialize(model, key, x):
  return model.init(key, x, train=True)


def begin(model, x, key=KEY):
  variables = dict(initialize(model, key, x))
  params = variables.pop('params')
  return params, variables, OPTIMIZER.init(params)


def by_bytes(state, template, path):
  del path
  return serialization.from_bytes(template, serialization.to_bytes(state))


def by_orbax(state, template, path):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path / 'checkpoint', state)
    checkpointer.wait_until_finished()
    return checkpointer.restore(path / 'checkpoint', template)


LIBRARIES = {'flax': nn, 'normkit': linen}
# Each model in both directions, and with both stores.
MOVES = [
  pytest.param(model, library, store, id=f'{model}-from_{library}')
  for model, stores in (
    ('cnn', (by_bytes, by_orbax)),
    ('transformer', (by_orbax, by_bytes)),
  )
  for library, store in zip(LIBRARIES, stores, strict=True)
]


@pytest.mark.second_tier  # `test_linen.py` loads checkpoints in the first
@pytest.mark.parametrize(('model', 'library', 'store'), MOVES)
def test_training_goes_on(model, library, store, tmp_path):
  """From a checkpoint of one library's layers, with the other's."""
  make, shape = MODELS[model]
  x = normal(*shape)
  (other,) = (layers for name, layers in LIBRARIES.items() if name != library)
  before, after = make(LIBRARIES[library]), make(other)
  state, early = train(before, begin(before, x), x, 4)
  template = begin(after, x, jax.random.key(1))
  loaded = store(state, template, tmp_path)
  chex.assert_trees_all_equal(loaded, state)
  (_, stayed), (_, went_on) = (
    train(before, state, x, 4),
    train(after, loaded, x, 4),
  )
  assert stayed[-1] < early[0]
  np.testing.assert_allclose(went_on, stayed, rtol=2e-5)


# The fields that Flax lacks.


AVERAGES = {
  'debias': {'momentum': 0.9, 'debias': True},
  'cumulative': {'momentum': None},
  'unbiased': {'momentum': 0.5, 'unbiased': True},
  'virtual': {'momentum': 0.5, 'virtual_batch_size': 2},
}


@pytest.mark.parametrize('options', AVERAGES.values(), ids=AVERAGES)
def test_averages(options):
  """Several steps, against the float64 reference; `count` only if needed."""
  norm = linen.BatchNorm(use_running_average=False, **options)
  desired = reference.batch_norm(**options)
  stats = jax.jit(norm.init)(KEY, normal(4, 3))['batch_stats']
  apply = jax.jit(functools.partial(norm.apply, mutable=['batch_stats']))
  counts = options['momentum'] is None or 'debias' in options
  assert ('count' in stats) == counts
  state = nk.BatchNormState(np.zeros(3), np.ones(3), np.zeros(3, int))
  params = nk.NormParams(np.ones(3), np.zeros(3))
  for step in range(3):
    x = normal(4, 3, offset=step)
    variables = {'params': params._asdict(), 'batch_stats': stats}
    y, updates = apply(variables, x)
    stats = updates['batch_stats']
    desired_y, state = desired(params, state, x, True)
    np.testing.assert_allclose(y, desired_y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats['mean'], state.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats['var'], state.var, rtol=1e-5)
    if counts:
      assert stats['count'].tolist() == [step + 1] * 3


@pytest.mark.parametrize('skip', [True, False])
def test_skip_nonfinite(skip):
  norm = linen.BatchNorm(use_running_average=False, skip_nonfinite=skip)
  x = normal(4, 3)
  variables = norm.init(KEY, x)
  x[0, 1] = np.inf
  _, updates = norm.apply(variables, x, mutable=['batch_stats'])
  finite = np.isfinite(updates['batch_stats']['mean'])
  assert finite.tolist() == [True, skip, True]
  if skip:
    assert updates['batch_stats']['mean'][1] == 0
    assert updates['batch_stats']['var'][1] == 1


def test_virtual_batches_need_none_to_initialise():
  """One example is enough to initialise, whatever the virtual batch."""
  norm = linen.BatchNorm(use_running_average=False, virtual_batch_size=4)
  variables = norm.init(KEY, normal(1, 3))
  with pytest.raises(ValueError, match='virtual_batch_size=4'):
    norm.apply(variables, normal(6, 3), mutable=['batch_stats'])


@pytest.mark.parametrize('norm', NORMS)
def test_implementation(norm):
  x = normal(2, 4, 6)
  module = module_of(linen, norm, implementation='xla')
  made = jax.eval_shape(module.init_with_output, KEY, x)
  assert made[0].shape == x.shape
  module = module_of(linen, norm, implementation='triton')
  with pytest.raises(NotImplementedError, match='triton'):
    module.init(KEY, x)
