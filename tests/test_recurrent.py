"""Recurrent cells against float64 NumPy written from the papers' equations.

Then what modules add: Flax's names, its RNNs, sequences of different lengths,
training and evaluation with the statistics of each time step.
"""

import functools
import itertools

import chex
from flax import linen as nn, nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import pytest
from tiers import second_tier

from normkit import linen as kl, nnx as kn, recurrent
from normkit.norm import NormParams
from normkit.recurrent import BatchNormLSTMCarry, CellParams

BATCH, TIME, INPUTS, HIDDEN = 4, 5, 3, 4
LENGTHS = np.array([5, 2, 4, 3])
GOES_ON = np.arange(TIME) < LENGTHS[:, None]
KEY = jax.random.key(0)
CELLS = 'LayerNormLSTMCell', 'LayerNormGRUCell', 'BatchNormLSTMCell'


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


X = draw(BATCH, TIME, INPUTS, seed=1).astype(np.float32)


def draw_params(gates):
  """Parameters with nothing left at one or zero."""
  wide = gates * HIDDEN
  shapes = CellParams(
    (INPUTS, wide),
    (HIDDEN, wide),
    (wide,),
    NormParams((wide,), (wide,)),
    NormParams((wide,), (wide,)),
    NormParams((HIDDEN,), (HIDDEN,)),
  )
  leaves, tree = jax.tree.flatten(shapes, lambda s: isinstance(s[0], int))
  return tree.unflatten([draw(*s, seed=i) for i, s in enumerate(leaves)])


STATIC = 'train', 'momentum', 'epsilon'


# The papers, in NumPy.


def sigmoid(a):
  return 1 / (1 + np.exp(-a))


def layer_norm(a, scale, bias, epsilon):
  centred = a - a.mean(-1, keepdims=True)
  var = (centred**2).mean(-1, keepdims=True)
  return centred / np.sqrt(var + epsilon) * scale + bias


def lstm_step(params, c, h, x, norm):
  """Equations 20 to 22 of Ba and others, 6 to 8 of Cooijmans and others."""
  sums = norm('norm_h', h @ params.kernel_h) + norm(
    'norm_i', x @ params.kernel_i
  )
  i, f, g, o = np.split(sums + params.bias, 4, -1)
  c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
  return c, sigmoid(o) * np.tanh(norm('norm_c', c))


def gru_step(params, h, x, epsilon):
  """The layer-normalized GRU, its z of the other sign."""
  two = 2 * HIDDEN

  def norm(p, kernel, a, part):
    return layer_norm(a @ kernel[:, part], p[0][part], p[1][part], epsilon)

  parts = slice(two), slice(two, None)
  (i_gates, i_new), (h_gates, h_new) = (
    [norm(p, kernel, a, part) for part in parts]
    for p, kernel, a in (
      (params.norm_i, params.kernel_i, x),
      (params.norm_h, params.kernel_h, h),
    )
  )
  r, z = np.split(sigmoid(i_gates + h_gates + params.bias[:two]), 2, -1)
  new = np.tanh(i_new + params.bias[two:] + r * h_new)
  return (1 - z) * new + z * h


def batch_norm(a, p, stats, row, train, where, momentum, epsilon):
  """One time step's norm over the examples that go on, statistics in place."""
  mean, var, count = stats
  if train and where.any():
    batch_mean = a[where].mean(0)
    batch_var = ((a[where] - batch_mean) ** 2).mean(0)
    mean[row] = momentum * mean[row] + (1 - momentum) * batch_mean
    var[row] = momentum * var[row] + (1 - momentum) * batch_var
    count[row] += 1
  elif train:
    batch_mean, batch_var = np.zeros(a.shape[-1]), np.ones(a.shape[-1])
  else:
    batch_mean, batch_var = mean[row], var[row]
  y = (a - batch_mean) / np.sqrt(batch_var + epsilon)
  return y * (1 if p.scale is None else p.scale) + (
    0 if p.bias is None else p.bias
  )


