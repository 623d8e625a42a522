"""One answer on any number of devices, in every form of parallelism.

The reference is the float64 one of the whole batch, as if on one device.
"""

from collections.abc import Callable
import dataclasses
from functools import cache, partial
import re
from typing import NamedTuple

import chex
import family
import flax
from hypothesis import given, strategies as st
import jax
from jax import lax, shard_map
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest
import reference
from tiers import second_tier, thinned

import normkit as nk
from normkit import _groups
from normkit.pooling import pool_sum

DEVICES = 8
SHAPE = 16, 4, 6
BATCH = nk.BatchNorm(momentum=0.5, epsilon=1e-3)
POOLED = nk.BatchNorm(momentum=0.5, epsilon=1e-3, axis_name='d')
REFERENCE = reference.batch_norm(momentum=0.5, epsilon=1e-3)


class Inputs(NamedTuple):
  """x, the cotangent of y, the mask: unequal counts, some devices empty."""

  x: jax.Array
  dy: jax.Array
  where: jax.Array | None


def inputs(seed=0, shape=SHAPE, mean=1000.0) -> Inputs:
  rng = np.random.default_rng(seed)
  share = np.linspace(0, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
  return Inputs(
    jax.device_put(np.float32(rng.standard_normal(shape) + mean)),
    jax.device_put(np.float32(rng.standard_normal(shape))),
    jax.device_put(rng.random((*shape[:-1], 1)) < share),
  )


def step(transform: nk.Norm, x, dy, where):
  """The output where it counts, the state and the gradients of x."""
  params, state = transform.init(jax.ShapeDtypeStruct(x.shape, x.dtype))

  def run(x):
    y, new = transform.apply(params, state, x, train=True, where=where)
    return counted(y, where), new

  y, pull, new = jax.vjp(run, x, has_aux=True)
  return y, new, pull(counted(dy, where))[0]


def counted(values, where):
  """Zeros where the mask is False; None masks nothing."""
  return values if where is None else jnp.where(where, values, 0)


def wanted(x, dy, where, of=REFERENCE, axis=-1):
  where = None if where is None else np.asarray(where)
  dy = np.where(True if where is None else where, dy, 0)
  bn = nk.BatchNorm(axis=axis)
  params, state = bn.init(jax.ShapeDtypeStruct(x.shape, x.dtype))
  y, new = of(params, state, np.asarray(x), True, where)
  dx, _, _ = of.gradients(params, np.asarray(x), dy, where)
  return np.where(True if where is None else where, y, 0), new, dx


def check(got, want):
  y, state, dx = got
  np.testing.assert_allclose(y, want[0], atol=2e-5)
  np.testing.assert_allclose(state.mean, want[1].mean, rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(state.var, want[1].var, rtol=1e-5)
  np.testing.assert_array_equal(state.count, want[1].count)
  np.testing.assert_allclose(dx, want[2], atol=2e-5)


def mesh(*shape, kind=AxisType.Auto):
  names = ('d', 'e')[: len(shape)]
  return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def split(tree, *sizes):
  return jax.tree.map(
    lambda a: np.asarray(a).reshape(*sizes, -1, *a.shape[1:]), tree
  )


def joined(got, shape=SHAPE):
  """Undoes `split`: the arrays in one piece, and the state that all share."""
  y, state, dx = jax.device_get(got)
  leaves = jax.tree.map(lambda s: s.reshape(-1, s.shape[-1]), state)
  for leaf in jax.tree.leaves(leaves):
    np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
  return (
    y.reshape(shape),
    jax.tree.map(lambda s: s[0], leaves),
    dx.reshape(shape),
  )


def by_map(mapping: Callable, *sizes: int):
  """pmap or vmap, over one axis or nested over two."""

  def run(transform, data):
    function = partial(step, transform)
    for name in reversed('de'[: len(sizes)]):
      function = mapping(function, axis_name=name)
    if mapping is jax.vmap:
      function = jax.jit(function)
    return joined(function(*split(data, *sizes)))

  return run


def by_shard_map(check_vma: bool, *sizes: int):
  def run(transform, data):
    grid = mesh(*sizes)
    spec = P(grid.axis_names)
    return jax.jit(
      shard_map(
        lambda *a: step(transform, *a),
        mesh=grid,
        in_specs=(spec, spec, spec),
        out_specs=(spec, P(), spec),
        check_vma=check_vma,
      )
    )(*jax.device_get(data))  # arrays on a device are cut by a program

  return run


def by_sharding(spec: P, kind: AxisType):
  def run(transform, data):
    del transform  # one program over global arrays needs no names
    grid = mesh(DEVICES // 2, 2, kind=kind)
    with jax.set_mesh(grid):
      placed = jax.tree.map(
        lambda a: jax.device_put(a, NamedSharding(grid, fitting(spec, a))),
        jax.device_get(data),
      )
      return jax.tree.map(
        np.asarray, jax.jit(lambda *a: step(BATCH, *a))(*placed)
      )

  return run


def fitting(spec: P, a: jax.Array) -> P:
  """The spec without the axes that have but one element."""
  return P(*(s if n > 1 else None for s, n in zip(spec, a.shape, strict=True)))


BATCH_SPEC, BOTH = P(('d', 'e'), None, None), P('d', 'e', None)
CHANNELS, SPACE = P('d', None, 'e'), P(None, 'd', None)
FORMS = {
  'pmap': by_map(jax.pmap, 8),
  'vmap': by_map(jax.vmap, 8),
  'vmap_nested': by_map(jax.vmap, 4, 2),
  'pmap_of_vmap': lambda t, data: joined(
    jax.pmap(jax.vmap(lambda *a: step(t, *a), axis_name='e'), axis_name='d')(
      *split(data, 4, 2)
    )
  ),
  'shard_map': by_shard_map(True, 8),
  'shard_map_unchecked': by_shard_map(False, 8),
  'shard_map_two_axes': by_shard_map(True, 4, 2),
  'jit_batch': by_sharding(BATCH_SPEC, AxisType.Auto),
  'jit_batch_and_space': by_sharding(BOTH, AxisType.Auto),
  'jit_channels': by_sharding(CHANNELS, AxisType.Auto),
  'jit_space': by_sharding(SPACE, AxisType.Auto),
  'explicit_batch': by_sharding(BATCH_SPEC, AxisType.Explicit),
  'explicit_batch_and_space': by_sharding(BOTH, AxisType.Explicit),
  'explicit_channels': by_sharding(CHANNELS, AxisType.Explicit),
  'explicit_space': by_sharding(SPACE, AxisType.Explicit),
}
NESTED = {'vmap_nested', 'pmap_of_vmap', 'shard_map_two_axes'}


def over_all(form: bool | str, names, function: Callable):
  """Maps a function of one member; a bool maps shards, checked or not."""
  sizes = (DEVICES,) if names == 'd' else (4, 2)
  if isinstance(form, bool):
    return jax.jit(
      shard_map(
        lambda a: jax.tree.map(lambda b: b[None], function(a[0])),
        mesh=mesh(*sizes),
        in_specs=P(names),
        out_specs=P(names),
        check_vma=form,
      )
    )
  mapped = function
  for name in reversed(names):
    is_inner = name == names[-1]
    mapping = jax.pmap if form == 'pmap' and is_inner else jax.vmap
    mapped = mapping(mapped, axis_name=name)

  def run(values):
    found = mapped(values.reshape(*sizes, *values.shape[1:]))
    return jax.tree.map(
      lambda a: a.reshape(DEVICES, *a.shape[len(sizes) :]), found
    )

  return run if form == 'pmap' else jax.jit(run)


def pooled(form: str, **options) -> nk.BatchNorm:
  names = ('d', 'e') if form in NESTED else 'd'
  return nk.BatchNorm(momentum=0.5, epsilon=1e-3, axis_name=names, **options)


# A kind of mesh comes with a mask or without one for each way to shard.
ONCE = {
  ('explicit_batch', True),
  ('explicit_batch_and_space', True),
  ('explicit_channels', False),
  ('explicit_space', False),
  ('jit_batch', False),
  ('jit_batch_and_space', False),
  ('jit_channels', True),
  ('jit_space', True),
}


class TestPooling:
  @pytest.mark.parametrize(
    ('form', 'masked'),
    [
      row
      for row in thinned(sorted(FORMS), [False, True], every=6)
      if row.values not in ONCE
    ],
  )
  def test_same_as_one_device(self, form, masked):
    data = inputs()
    if not masked:
      data = data._replace(where=None)
    check(FORMS[form](pooled(form), data), wanted(*data))

  @pytest.mark.parametrize(
    'form', thinned(['vmap', 'pmap', 'shard_map'], every=3)
  )
  def test_options_stay_exact(self, form):
    options = {'debias': True, 'unbiased': True}
    data = inputs()
    _, state, _ = FORMS[form](pooled(form, **options), data)
    of = reference.batch_norm(momentum=0.5, epsilon=1e-3, **options)
    _, want, _ = wanted(*data, of)
    chex.assert_trees_all_close(
      tuple(state),
      tuple(np.asarray(w, s.dtype) for w, s in zip(want, state, strict=True)),
      rtol=1e-5,
    )

  @pytest.mark.parametrize(
    'form', thinned(['shard_map', 'vmap', 'pmap'], every=3)
  )
  def test_a_bad_device_is_skipped(self, form):
    data = inputs()
    x, where = np.array(data.x), np.array(data.where)
    x[9, 0, 2], where[9] = np.nan, True
    data = data._replace(x=x, where=where)
    transform = pooled(form, skip_nonfinite=True)
    _, state, _ = FORMS[form](transform, data)
    np.testing.assert_array_equal(state.count, [1, 1, 0, 1, 1, 1])
    assert (state.mean[2], state.var[2]) == (0, 1)
    chex.assert_tree_all_finite(state)

  @pytest.mark.parametrize(
    ('transform', 'of'),
    [
      (
        nk.LayerNorm(
          axis=(1, 2), axis_name='d', use_scale=False, use_bias=False
        ),
        reference.layer_norm(axis=(1, 2)),
      ),
      (nk.GroupNorm(num_groups=3, axis_name='d'), reference.group_norm(3)),
      (nk.InstanceNorm(axis_name='d'), reference.instance_norm()),
      (
        nk.RMSNorm(axis=(1, 2), axis_name='d', use_scale=False),
        reference.rms_norm(axis=(1, 2)),
      ),
      (nk.FilterResponseNorm(axis_name='d'), family.filter_response()),
      (nk.EvoNormS0(num_groups=3, axis_name='d'), family.evonorm_s0(3)),
      (
        nk.GatedRMSNorm(axis=(1, 2), axis_name='d', use_scale=False),
        reference.rms_norm(axis=(1, 2)),
      ),
      (
        nk.GlobalResponseNorm(axis_name='d', use_scale=False),
        family.global_response(),
      ),
      (
        nk.ScaleNorm(axis=(1, 2), axis_name='d', use_scale=False),
        family.scale_norm(axis=(1, 2)),
      ),
    ],
  )
  def test_other_norms_pool(self, transform, of):
    """Their sets lie across devices along a spatial axis."""
    x, _, where = inputs(mean=10.0)
    params, state = transform.init(x)

    def apply(x, where):
      return transform.apply(params, state, x, train=True, where=where)[0]

    mapped = jax.vmap(apply, in_axes=1, out_axes=1, axis_name='d')
    x, where = np.asarray(x), np.asarray(where)
    y = np.asarray(jax.jit(mapped)(x[:, :, None], where[:, :, None]))
    want, _ = of(params, state, x, True, where)
    np.testing.assert_allclose(y.reshape(x.shape), want, atol=2e-5)

  @pytest.mark.parametrize(
    ('transform', 'of'),
    [
      (
        nk.BatchRenorm(r_max=1.5, d_max=0.5, axis_name='d'),
        family.batch_renorm(1.5, 0.5),
      ),
      (nk.StreamingNorm(axis_name='d'), family.streaming()),
      (
        nk.IterativeWhitening(group_size=2, axis_name='d'),
        family.whitening(group_size=2),
      ),
    ],
  )
  def test_norms_of_batches_pool(self, transform, of):
    """Each device holds some examples; outputs and states are of all."""
    x, _, where = inputs(mean=3.0)
    params, state = transform.init(x)

    def apply(x, where):
      return transform.apply(params, state, x, train=True, where=where)

    x, where = split((x, where), DEVICES)
    y, new = jax.jit(jax.vmap(apply, axis_name='d'))(x, where)
    x, where, y = (
      np.asarray(a).reshape(-1, *a.shape[2:]) for a in (x, where, y)
    )
    want, want_state = of(params, state, x, True, where)
    np.testing.assert_allclose(y, want, atol=1e-4)
    first = jax.tree.map(lambda s: np.asarray(s)[0], new)
    chex.assert_trees_all_close(first, want_state, rtol=1e-5, atol=1e-5)

  @pytest.mark.second_tier
  def test_whitening_in_groups(self):
    """Each group of devices whitens by itself, also when another is spoilt."""
    groups = [0, 3], [1, 2, 4, 5, 6, 7]
    transform = nk.IterativeWhitening(
      group_size=2, axis_name='d', axis_index_groups=groups
    )
    x, _, _ = inputs(mean=3.0)
    params, state = transform.init(x)
    x = np.array(x).reshape(DEVICES, -1, *x.shape[1:])
    x[3, 0, 0, 0] = np.nan
    run = jax.vmap(
      lambda x: transform.apply(params, state, x, train=True), axis_name='d'
    )
    y, new = jax.device_get(jax.jit(run)(x))
    inside = np.array(groups[1])
    own = x[inside].reshape(-1, *x.shape[2:])
    want, want_state = family.whitening(group_size=2)(params, state, own, True)
    np.testing.assert_allclose(y[inside].reshape(own.shape), want, atol=1e-4)
    first = jax.tree.map(lambda s: s[1], new)
    chex.assert_trees_all_close(first, want_state, rtol=1e-5, atol=1e-5)
    assert np.isnan(new.mean[0, 0])

  @pytest.mark.parametrize(
    ('form', 'groups'),
    thinned(
      ['vmap', 'pmap', True, False],
      [([0, 3], [1, 2, 4, 5, 6, 7]), ([0, 5, 3, 6], [1, 2, 4, 7])],
      every=8,
    ),
  )
  def test_groups(self, form, groups):
    """Groups of any size, each by itself, also when another is spoilt."""
    transform = pooled('', axis_index_groups=groups)
    data = jax.tree.map(np.array, split(inputs(), DEVICES))
    data.x[3, 0, 0, 0], data.where[3, 0] = np.nan, True

    def function(data):
      return step(transform, *data)

    if isinstance(form, bool):
      run = shard_map(
        lambda data: jax.tree.map(
          lambda a: a[None], function(jax.tree.map(lambda a: a[0], data))
        ),
        mesh=mesh(DEVICES),
        in_specs=P('d'),
        out_specs=P('d'),
        check_vma=form,
      )
    else:
      run = {'pmap': jax.pmap, 'vmap': jax.vmap}[form](function, axis_name='d')
    run = run if form == 'pmap' else jax.jit(run)
    got = jax.tree.map(np.asarray, run(data))
    inside = np.array(groups[1])
    own = jax.tree.map(
      lambda a: a[inside].reshape(-1, *SHAPE[1:-1], a.shape[-1]), data
    )
    y, state, dx = jax.tree.map(lambda a: a[inside], got)
    shape = (-1, *SHAPE[1:])
    first = jax.tree.map(lambda s: s[0], state)
    check((y.reshape(shape), first, dx.reshape(shape)), wanted(*own))
    assert np.isnan(got[1].mean[0, 0])

  @pytest.mark.parametrize(
    ('form', 'names'),
    [
      ('vmap', 'd'),
      (True, ('e', 'd')),  # not in the order of the mesh
      second_tier(True, 'd'),
      second_tier(False, ('d', 'e')),
      second_tier('vmap', ('d', 'e')),
      second_tier('pmap', 'd'),
      second_tier('pmap', ('d', 'e')),  # the first one of a vmap
      second_tier(True, ('d', 'e')),
      second_tier(False, 'd'),
    ],
  )
  def test_sums_of_groups(self, form, names):
    """Alike to the bit in all members; a NaN stays in its group."""
    values = np.random.default_rng(0).standard_normal((DEVICES, 5))
    values[3, 0] = np.nan
    all_groups = (
      [[0, 3], [1, 2, 4, 5, 6, 7]],
      [[0, 3, 6], [1, 7, 2, 5, 4]],
      [[6, 0], [], [1, 5], [2, 4], [7, 3]],
      [[7, 1, 2, 0, 4, 6, 5], [3]],
      [[2, 1, 6, 0, 5, 3, 7, 4]],
    )

    def run(v):
      """Sums, and what they give back."""
      found = []
      for groups in all_groups:
        given = v, 2 * v[:1]
        total = partial(pool_sum, axis_name=names, axis_index_groups=groups)
        sums, pull = jax.vjp(total, given)
        found.append((sums, pull(given)[0]))
      return found

    found = over_all(form, names, run)(values.astype(np.float32))
    for groups, sums in zip(all_groups, found, strict=True):
      for group in filter(None, groups):
        want = values[group].sum(0)
        for got in jax.tree.leaves(sums):
          of = np.asarray(got)[group]
          np.testing.assert_array_equal(of, of[:1].repeat(len(group), 0))
          scale = 1 if of.shape[1] > 1 else 2
          np.testing.assert_allclose(
            of[0], scale * want[: of.shape[1]], rtol=1e-5
          )

  @pytest.mark.parametrize(
    ('form', 'masked'),
    thinned(['vmap', 'pmap', 'shard_map'], [True, False], every=3),
  )
  def test_virtual_batches_pool(self, form, masked):
    """Each output by its virtual batch, the state by the whole."""
    data = inputs()
    if not masked:
      data = data._replace(where=None)
    transform = pooled(form, virtual_batch_size=1)
    of = reference.batch_norm(momentum=0.5, epsilon=1e-3, virtual_batch_size=1)
    check(FORMS[form](transform, data), wanted(*data, of))

  @pytest.mark.parametrize('size', [0, 5, 3])
  def test_virtual_batch_must_divide(self, size):
    message = f'virtual_batch_size={size} does not divide the batch of 16'
    if size == 0:  # which divides no batch
      message = 'virtual_batch_size must be 1 or more, got 0'
    with pytest.raises(ValueError, match=message):
      step(nk.BatchNorm(virtual_batch_size=size), *inputs())

  def test_virtual_batch_of_one_element(self):
    transform = nk.BatchNorm(virtual_batch_size=1)
    x = jnp.ones((4, 6))
    with pytest.raises(ValueError, match='one element a feature'):
      transform.apply(*transform.init(x), x, train=True)


@pytest.mark.second_tier
@given(
  devices=st.sampled_from([1, 2, 4, 8]),
  each=st.integers(1, 3),
  rest=st.sampled_from([(4, 6), (1, 3), (5, 2)]),
  axis=st.sampled_from([-1, 1]),
  seed=st.integers(0, 99),
  mean=st.sampled_from([0.0, -30.0, 5e4]),
  form=st.sampled_from(['vmap', 'pmap', 'shard_map', 'jit']),
)
def test_any_layout(devices, each, rest, axis, seed, mean, form):
  shape = (devices * each, *rest)
  data = inputs(seed, shape, mean)
  options = {'axis': axis, 'momentum': 0.5, 'epsilon': 1e-3}
  transform = nk.BatchNorm(
    axis_name=None if form == 'jit' else 'd', check_batch=False, **options
  )
  function = partial(step, transform)
  if form in {'vmap', 'pmap'}:
    mapping = {'vmap': jax.vmap, 'pmap': jax.pmap}[form]
    mapped = mapping(function, axis_name='d')
    mapped = jax.jit(mapped) if form == 'vmap' else mapped
    got = joined(mapped(*split(data, devices)), shape)
  else:
    grid = mesh(devices)
    if form == 'shard_map':
      function = shard_map(
        function, mesh=grid, in_specs=P('d'), out_specs=(P('d'), P(), P('d'))
      )
    placed = jax.device_put(jax.device_get(data), NamedSharding(grid, P('d')))
    got = jax.jit(function)(*placed)
  check(got, wanted(*data, reference.batch_norm(**options), axis))


COLLECTIVES = (
  'all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter'
)


def collectives(function, *args) -> list[str]:
  text = jax.jit(function).lower(*args).compile().as_text()
  return re.findall(rf' ({COLLECTIVES})(?:-start)?\(', text)


def forward(transform, x, dy, where):
  del dy
  params, state = transform.init(jax.ShapeDtypeStruct(x.shape, x.dtype))
  return transform.apply(params, state, x, train=True, where=where)


@pytest.mark.parametrize(
  ('check_vma', 'masked', 'case'),
  thinned(
    [True, False],
    [True, False],
    [
      (POOLED, 2),
      (nk.GroupNorm(num_groups=2, axis_name='d'), 2),
      (nk.RMSNorm(axis=(1, 2), axis_name='d', use_scale=False), 1),
    ],
    every=4,
    keep=2,
  ),
)
def test_collectives_each_way(check_vma, masked, case):
  (transform, count), data = case, inputs()
  if not masked:
    data = data._replace(where=None)
  for gradients in (False, True):
    mapped = sharded(transform, DEVICES, gradients, check_vma=check_vma)
    assert collectives(mapped, *data) == ['all-reduce'] * (count + gradients)


def sharded(transform, devices, gradients, **options):
  """Forward, or with the gradient of x, over the first axis."""
  _, like = transform.init(jnp.zeros((2, 2, 8)))
  spec = P() if transform.axis_index_groups is None else P('d')
  state = jax.tree.map(lambda _: spec, like)

  def backward(x, dy, where):
    y, pull, new = jax.vjp(
      lambda x: forward(transform, x, dy, where), x, has_aux=True
    )
    return y, new, pull(jnp.sin(y) * dy)[0]

  return shard_map(
    backward if gradients else partial(forward, transform),
    mesh=mesh(devices),
    in_specs=P('d'),
    out_specs=(P('d'), state, *[P('d')] * gradients),
    **options,
  )


@pytest.mark.parametrize(
  ('transform', 'check_vma'),
  thinned([POOLED, nk.StreamingNorm(axis_name='d')], [True, False], every=3),
)
def test_bytes_do_not_grow_with_devices(transform, check_vma):
  """What is sent is three numbers a channel and the count, then two back."""
  x = jnp.zeros((8, 256))
  for devices in 2, 8:
    mapped = sharded(transform, devices, True, check_vma=check_vma)
    assert sent(mapped, x, x, None) == 4 * (3 * 256 + 1 + 2 * 256)


@pytest.mark.parametrize(
  ('check_vma', 'size', 'passes'),
  [
    (True, 2, (0.5, 1)),  # a half, then the whole
    second_tier(False, 2, (1,)),
    second_tier(True, 3, (1,) * 4),  # up two steps and down
    second_tier(False, 3, (1,) * 4),
  ],
)
def test_bytes_of_groups_do_not_grow_with_devices(check_vma, size, passes):
  """All are of one size, or the last one is smaller."""
  x = jnp.zeros((8, 256))
  for devices in 4, 8:
    indices = range(devices)
    groups = [indices[i : i + size] for i in indices[::size]]
    norm = nk.BatchNorm(axis_name='d', axis_index_groups=groups)
    mapped = sharded(norm, devices, True, check_vma=check_vma)
    numbers = 256 + 1 + (passes == (0.5, 1)), 2 * 256, 2 * 256
    assert sent(mapped, x, x, None) == 4 * sum(passes) * sum(numbers)
  assert len(collectives(mapped, x, x, None)) == 3 * len(passes)


@pytest.mark.parametrize(
  ('transform', 'numbers'),
  [
    (nk.BatchRenorm(axis_name='d'), 3 + 2),
    second_tier(nk.EvoNormB0(axis_name='d'), 3 + 1),
    second_tier(nk.IterativeWhitening(group_size=2, axis_name='d'), 2 + 2 + 4),
  ],
)
def test_statistics_alone_are_sent(transform, numbers):
  """So many a channel, forward and back, whatever else an example holds."""
  x = jnp.zeros((8, 32, 16))
  mapped = sharded(transform, DEVICES, True)
  assert sent(mapped, x, x, None) <= 4 * (numbers * 16 + 1)


def sent(function, *args) -> int:
  """Bytes that come out of the collectives of a compiled program."""
  text = jax.jit(function).lower(*args).compile().as_text()
  results = re.findall(rf'= (.*) (?:{COLLECTIVES})(?:-start)?\(', text)
  assert results
  return 4 * sum(
    np.prod([int(n) for n in shape.split(',') if n], dtype=int)
    for result in results
    for shape in re.findall(r'f32\[([\d,]*)\]', result)
  )


@pytest.mark.parametrize(
  ('transform', 'grouped'),
  thinned(
    [
      nk.BatchNorm(axis_name='d'),
      nk.StreamingNorm(axis_name='d'),
      nk.IterativeWhitening(group_size=4, axis_name='d'),
    ],
    [False, True],
    every=4,
  ),
)
def test_vmap_costs_the_axis_and_not_its_square(transform, grouped):
  """Forward and backward, in temporaries; groups of two and one of three."""

  size = 513
  groups = [range(3), *([i, i + 1] for i in range(3, size, 2))]
  norm = dataclasses.replace(
    transform, axis_index_groups=groups if grouped else None
  )
  x = jax.ShapeDtypeStruct((size, 4, 16), jnp.float32)
  run = jax.vmap(partial(step, norm, where=None), axis_name='d')
  compiled = jax.jit(run).lower(x, x).compile()
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  assert temporaries < 50 * x.size * 4


@pytest.mark.parametrize(
  ('mean', 'scale'), [(1e5, 1), (1e20, 1e15), (-1e-10, 1e-15), (3e38, 0)]
)
def test_large_means_unequal_counts(mean, scale):
  """One member holds nothing; the sums of all would overflow, or cancel."""
  x, _, where = inputs(mean=0.0)
  x = (np.asarray(x, float) * scale + mean).astype(np.float32)
  where = np.array(where).reshape(DEVICES, 2, 4, 1)
  where[1] = False
  where = where[:, :1, :1] if scale == 0 else where
  x = x.reshape(DEVICES, 2, 4, 6)[:, : where.shape[1], : where.shape[2]]
  mapped = jax.vmap(
    lambda x, where: nk.moments(x, (0, 1), where=where, axis_name='d'),
    axis_name='d',
  )
  found = jax.jit(mapped)(x, where)
  valid = np.broadcast_to(where, x.shape)
  wide = x.astype(float)
  of = {'axis': (0, 1, 2), 'where': valid}
  want = wide.mean(**of), wide.var(**of), valid.sum((0, 1, 2))
  for got, numbers in zip(found, want, strict=True):
    np.testing.assert_allclose(got, np.stack([numbers] * DEVICES), rtol=2e-6)


FEW = inputs(shape=(4, 2, 3), mean=5.0)
MODES = (
  jax.grad,
  jax.hessian,
  lambda f: jax.jacrev(jax.grad(f)),
  lambda f: lambda x: jax.jvp(f, (x,), (FEW.dy,))[1],
  lambda f: lambda x: jax.vmap(jax.grad(f))(jnp.stack([x, x])),
)


def normed(x, dy, **pooled):
  m = nk.moments(x, range(x.ndim - 1), keepdims=True, **pooled)
  return jnp.sin((x - m.mean) / jnp.sqrt(m.var + 1e-3)) * dy


@cache
def derived_of_whole(groups):
  """Of all members together, in each group: a step along i, and differences."""
  parts = [list(range(4))] if groups is None else groups
  x, dy = np.asarray(FEW.x, float), np.asarray(FEW.dy, float)
  steps = np.eye(x.size).reshape(x.size, *x.shape)

  def total(x):
    found = 0
    for p in map(list, parts):
      d = x[p] - x[p].mean((0, 1))
      found += (np.sin(d / np.sqrt((d**2).mean((0, 1)) + 1e-3)) * dy[p]).sum()
    return found

  def gradient(x):
    along = [total(x + 1e-30j * step).imag / 1e-30 for step in steps]
    return np.reshape(along, x.shape)

  g = gradient(x)
  ends = ([gradient(x + h * step) for step in steps] for h in (1e-5, -1e-5))
  hessian = (np.subtract(*ends) / 2e-5).reshape(*x.shape, *x.shape)
  return g, hessian, hessian, (g * dy).sum(), np.stack([g, g])


@pytest.mark.parametrize(
  ('form', 'groups'),
  [
    ('vmap', None),
    second_tier('vmap', ((0, 2, 3), (1,))),
    second_tier('remat', ((0, 2, 3), (1,))),
    second_tier('scan', None),
    second_tier('shard_map', None),
    second_tier('shard_map', ((0, 2, 3), (1,))),
    second_tier('shard_map', ((0, 2), (3, 1))),
    second_tier('unchecked', ((0, 2), (3, 1))),
  ],
)
def test_every_mode_of_differentiation(form, groups):
  """Also twice: with gradients the statistics' own are summed."""
  each = partial(normed, axis_name='d', axis_index_groups=groups)
  if form == 'remat':
    each = jax.checkpoint(each)
  if form == 'scan':
    once = each

    def each(*a):
      return lax.scan(lambda c, _: (c, once(*a)), 0, None, 1)[1][0]

  mapped = jax.vmap(each, axis_name='d')
  if form in ('shard_map', 'unchecked'):
    mapped = shard_map(
      lambda *a: each(*(b[0] for b in a))[None],
      mesh=mesh(4),
      in_specs=P('d'),
      out_specs=P('d'),
      check_vma=form != 'unchecked',
    )

  def pooled(x):
    return mapped(x, FEW.dy).sum()

  derived = jax.jit(lambda x: [derive(pooled)(x) for derive in MODES])
  found = derived(np.asarray(FEW.x))
  for got, want in zip(found, derived_of_whole(groups), strict=True):
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize(
  ('shape', 'spec', 'most'),
  [
    ((64, 64, 16), P('d'), 2),
    ((64, 32 * DEVICES, 16), P(None, 'd'), 2),
    ((64, 64, 16), P(None, None, 'd'), 0),
    ((DEVICES, 12, 12, 8), P('d'), 2),
    ((DEVICES, 4, 4, 8), P('d'), 2),
  ],
)
def test_at_most_two_where_jit_places_them(shape, spec, most):
  """Sums and nothing else, also where a device has one example."""
  x = jax.ShapeDtypeStruct(
    shape, jnp.float32, sharding=NamedSharding(mesh(DEVICES), spec)
  )
  params, state = BATCH.init(x)
  found = collectives(lambda x: BATCH.apply(params, state, x, train=True), x)
  assert len(found) <= most
  assert set(found) <= {'all-reduce'}


@pytest.mark.parametrize(
  ('groups', 'axis'), thinned([2, 8, 16], range(3), every=3)
)
def test_group_norm_with_explicit_axes(groups, axis):
  """Whichever axis is sharded, channels too, on which Flax fails."""
  grid = mesh(DEVICES, kind=AxisType.Explicit)
  x = np.random.default_rng(0).standard_normal((8, 8, 16)).astype(np.float32)
  spec = [None] * 3
  spec[axis] = 'd'
  with jax.set_mesh(grid):
    placed = jax.device_put(x, NamedSharding(grid, P(*spec)))
    y = jax.jit(lambda x: nk.group_norm(x, num_groups=groups))(placed)
    assert jax.typeof(y).sharding.spec == P(*spec)
  want, _ = reference.group_norm(groups)(nk.NormParams(), None, x, True)
  np.testing.assert_allclose(np.asarray(y), want, atol=2e-6)


RUNNING = {
  'batch': nk.BatchNorm(momentum=0.5),
  'debiased': nk.BatchNorm(debias=True, unbiased=True, skip_nonfinite=True),
  'within_shards': nk.BatchNorm(virtual_batch_size=2),
  'across_shards': nk.BatchNorm(virtual_batch_size=8),
  'uneven_shards': nk.BatchNorm(virtual_batch_size=6),
  'renorm': nk.BatchRenorm(),
  'streaming': nk.StreamingNorm(),
  'evonorm_b0': nk.EvoNormB0(),
  'whitening': nk.IterativeWhitening(group_size=2, n_steps=2),
}


SPECS = P('d', None, 'e'), P(None, None, ('e', 'd'))


@pytest.mark.parametrize(
  ('name', 'spec', 'masked'),
  [
    ('batch', SPECS[0], False),
    second_tier('batch', SPECS[1], True),
    *(  # in turns
      second_tier(name, SPECS[place % 2], place // 2 % 2 == 1)
      for place, name in enumerate(RUNNING)
      if name != 'batch'
    ),
  ],
)
def test_state_from_outside_of_the_mesh(name, spec, masked):
  """Without `set_mesh`: the state comes back whole, again and in a loop."""
  data = inputs(shape=(24 if 'uneven' in name else 16, 4, 8), mean=3.0)
  where = data.where if masked else None
  params, state = RUNNING[name].init(data.x)

  def run(x, state):
    y, new = RUNNING[name].apply(params, state, x, train=True, where=where)
    return jnp.sum(jnp.sin(counted(y, where))), new

  def twice(x, state):
    def body(state, _):
      gradient, new = jax.grad(run, has_aux=True)(x, state)
      return new, gradient

    return lax.scan(body, state, None, 2)

  grid = mesh(4, 2, kind=AxisType.Explicit)
  x = jax.device_put(np.asarray(data.x), NamedSharding(grid, spec))
  got, want = (jax.jit(twice)(x, state) for x in (x, data.x))
  for leaf in got[0]:
    assert jax.typeof(leaf).sharding.spec == P(*[None] * leaf.ndim)
  jax.jit(run).lower(x, got[0])  # as good as run, once it is typed
  chex.assert_trees_all_close(
    *(jax.tree.map(np.asarray, tree) for tree in (got, want)),
    rtol=2e-4,
    atol=2e-5,
  )


@pytest.mark.parametrize('name', thinned(RUNNING, every=9))
def test_state_from_outside_of_the_mesh_without_jit(name):
  data = inputs(shape=(24 if 'uneven' in name else 16, 4, 8), mean=3.0)
  transform = RUNNING[name]
  params, state = transform.init(data.x)
  grid = mesh(4, 2, kind=AxisType.Explicit)
  x = jax.device_put(np.asarray(data.x), NamedSharding(grid, P('d', None, 'e')))
  got, want = (
    transform.apply(params, state, x, train=True) for x in (x, data.x)
  )
  chex.assert_trees_all_close(
    *(jax.tree.map(np.asarray, tree) for tree in (got, want)),
    rtol=2e-4,
    atol=2e-5,
  )


@pytest.mark.parametrize('name', ['batch', 'debiased', 'renorm'])
def test_state_after_evaluation(name):
  """Its fields may come out of `jit` in several shardings."""
  transform = RUNNING[name]
  grid = mesh(4, 2, kind=AxisType.Explicit)
  spec = P(None, None, 'e')
  x = np.asarray(inputs(shape=(4, 4, 8)).x)
  x = jax.device_put(x, NamedSharding(grid, spec))
  params, state = transform.init(x)
  step = jax.jit(transform.apply, static_argnames='train')
  _, state = step(params, state, x, train=False)
  assert len({leaf.sharding.spec for leaf in state}) > 1
  _, state = step(params, state, x, train=True)
  np.testing.assert_array_equal(state.count, jnp.ones(8, int))


@pytest.mark.parametrize('axis', [0, 1, 2])
@pytest.mark.parametrize('transform', [nk.LayerNorm(), nk.RMSNorm()])
def test_rows_stay_where_they_are(transform, axis):
  """Where `jit` shards an axis, only sums move: of features each way."""
  spec = [None] * 3
  spec[axis] = 'd'
  x = jax.ShapeDtypeStruct(
    (8, 16, 2048), jnp.float32, sharding=NamedSharding(mesh(DEVICES), P(*spec))
  )
  params, state = transform.init(x)

  def gradients(params, x):
    def loss(params, x):
      y, _ = transform.apply(params, state, x, train=True)
      return jnp.sum(jnp.sin(y))

    return jax.grad(loss, (0, 1))(params, x)

  found = collectives(gradients, params, x)
  assert set(found) == {'all-reduce'}
  assert len(found) <= (4 if isinstance(transform, nk.LayerNorm) else 2)


def test_virtual_batches_cost_no_collective_forward():
  """A virtual batch that one device holds is normalized where it is."""
  transform = nk.BatchNorm(virtual_batch_size=SHAPE[0] // DEVICES)
  x = jax.ShapeDtypeStruct(
    SHAPE, jnp.float32, sharding=NamedSharding(mesh(DEVICES), P('d'))
  )
  params, state = transform.init(x)
  assert not collectives(
    lambda x: transform.apply(params, state, x, train=True)[0], x
  )


# Of two members on each of eight devices; and for how many groups of several
# devices numbers are exchanged.
MIXED = (
  ([[d, d + 8] for d in range(8)], 0),
  ([[d, d + 1, d + 8, d + 9] for d in range(0, 8, 2)], 1),
  ([[d, d + 1] for d in range(0, 16, 2)], 2),
  ([[0, 1, 8, 9], [2, 10], [*range(3, 8), *range(11, 16)]], 2),
  ([[5, 0, 9], [], [1], [2, 10, 3, 4], [6, 7, *range(11, 16), 8]], 3),
)


def by_members(function, names, devices, check_vma=False):
  """Maps members of a `vmap`, i, on each device."""
  axis = names.index('i')
  mapped = jax.vmap(
    lambda v: jax.tree.map(lambda a: a[None], function(v[0])),
    axis,
    axis,
    axis_name='i',
  )
  spec = P(*(n if n == 'd' else None for n in names))
  return shard_map(
    mapped,
    mesh=mesh(devices),
    in_specs=spec,
    out_specs=spec,
    check_vma=check_vma,
  )


@pytest.mark.parametrize('names', [('i', 'd'), second_tier(('d', 'i'))])
def test_sums_of_members_on_devices(names):
  """Alike to the bit in a group, where a NaN stays; forward and back."""
  places = np.arange(16)
  if names == ('d', 'i'):
    places = places % 8 * 2 + places // 8
  all_groups = [
    [[int(places[i]) for i in group] for group in groups] for groups, _ in MIXED
  ]
  values = np.random.default_rng(0).standard_normal((16, 5))
  values[places[11], 0] = np.nan

  def run(v):
    found = []
    for groups in all_groups:
      total = partial(pool_sum, axis_name=names, axis_index_groups=groups)
      sums, pull = jax.vjp(total, v)
      found.append((sums, *pull(2 * v)))
    return found

  shape = (2, 8, 5) if names == ('i', 'd') else (8, 2, 5)
  given = jnp.asarray(values.reshape(shape), jnp.float32)
  mapped = by_members(run, names, DEVICES)
  assert sent(mapped, given) == 4 * 5 * 2 * sum(slots for _, slots in MIXED)
  for groups, sums in zip(all_groups, jax.jit(mapped)(given), strict=True):
    for group in filter(None, groups):
      for times, got in enumerate(sums, 1):
        of = np.asarray(got).reshape(values.shape)[group]
        np.testing.assert_array_equal(of, of[:1].repeat(len(group), 0))
        want = times * values[group].sum(0)
        np.testing.assert_allclose(of[0], want, rtol=1e-5)


@pytest.mark.second_tier
def test_bytes_of_members_on_devices_do_not_grow():
  """Two groups for each pair of devices: as much as for one, twice."""
  for devices in 4, 8:
    pairs = [
      [d + i * devices, d + i * devices + 1]
      for d in range(0, devices, 2)
      for i in (0, 1)
    ]
    norm = nk.BatchNorm(axis_name=('i', 'd'), axis_index_groups=pairs)

    def run(data, norm=norm):
      return step(norm, data, data, None)

    x = jnp.zeros((2, devices, 1, 256))
    mapped = by_members(run, ('i', 'd'), devices)
    assert sent(mapped, x) == 2 * 4 * (3 * 256 + 1 + 2 * 256)
  assert collectives(mapped, x) == ['all-reduce'] * 3


def test_groups_that_cut_across():
  """Few numbers of all go to all devices at once; many to their own alone."""
  ring = [[m, (m + 3) % 16] for m in range(0, 16, 2)]
  for size, rounds, most in (1, 1, DEVICES), (2**16, 2, 2):
    slots, found = _groups.schedule(ring, DEVICES, 2, size)
    assert len(found) == rounds
    assert slots.max() == most - 1
    for group in ring:  # of one slot, in which nobody else of the device is
      assert len({slots[m // 2, m % 2] for m in group}) == 1
    assert all(len({*row}) == 2 for row in slots)


def test_sums_in_two_rounds(monkeypatch):
  """Where collectives cost nothing: a device sends but the two sums it has."""
  monkeypatch.setattr(_groups, 'START', 0)
  v = jnp.arange(16.0 * 5).reshape(2, 8, 5)
  ring = [[d, (d + 1) % 8 + 8] for d in range(8)]

  def run(v):
    return pool_sum(v, ('i', 'd'), ring)

  mapped = by_members(run, ('i', 'd'), DEVICES)
  sums = v[0] + jnp.roll(v[1], -1, 0)
  want = jnp.stack([sums, jnp.roll(sums, 1, 0)])
  np.testing.assert_array_equal(jax.jit(mapped)(v), want)
  assert sent(mapped, v) == 4 * 5 * 2


def test_names_in_another_order_than_the_mesh():
  """The same groups by other numbers, at the same cost."""
  groups = [[0, 4], [1, 5], [2, 6], [3, 7]]  # over e, and pairs of d

  def run(v):
    return pool_sum(v, ('e', 'd'), groups)

  v = jnp.arange(8.0 * 5).reshape(8, 5)
  mapped = over_all(False, ('d', 'e'), run)
  of_e_and_d = np.asarray(v).reshape(4, 2, 5).sum(1, keepdims=True)
  np.testing.assert_array_equal(
    np.asarray(mapped(v)).reshape(4, 2, 5), of_e_and_d.repeat(2, 1)
  )
  assert collectives(mapped, v) == ['all-reduce']
  assert sent(mapped, v) == 4 * 5


@pytest.mark.parametrize('groups', [None, [[0, 1], [2, 3]]])
def test_members_of_a_vmap_where_devices_are_checked(groups):
  """JAX sums nothing over them there; where it does, this can go."""
  v = jnp.ones((2, 2, 5))

  def raises(error, match, function):
    with pytest.raises(error, match=match):
      jax.eval_shape(by_members(function, ('i', 'd'), 2, True), v)

  raises(AssertionError, None, lambda v: lax.psum(v, 'i'))
  for names in 'i', ('i', 'd'):
    total = partial(pool_sum, axis_name=names, axis_index_groups=groups)
    raises(NotImplementedError, 'check_vma=False', total)


def test_flax_takes_no_groups_under_vmap():
  """As docs/parallel.md says."""
  norm = flax.linen.BatchNorm(
    use_running_average=False,
    axis_name=('i', 'd'),
    axis_index_groups=[[0, 1], [2, 3]],
  )
  v = jnp.ones((2, 2, 3, 5))
  one = jnp.ones(5)
  variables = {
    'params': {'scale': one, 'bias': one},
    'batch_stats': {'mean': one, 'var': one},
  }

  def run(v):
    return norm.apply(variables, v, mutable=['batch_stats'])[0]

  with pytest.raises(NotImplementedError, match='axis_index_groups'):
    jax.eval_shape(by_members(run, ('i', 'd'), 2), v)


@pytest.mark.parametrize(
  ('check_vma', 'groups'),
  thinned([True, False], [[[0, 1], [2, 3]], [[0, 1, 2], [3]]], every=3),
)
def test_groups_where_other_axes_are_explicit(check_vma, groups):
  """Channels stay sharded over the axis that `shard_map` leaves to JAX."""
  grid = mesh(4, 2, kind=AxisType.Explicit)
  data = inputs(shape=(8, 4, 6))._replace(where=None)
  norm = pooled('', axis_index_groups=groups)

  def run(x, dy):
    y, state, dx = step(norm, x, dy, None)
    return y, jax.tree.map(lambda s: s[None], state), dx

  spec = P('d', None, 'e')
  with jax.set_mesh(grid):
    mapped = shard_map(
      run,
      axis_names={'d'},
      in_specs=P('d'),
      out_specs=P('d'),
      check_vma=check_vma,
    )
    got = jax.jit(mapped)(*(jax.device_put(a, spec) for a in data[:2]))
  assert got[0].sharding.spec == spec
  y, state, dx = jax.tree.map(np.asarray, got)
  for group in groups:
    rows = np.concatenate([[2 * d, 2 * d + 1] for d in group])
    first = jax.tree.map(lambda s, d=group[0]: s[d], state)
    own = data.x[rows], data.dy[rows], None
    check((y[rows], first, dx[rows]), wanted(*own))