def run_reference(kind, params, x, epsilon=1e-6, **batch):
  """The outputs of a sequence; for batch norm it moves `batch['state']`."""
  params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  c = h = np.zeros((*x[:, 0].shape[:-1], HIDDEN))
  outputs = []
  for t in range(x.shape[1]):
    now = x[:, t].astype(np.float64)
    if kind == 'LayerNormGRUCell':
      h = gru_step(params, h, now, epsilon)
    else:

      def norm(name, a, t=t):
        p = getattr(params, name)
        if kind == 'LayerNormLSTMCell':
          return layer_norm(a, *p, epsilon)
        stats = batch['state'][name]
        reached = np.flatnonzero(stats[2][:, 0])
        last = len(stats[2]) - 1 if batch['train'] else max([0, *reached])
        where = t < np.asarray(batch['lengths'])
        options = batch['train'], where, batch['momentum'], epsilon
        return batch_norm(a, p, stats, min(t, last), *options)

      c, h = lstm_step(params, c, h, now, norm)
    outputs.append(h)
  return np.stack(outputs, 1)


def reference_state(max_length):
  """The initial statistics: means, variances and counts of each time step."""

  def stats(width):
    shape = max_length, width
    return [np.zeros(shape), np.ones(shape), np.zeros(shape, int)]

  wide = 4 * HIDDEN
  return {'norm_i': stats(wide), 'norm_h': stats(wide), 'norm_c': stats(HIDDEN)}


def run_function(kind, params, x, state=None, lengths=None, **options):
  """The same by the pure functions under `lax.scan`."""
  zeros = jnp.repeat(jnp.zeros_like(x[:, 0, :1]), HIDDEN, axis=1)
  steps = jnp.swapaxes(x, 0, 1)
  if kind == 'BatchNormLSTMCell':
    carry = BatchNormLSTMCarry(zeros, zeros, zeros[:, 0].astype(jnp.int32))

    def step(loop, x):
      carry, y, state = recurrent.batch_norm_lstm(params, *loop, x, **options)
      return (state, carry), y

    start = state, carry.with_lengths(lengths)
    (state, _), ys = jax.lax.scan(step, start, steps)
    return jnp.swapaxes(ys, 0, 1), state
  function, carry = recurrent.layer_norm_lstm, (zeros, zeros)
  if kind == 'LayerNormGRUCell':
    function, carry = recurrent.layer_norm_gru, zeros
  cell = functools.partial(function, params, **options)
  return jnp.swapaxes(jax.lax.scan(cell, carry, steps)[1], 0, 1)


def gates_of(kind):
  return 3 if kind == 'LayerNormGRUCell' else 4


@pytest.mark.parametrize('kind', CELLS[:2])
def test_layer_norm_values(kind):
  params = draw_params(gates_of(kind))
  desired = run_reference(kind, params, X, 0.1)
  run = jax.jit(run_function, static_argnums=0, static_argnames=STATIC)
  with jax.enable_x64(True):
    y = run(kind, params, X.astype(np.float64), epsilon=0.1)
    assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, desired, rtol=1e-12)
  half, x = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, X))
  y = run(kind, half, x, epsilon=0.1)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(y, float), desired, atol=0.05)


@pytest.mark.parametrize('max_length', [3, second_tier(8)])
def test_batch_norm_values(max_length):
  """Two batches of training, then longer sequences in evaluation.

  With room for more steps than training has, its last one is used for them.
  """
  kind, params = 'BatchNormLSTMCell', draw_params(4)
  longer = draw(BATCH, TIME + 2, INPUTS, seed=9)
  batches = [
    (X, LENGTHS, True),
    (2 * X + 1, LENGTHS[::-1] - 1, True),  # no sequence goes on to the end
    (longer, np.full(BATCH, TIME + 2), False),
  ]
  with jax.enable_x64(True):
    state = jax.tree.map(
      lambda a: np.asarray(a, float if a.dtype == jnp.float32 else a.dtype),
      recurrent.init_batch_norm_lstm(HIDDEN, max_length),
    )
    desired_state = reference_state(max_length)
    run = jax.jit(run_function, static_argnums=0, static_argnames=STATIC)
    for x, lengths, train in batches:
      y, state = run(
        kind,
        params,
        x.astype(np.float64),
        state,
        lengths,
        train=train,
        momentum=0.5,
        epsilon=0.1,
      )
      desired = run_reference(
        kind,
        params,
        x,
        0.1,
        state=desired_state,
        lengths=lengths,
        train=train,
        momentum=0.5,
      )
      where = np.arange(x.shape[1]) < np.asarray(lengths)[:, None]
      y = np.asarray(y)
      np.testing.assert_allclose(y[where], desired[where], rtol=1e-10)
      for name, stats in desired_state.items():
        for got, want in zip(getattr(state, name), stats, strict=True):
          np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-13)
  counts = state.norm_c.count[:, 0].tolist()
  assert counts == ([2, 2, 5] if max_length == 3 else [2, 2, 2, 2, 1, 0, 0, 0])


@pytest.mark.parametrize('kind', [*map(second_tier, CELLS[:2]), CELLS[2]])
def test_gradients(kind):
  """Through time, of all that a cell is given, by a difference along them."""
  options, names = {}, ()
  if kind == 'BatchNormLSTMCell':
    options, names = {'train': True, 'lengths': LENGTHS}, ('state',)
  weights = draw(BATCH, TIME, HIDDEN, seed=3)
  with jax.enable_x64(True):
    if names:
      options['state'] = recurrent.init_batch_norm_lstm(HIDDEN, TIME)
      where = np.arange(TIME) < np.asarray(LENGTHS)[:, None]
      weights = weights * where[..., None]

    @jax.jit
    @jax.value_and_grad
    def run(given):
      y = run_function(kind, *given, epsilon=0.1, **options)
      return jnp.sum((y[0] if names else y) * weights)

    given = draw_params(gates_of(kind)), X.astype(np.float64)
    leaves, tree = jax.tree.flatten(given)
    moves = [1e-5 * draw(*a.shape, seed=50 + i) for i, a in enumerate(leaves)]
    ends = [
      run(tree.unflatten(map(move, leaves, moves)))[0]
      for move in (np.add, np.subtract)
    ]
    slopes = jax.tree.leaves(run(given)[1])
    expected = 2 * sum(map(np.vdot, slopes, moves))
    np.testing.assert_allclose(ends[0] - ends[1], expected, rtol=1e-6)


# Modules


def make_linen(kind, **options):
  if kind == 'BatchNormLSTMCell':
    options = {'max_length': TIME, 'use_running_average': False} | options
  return getattr(kl, kind)(HIDDEN, **options)


def make_nnx(kind, **options):
  if kind == 'BatchNormLSTMCell':
    options = {'max_length': TIME} | options
  return getattr(kn, kind)(INPUTS, HIDDEN, rngs=nnx.Rngs(0), **options)


def varied(key, shape, dtype):
  """Kernels of which no random draw is compiled."""
  del key
  return jnp.asarray(draw(*shape), dtype)


KERNELS = {'kernel_init': varied, 'recurrent_kernel_init': varied}


@functools.cache
def linen_init(kind):
  """The shapes of an RNN's variables; of its cell's, what is not random."""
  init = functools.partial(kl.RNN(make_linen(kind)).init, KEY, X)

  @jax.jit
  def fixed():
    variables = init()
    cell = variables['params']['cell']
    norms = {name: cell[name] for name in cell if name.startswith('norm')}
    return norms, {n: v for n, v in variables.items() if n != 'params'}

  return jax.eval_shape(init), *fixed()


def linen_variables(kind):
  """Variables of an RNN, its parameters with nothing left at one or zero."""
  shapes, _, rest = linen_init(kind)
  leaves, treedef = jax.tree.flatten(shapes['params'])
  new = [np.float32(draw(*a.shape, seed=i)) for i, a in enumerate(leaves)]
  return {'params': treedef.unflatten(new), **rest}


@functools.cache
def linen_run(kind, make_rnn=kl.RNN, **options):
  """A compiled RNN of variables, inputs and lengths: outputs and updates."""
  rnn = make_rnn(make_linen(kind, **options), return_carry=True)

  def run(variables, x, lengths, **options):
    return rnn.apply(
      variables, x, seq_lengths=lengths, mutable=['batch_stats'], **options
    )

  return jax.jit(run, static_argnames=('time_major', 'reverse'))


def linen_params(params):
  """A linen cell's parameters as a pure function takes them."""
  gates, biased = ('rzn', 'i') if 'ir' in params else ('ifgo', 'h')

  def join(prefix, name):
    return np.concatenate([params[prefix + g][name] for g in gates], -1)

  norms = {
    name: NormParams(params[name]['scale'], params[name].get('bias'))
    for name in ('norm_i', 'norm_h', 'norm_c')
    if name in params
  }
  bias = join(biased, 'bias')
  return CellParams(join('i', 'kernel'), join('h', 'kernel'), bias, **norms)


def nnx_params(state):
  """The same of an nnx cell, or of its gradients: variables."""
  norms = {
    name: NormParams(state[name]['scale'], state[name].get('bias'))
    for name in ('norm_i', 'norm_h', 'norm_c')
    if name in state
  }
  dense = state['dense_i'], state['dense_h']
  (bias,) = (d['bias'] for d in dense if 'bias' in d)
  return CellParams(*(d['kernel'] for d in dense), bias, **norms)


def nnx_cell(kind):
  """A cell with the parameters of `linen_variables`."""
  cell = make_nnx(kind, **KERNELS)
  values = linen_params(linen_variables(kind)['params']['cell'])
  state = nnx.state(cell, nnx.Param)
  chex.assert_trees_all_equal_shapes(
    values, nnx_params(nnx.to_pure_dict(state))
  )

  def is_variable(value):
    return isinstance(value, nnx.Variable)

  def store(variable, value):
    variable[...] = value

  jax.tree.map(store, nnx_params(state), values, is_leaf=is_variable)
  nnx.update(cell, state)
  return cell


def statistics(cell):
  return nnx.to_pure_dict(nnx.state(cell, nnx.BatchStat))


def close(actual, desired, tolerance=1e-4):
  chex.assert_trees_all_close(actual, desired, rtol=tolerance, atol=tolerance)


def check_against_numpy(kind, outputs, **batch):
  params = linen_params(linen_variables(kind)['params']['cell'])
  epsilon = 1e-5 if batch else 1e-6
  desired = run_reference(
    kind, params, X, epsilon, lengths=LENGTHS, momentum=0.99, **batch
  )
  for y in outputs:
    close(np.asarray(y)[GOES_ON], np.float32(desired)[GOES_ON])


@pytest.mark.parametrize('kind', [CELLS[0], *map(second_tier, CELLS[1:])])
def test_modules_agree(kind):
  """linen, nnx and NumPy: outputs, carries, statistics and gradients."""
  variables, batch = linen_variables(kind), {}
  if kind == 'BatchNormLSTMCell':
    batch = {'state': reference_state(TIME)}
  run, cell = linen_run(kind), nnx_cell(kind)
  weights = draw(BATCH, TIME, HIDDEN) * GOES_ON[..., None]

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def linen_grads(params):
    (carry, y), updates = run({**variables, 'params': params}, X, LENGTHS)
    return jnp.sum(y * weights), (carry, y, updates)

  @nnx.jit
  @functools.partial(nnx.grad, has_aux=True)
  def nnx_grads(rnn):
    carry, y = rnn(X, seq_lengths=LENGTHS)
    return jnp.sum(y * weights), (carry, y)

  grads, (carry, y, updates) = linen_grads(variables['params'])
  modern = kn.RNN(cell, return_carry=True)
  modern_grads, (modern_carry, modern_y) = nnx_grads(modern)
  close(modern_carry, carry)
  hidden = carry if kind == 'LayerNormGRUCell' else carry[1]
  last = np.asarray(y)[np.arange(BATCH), LENGTHS - 1]
  np.testing.assert_array_equal(hidden, last)
  pure = nnx.to_pure_dict(modern_grads)['cell']
  close(nnx_params(pure), linen_params(grads['cell']))
  check_against_numpy(kind, (y, modern_y), train=True, **batch)
  if not batch:
    return
  desired = {
    name: dict(zip(('mean', 'var', 'count'), stats, strict=True))
    for name, stats in batch['state'].items()
  }
  desired = jax.tree.map(lambda a: np.asarray(a, jnp.float32), desired)
  close(statistics(cell), desired, 1e-5)
  close(updates['batch_stats']['cell'], desired, 1e-5)
  evaluated = linen_run(kind, use_running_average=True)
  (_, y), after = evaluated({**variables, **updates}, X, LENGTHS)
  chex.assert_trees_all_equal(after, updates)
  rnn = kl.RNN(make_linen(kind, use_running_average=True))
  fixed = jax.jit(rnn.apply)({**variables, **updates}, X, seq_lengths=LENGTHS)
  np.testing.assert_allclose(fixed, y, rtol=1e-5, atol=1e-6)
  modern.eval()
  modern_y = nnx.jit(lambda rnn: rnn(X, seq_lengths=LENGTHS)[1])(modern)
  check_against_numpy(kind, (y, modern_y), train=False, **batch)


@pytest.mark.parametrize('kind', CELLS)
def test_names_of_flax(kind):
  """Flax's variables, of its shapes and initial values; the norms' beside."""
  shapes, values, _ = linen_init(kind)
  ours = dict(shapes['params']['cell'])
  flax = nn.RNN((nn.GRUCell if 'GRU' in kind else nn.LSTMCell)(HIDDEN))
  theirs = jax.eval_shape(flax.init, KEY, X)['params']['cell']
  if 'GRU' in kind:
    del theirs['hn']['bias']  # the norm's own
  norms = {n: ours.pop(n) for n in [*ours] if n.startswith('norm')}
  chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
  scale = 0.1 if 'Batch' in kind else 1
  assert norms.keys() == values.keys()
  assert all(np.all(n['scale'] == np.float32(scale)) for n in values.values())
  biased = [n for n, p in norms.items() if 'bias' in p]
  assert biased == (['norm_c'] if 'Batch' in kind else [*norms])
  flax = nnx.GRUCell if 'GRU' in kind else nnx.OptimizedLSTMCell
  theirs = nnx.state(flax(INPUTS, HIDDEN, rngs=nnx.Rngs(0)), nnx.Param)
  ours = dict(nnx.to_flat_state(nnx.state(make_nnx(kind), nnx.Param)))
  for path, value in nnx.to_flat_state(theirs):
    np.testing.assert_array_equal(ours[path][...], value[...])


def linen_statistics(make_rnn, carry):
  """A function of inputs and lengths that trains."""
  run = linen_run('BatchNormLSTMCell', make_rnn)

  def train(x, lengths):
    options = {}
    if carry is not None:
      options['initial_carry'] = carry.with_lengths(lengths)
    variables = linen_variables('BatchNormLSTMCell')
    (_, y), updates = run(variables, x, lengths, **options)
    return y, updates['batch_stats']['cell']

  return train


def nnx_statistics(make_rnn, carry):
  graph, state = nnx.split(make_rnn(make_nnx('BatchNormLSTMCell')))

  @jax.jit
  def train(x, lengths):
    rnn, options = nnx.merge(graph, state, copy=True), {}
    if carry is not None:
      options['initial_carry'] = carry.with_lengths(lengths)
    y = rnn(x, seq_lengths=lengths, **options)
    return y, statistics(rnn.cell)

  return train


BY_HAND = functools.partial(nn.RNN, variable_carry='batch_stats')


@pytest.mark.parametrize(
  ('make_train', 'make_rnn'),
  [
    pytest.param(linen_statistics, kl.RNN, id='linen'),
    second_tier(linen_statistics, BY_HAND, id='linen_flax'),
    pytest.param(nnx_statistics, kn.RNN, id='nnx'),
    second_tier(nnx_statistics, nnx.RNN, id='nnx_flax'),
  ],
)
def test_padding_enters_nothing(make_train, make_rnn):
  """Neither outputs nor statistics, under our RNN and under Flax's."""
  carry = None
  if make_rnn in (BY_HAND, nnx.RNN):
    cell = make_linen('BatchNormLSTMCell')
    carry = cell.initialize_carry(KEY, (BATCH, INPUTS))
  train = make_train(make_rnn, carry)
  plain = train(X, LENGTHS)
  padded = train(np.where(GOES_ON[..., None], X, np.float32(1e6)), LENGTHS)
  ys = [np.asarray(y)[GOES_ON] for y, _ in (plain, padded)]
  np.testing.assert_array_equal(*ys)
  chex.assert_trees_all_equal(plain[1], padded[1])
  (_, full) = train(X, np.full(BATCH, TIME))
  means = [np.asarray(s['norm_i']['mean']) for s in (full, plain[1])]
  same = np.equal(*means)
  assert np.all(same, -1).tolist() == [True, True, False, False, False]


def test_flax_rnn_makes_the_variables():
  """Those of our RNN, though Flax's loop cannot make what it carries."""
  cell = make_linen('BatchNormLSTMCell')
  made = jax.eval_shape(BY_HAND(cell).init, KEY, X)
  chex.assert_trees_all_equal_shapes(made, linen_variables(type(cell).__name__))


@pytest.mark.second_tier
def test_order_and_layout():
  """time_major, reverse and both directions, with sequences masked."""
  kind = 'BatchNormLSTMCell'
  variables, run = linen_variables(kind), linen_run(kind)
  (_, y), _ = run(variables, X, LENGTHS)
  flipped = np.array(X)
  for row, length in zip(flipped, LENGTHS, strict=True):
    row[:length] = row[:length][::-1]
  turned = np.swapaxes(flipped, 0, 1)
  (_, back), _ = run(variables, turned, LENGTHS, time_major=True, reverse=True)
  close(np.swapaxes(back, 0, 1)[GOES_ON], y[GOES_ON], 1e-5)
  pair = nn.Bidirectional(*(kl.RNN(make_linen(kind)) for _ in range(2)))
  y = jax.eval_shape(pair.init_with_output, KEY, X, seq_lengths=LENGTHS)[0]
  assert y.shape == (BATCH, TIME, 2 * HIDDEN)
  pair = nnx.Bidirectional(*(kn.RNN(make_nnx(kind)) for _ in range(2)))
  y = nnx.eval_shape(lambda pair: pair(X, seq_lengths=LENGTHS), pair)
  assert y.shape == (BATCH, TIME, 2 * HIDDEN)


def test_sequences_go_on():
  """Two calls, the carry between them, are one; so are their statistics."""
  kind = 'BatchNormLSTMCell'
  variables, run = linen_variables(kind), linen_run(kind, kl.RNN)
  (_, whole), stats = run(variables, X, LENGTHS)
  carry, pieces = None, []
  for start, stop in (0, 2), (2, TIME):
    left = np.clip(LENGTHS - start, 0, stop - start)
    options = {} if carry is None else {'initial_carry': carry}
    (carry, y), updates = run(variables, X[:, start:stop], left, **options)
    variables = {**variables, **updates}
    pieces.append(y)
  close(np.concatenate(pieces, 1)[GOES_ON], np.asarray(whole)[GOES_ON], 1e-5)
  close(updates, stats, 1e-5)
  goes_on, step = LENGTHS > 2, np.asarray(carry.step)
  np.testing.assert_array_equal(step[goes_on], LENGTHS[goes_on])
  assert carry.with_lengths(None).length is None


@pytest.mark.second_tier
def test_pooled_over_an_axis():
  """Two halves, pooled, are the whole batch."""
  kind, params = 'BatchNormLSTMCell', jax.tree.map(jnp.float32, draw_params(4))
  state = recurrent.init_batch_norm_lstm(HIDDEN, TIME)

  def run(x, lengths, axis_name=None):
    options = {'train': True, 'axis_name': axis_name}
    return run_function(kind, params, x, state, lengths, **options)

  y, stats = jax.jit(run)(X, LENGTHS)
  halves = X.reshape(2, 2, TIME, INPUTS), LENGTHS.reshape(2, 2)
  each = jax.vmap(functools.partial(run, axis_name='d'), axis_name='d')
  ys, states = jax.jit(each)(*halves)
  close(ys.reshape(y.shape), y)
  close(states, jax.tree.map(lambda a: np.stack([a, a]), stats))
  sharded = jax.shard_map(  # which checks that the statistics are of both
    functools.partial(run, axis_name='d'),
    mesh=jax.make_mesh((2,), ('d',), axis_types=(AxisType.Auto,)),
    in_specs=(P('d'), P('d')),
    out_specs=(P('d'), P()),
  )
  close(jax.jit(sharded)(X, LENGTHS), (y, stats))


@pytest.mark.parametrize('kind', [*map(second_tier, CELLS[:2]), CELLS[2]])
def test_dtypes(kind):
  """As in Flax: the gates in `dtype`, the carry as it was made."""
  x = jnp.asarray(X, jnp.bfloat16)
  init = nn.initializers.lecun_normal()
  for dtype, param_dtype in (
    (jnp.bfloat16, jnp.float32),
    (None, jnp.bfloat16),
    (jnp.float32, jnp.bfloat16),
  ):
    options = {'dtype': dtype, 'param_dtype': param_dtype}
    options['recurrent_kernel_init'] = init
    rnn = kl.RNN(make_linen(kind, **options))
    y, variables = jax.eval_shape(rnn.init_with_output, KEY, x)
    make = functools.partial(make_nnx, kind, **options)
    modern_y = nnx.eval_shape(lambda make=make: kn.RNN(make())(x))
    assert y.dtype == modern_y.dtype == param_dtype
    for leaf in jax.tree.leaves(variables['params']):
      assert leaf.dtype == param_dtype
    stats = jax.tree.leaves(variables.get('batch_stats', {}))
    assert {a.dtype.name for a in stats} <= {'float32', 'int32'}


def test_dtype_is_that_of_the_products():
  params, h, x = cell_inputs()
  text = str(
    jax.make_jaxpr(
      lambda x: recurrent.layer_norm_lstm(params, (h, h), x, dtype=jnp.bfloat16)
    )(x)
  )
  products = [line for line in text.splitlines() if 'dot_general' in line]
  assert len(products) == 2
  assert all(':bf16[4,16]' in line for line in products)


@pytest.mark.parametrize(
  'options',
  [
    {'epsilon': 1.0},
    {'scale_init': nn.initializers.constant(0.5)},
    {'gate_fn': nn.hard_sigmoid},
    {'momentum': 0.5},
    second_tier({'activation_fn': nn.relu}),
    second_tier({'kernel_init': nn.initializers.normal()}),
    second_tier({'recurrent_kernel_init': nn.initializers.normal()}),
    second_tier({'bias_init': nn.initializers.ones}),
  ],
  ids=lambda options: next(iter(options)),
)
def test_options_reach_the_cell(options):
  """Each changes what comes out; one that is lost would not."""
  (name,) = options
  kinds = CELLS if name in ('epsilon', 'gate_fn') else CELLS[2:]
  for kind, step in itertools.product(kinds, (linen_step, nnx_step)):
    outcomes = [*map(jax.tree.leaves, (step(kind), step(kind, **options)))]
    assert any(np.any(a != b) for a, b in zip(*outcomes, strict=True)), kind


def start(kind, carry):
  """A carry whose hidden state differs between examples."""
  h = np.float32(draw(BATCH, HIDDEN))
  if kind == 'LayerNormGRUCell':
    return h
  return (h, h) if kind == 'LayerNormLSTMCell' else carry._replace(c=h, h=h)


@functools.cache
def linen_step(kind, **options):
  cell = make_linen(kind, **KERNELS | options)

  @jax.jit
  def run():
    carry = start(kind, cell.initialize_carry(KEY, (BATCH, INPUTS)))
    variables = cell.init(KEY, carry, X[:, 0])
    (_, y), updates = cell.apply(
      variables, carry, X[:, 0], mutable=['batch_stats']
    )
    return y, updates

  return run()


@functools.cache
def nnx_step(kind, **options):

  @jax.jit
  def run():
    cell = make_nnx(kind, **KERNELS | options)
    carry = cell.initialize_carry((BATCH, INPUTS), nnx.Rngs(0))
    _, y = cell(start(kind, carry), X[:, 0])
    return y, statistics(cell)

  return run()


# Errors


def cell_inputs(gates=4):
  params = jax.tree.map(jnp.float32, draw_params(gates))
  return params, jnp.zeros((BATCH, HIDDEN)), jnp.asarray(X[:, 0])


@pytest.mark.parametrize(
  ('change', 'error', 'told'),
  [
    ({'x': X[:, 0].astype(int)}, TypeError, 'x must have a floating-point'),
    (
      {'x': X[:, 0, :2]},
      ValueError,
      r'kernel_i has shape \(3, 16\), where \(2',
    ),
    ({'x': X[:2, 0]}, ValueError, r'carry.c has shape \(4, 4\), where \(2, 4'),
    ({'x': jnp.float32(1)}, ValueError, 'x has no axes'),
    ({'carry': jnp.zeros((BATCH, HIDDEN))}, ValueError, 'carry must be a pair'),
    ({'carry': (1, 2)}, TypeError, 'carry.c must be an array, got int'),
    ({'params': (1, 2)}, ValueError, 'params must be CellParams'),
    ({'epsilon': -1.0}, ValueError, 'epsilon must be finite'),
    ({'dtype': int}, TypeError, 'dtype must have a floating-point'),
    ({'implementation': 'cuda'}, ValueError, 'implementation must be None or'),
  ],
)
def test_layer_norm_errors(change, error, told):
  params, h, x = cell_inputs()
  given = {'params': params, 'carry': (h, h), 'x': x}
  recurrent.layer_norm_lstm(**given)
  with pytest.raises(error, match=told):
    recurrent.layer_norm_lstm(**given | change)


def test_kernels_of_other_gates():
  params, h, x = cell_inputs()
  with pytest.raises(ValueError, match=r'kernel_i has shape .* 3 in a GRU'):
    recurrent.layer_norm_gru(params, h, x)
  short = params._replace(bias=params.bias[1:])
  with pytest.raises(ValueError, match=r'params.bias has shape \(15,\)'):
    recurrent.layer_norm_lstm(short, (h, h), x)


@pytest.mark.parametrize(
  ('change', 'error', 'told'),
  [
    ({'carry': (1, 2)}, ValueError, 'carry must be BatchNormLSTMCarry'),
    ({'state': (1, 2)}, ValueError, 'state must be BatchNormLSTMState'),
    ({'train': 1}, TypeError, 'train must be True or False'),
    ({'momentum': 2.0}, ValueError, 'momentum must lie in'),
    ({'step': jnp.zeros((), jnp.int32)}, ValueError, 'carry.step has shape'),
    ({'hidden': 3}, ValueError, 'state.mean has shape'),
    ({'examples': 1}, ValueError, 'train=True with one element a feature'),
  ],
)
def test_batch_norm_errors(change, error, told):
  change = dict(change)
  params, h, x = cell_inputs()
  examples = change.pop('examples', BATCH)
  step = change.pop('step', jnp.zeros(examples, jnp.int32))
  hidden = change.pop('hidden', HIDDEN)
  given = {
    'params': params,
    'state': recurrent.init_batch_norm_lstm(hidden, TIME),
    'carry': BatchNormLSTMCarry(h[:examples], h[:examples], step),
    'x': x[:examples],
    'train': True,
  }
  with pytest.raises(error, match=told):
    recurrent.batch_norm_lstm(**given | change)


def test_lengths_errors():
  carry = make_linen('BatchNormLSTMCell').initialize_carry(KEY, (BATCH, INPUTS))
  with pytest.raises(TypeError, match='seq_lengths must be integers'):
    carry.with_lengths(jnp.ones(BATCH))
  with pytest.raises(ValueError, match=r'seq_lengths has shape \(3,\)'):
    carry.with_lengths(LENGTHS[:3])


@pytest.mark.parametrize('value', [0, 2.0, True])
def test_max_length_errors(value):
  with pytest.raises(ValueError, match='max_length must be a positive'):
    recurrent.init_batch_norm_lstm(HIDDEN, value)
  with pytest.raises(ValueError, match='max_length must be a positive'):
    make_nnx('BatchNormLSTMCell', max_length=value)


def test_mode_errors():
  rnn = kl.RNN(make_linen('BatchNormLSTMCell', use_running_average=None))
  with pytest.raises(ValueError, match='use_running_average'):
    rnn.init(KEY, X)
  cell = make_nnx('BatchNormLSTMCell', use_running_average=None)
  with pytest.raises(ValueError, match='use_running_average is None'):
    kn.RNN(cell)(X)
