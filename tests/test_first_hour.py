"""What goes wrong in a first hour: each message names the mend."""

import copy
import functools
import inspect
import pickle
import sys
import types

from flax import nnx
import jax
import numpy as np
import pytest

import normkit as nk
import normkit.linen
import normkit.nnx
from normkit.tools import _checkpoints, _views, cli, files

X = np.ones((4, 3, 6), np.float32)
IMAGES = np.ones((2, 3, 8, 8), np.float32)  # channels first
KEY = jax.random.key(0)
BN, LN = nk.BatchNorm(), nk.LayerNorm()
NUMBERS = np.zeros(6, np.float32)
PARAMS = nk.NormParams(NUMBERS + 1, NUMBERS)
STATE = nk.BatchNormState(NUMBERS, NUMBERS + 1, np.zeros(6, np.int32))
EVERY = (
  nk.BatchNorm(),
  nk.BatchRenorm(),
  nk.Derf(),
  nk.DyT(),
  nk.EvoNormB0(),
  nk.EvoNormS0(num_groups=2),
  nk.FilterResponseNorm(),
  nk.GatedRMSNorm(),
  nk.GlobalResponseNorm(),
  nk.GroupNorm(num_groups=2),
  nk.InstanceNorm(),
  nk.IterativeWhitening(group_size=2),
  nk.LayerNorm(),
  nk.RMSNorm(),
  nk.ScaleNorm(),
  nk.StreamingNorm(),
)


def trace(function, *args):
  """Traced, as under jit; nothing is compiled."""
  return jax.eval_shape(function, *args)


def layers(name, *args, **options):
  return getattr(normkit.nnx, name)(*args, rngs=nnx.Rngs(0), **options)


def modules(name, **options):
  return getattr(normkit.linen, name)(**options)


def wrapped(transform, x=X, **options):
  return trace(lambda: normkit.linen.Norm(transform).init(KEY, x, **options))


def state_of(x, **options):
  return nk.BatchNorm(**options).init(jax.ShapeDtypeStruct(x.shape, x.dtype))[1]


FAULTS = {
  # A shape for an input.
  'shape-nnx': (
    lambda: normkit.nnx.Norm(LN, (8, 4)),
    TypeError,
    r'got tuple.*jax.ShapeDtypeStruct\(\(8, 4\), jnp.float32\)',
  ),
  'width-nnx': (
    lambda: normkit.nnx.Norm(LN, 8),
    TypeError,
    'x must be an array or a jax.ShapeDtypeStruct, got int',
  ),
  'shape-layer-nnx': (
    lambda: layers('LayerNorm', (3, 6)),
    TypeError,
    r'num_features must be an integer, got \(3, 6\).*the product',
  ),
  'shape-function': (
    lambda: nk.layer_norm(X, (6,)),
    ValueError,
    'If that is a width or shape: axis= says which axes',
  ),
  'width-function': (
    lambda: nk.layer_norm(X, 6),
    ValueError,
    'If that is a width or shape',
  ),
  # Channels first.
  'channels-scale': (
    lambda: trace(nk.layer_norm, IMAGES, np.ones(3)),
    ValueError,
    r'Axis 1 of x has that size.*axis=1.*moveaxis\(x, 1, -1\)',
  ),
  'channels-state': (
    lambda: nk.batch_norm(IMAGES, state_of(IMAGES, axis=1), train=True),
    ValueError,
    'state.mean.*Axis 1 of x has that size.*axis=1',
  ),
  'channels-groups': (
    lambda: nk.GroupNorm(num_groups=3).init(IMAGES),
    ValueError,
    'num_groups=3 .*Axis 1 of x.*axis=1',
  ),
  'channels-nnx': (
    lambda: layers('BatchNorm', 3)(IMAGES),
    ValueError,
    'num_features is 3.*Axis 1 of x.*axis=1',
  ),
  # Other libraries' words.
  'eps': (lambda: nk.layer_norm(X, eps=1e-5), TypeError, 'eps is epsilon here'),
  'eps-transform': (lambda: nk.RMSNorm(eps=1), TypeError, 'eps is epsilon'),
  'eps-linen': (lambda: modules('GroupNorm', eps=1), TypeError, 'is epsilon'),
  'eps-nnx': (lambda: layers('LayerNorm', 6, eps=1), TypeError, 'is epsilon'),
  'affine': (
    lambda: nk.BatchNorm(affine=False),
    TypeError,
    'affine is use_bias and use_scale here',
  ),
  'affine-rms': (
    lambda: nk.RMSNorm(elementwise_affine=False),
    TypeError,
    'elementwise_affine is use_scale here',
  ),
  'decay_rate': (
    lambda: nk.BatchNorm(decay_rate=0.9),
    TypeError,
    "decay_rate is momentum here: the share of the old .*PyTorch's 0.1 is 0.9",
  ),
  'num_features': (
    lambda: nk.BatchNorm(num_features=6),
    TypeError,
    'num_features is not needed: the width is found from the input',
  ),
  'normalized_shape': (
    lambda: layers('LayerNorm', normalized_shape=6),
    TypeError,
    'normalized_shape is num_features here',
  ),
  'weight': (
    lambda: nk.layer_norm(X, weight=NUMBERS, eps=1e-5),
    TypeError,
    'weight is scale here. eps is epsilon here',
  ),
  'running_mean': (
    lambda: nk.batch_norm(X, running_mean=NUMBERS, train=True),
    TypeError,
    'running_mean is state here',
  ),
  'mask': (lambda: nk.layer_norm(X, mask=X > 0), TypeError, 'mask is where'),
  'mask-apply': (
    lambda: BN.apply(PARAMS, STATE, X, train=True, mask=X > 0),
    TypeError,
    'mask is where here: True where an element counts',
  ),
  'where-linen': (
    lambda: modules('LayerNorm').init(KEY, X, where=X > 0),
    TypeError,
    'where is mask here',
  ),
  'training': (
    lambda: BN.apply(PARAMS, STATE, X, training=True),
    TypeError,
    'training is train here',
  ),
  'inference': (
    lambda: nk.batch_norm(X, STATE, inference=True),
    TypeError,
    'inference is train here: True in training, False in evaluation',
  ),
  'train-linen': (
    lambda: modules('BatchNorm').init(KEY, X, train=True),
    TypeError,
    'train is use_running_average here: False in training',
  ),
  'train-nnx': (
    lambda: layers('BatchNorm', 6)(X, train=True),
    TypeError,
    'train is use_running_average here: False in training',
  ),
  'average-norm': (
    lambda: wrapped(BN, use_running_average=False),
    TypeError,
    'use_running_average is train here',
  ),
  # By position.
  'train-position': (
    lambda: BN.apply(PARAMS, STATE, X, True),
    TypeError,
    'positional arguments: params, state, x; all else by name: train=True',
  ),
  'train-position-function': (
    lambda: nk.batch_norm(X, STATE, *PARAMS, True),
    TypeError,
    'positional arguments: x, state, scale, bias; .* train=True',
  ),
  'train-position-norm': (
    lambda: normkit.linen.Norm(BN).init(KEY, X, True),
    TypeError,
    'all else by name: train=True',
  ),
  'groups-position': (
    lambda: nk.GroupNorm(8),
    TypeError,
    'positional arguments: none; all else by name: num_groups=8',
  ),
  'groups-position-function': (
    lambda: nk.group_norm(X, *PARAMS, 2),
    TypeError,
    'all else by name: num_groups=2',
  ),
  'width-position': (
    lambda: nk.LayerNorm(6),
    TypeError,
    'If that is the width: it is found from the input',
  ),
  'key': (
    lambda: BN.init(KEY),
    TypeError,
    'got a random key.*init takes x alone',
  ),
  'key-position': (
    lambda: BN.init(KEY, X),
    TypeError,
    'Its positional arguments: x',
  ),
  'no-state': (
    lambda: BN.apply(PARAMS, X, train=True),
    TypeError,
    "missing .*'x'. The order is params, state, x.",
  ),
  'no-state-function': (
    lambda: nk.batch_norm(X, train=True),
    TypeError,
    "missing .*'state'. The order is x, state, scale, bias.",
  ),
  # One thing for another.
  'class': (
    lambda: wrapped(nk.LayerNorm, train=True),
    TypeError,
    r'got the class LayerNorm. Make one: LayerNorm\(',
  ),
  'class-nnx': (
    lambda: normkit.nnx.Norm(nk.LayerNorm, X),
    TypeError,
    'got the class LayerNorm',
  ),
  'class-init': (
    lambda: nk.BatchNorm.init(X),
    TypeError,
    'Call it on an instance, not on the class',
  ),
  'module': (
    lambda: wrapped(modules('LayerNorm'), train=True),
    TypeError,
    'transform must have init and apply.*a Flax module needs no Norm',
  ),
  'module-nnx': (
    lambda: normkit.nnx.Norm(layers('LayerNorm', 6), X),
    TypeError,
    'transform must have init and apply',
  ),
  'function': (
    lambda: wrapped(nk.layer_norm, train=True),
    TypeError,
    'got layer_norm',
  ),
  # Traced.
  'traced-train': (
    lambda: trace(lambda t: wrapped(BN, train=t), True),
    TypeError,
    'train must be True or False.*static_argnames',
  ),
  'traced-linen': (
    lambda: trace(
      lambda t: modules('BatchNorm').init(KEY, X, use_running_average=t), True
    ),
    TypeError,
    'use_running_average must be True or False.*static_argnames',
  ),
  'traced-nnx': (
    lambda: trace(
      lambda t: layers('BatchNorm', 6)(X, use_running_average=t), True
    ),
    TypeError,
    'use_running_average must be True or False.*static_argnames',
  ),
  # No mapped axis.
  'unbound': (
    lambda: nk.batch_norm(X, STATE, train=True, axis_name='batch'),
    NameError,
    "axis_name='batch' names no mapped axis.*jax.vmap.*leave axis_name out",
  ),
  'unbound-layer': (
    lambda: trace(lambda x: nk.layer_norm(x, axis_name='batch'), X),
    NameError,
    "axis_name='batch' names no mapped axis",
  ),
  'unbound-groups': (
    lambda: trace(
      lambda x: nk.layer_norm(x, axis_name='i', axis_index_groups=[[0]]), X
    ),
    NameError,
    "axis_name='i' names no mapped axis",
  ),
  'one-example': (
    lambda: jax.vmap(lambda x: nk.batch_norm(x, state_of(x), train=True))(
      X[:, 0]
    ),
    ValueError,
    'under jax.vmap or jax.pmap, axis_name shares it',
  ),
  'no-axes': (
    lambda: nk.layer_norm(np.float32(1)),
    ValueError,
    'an input of rank 0: it has none',
  ),
  # No such dtype.
  'dtype': (
    lambda: nk.layer_norm(X, dtype='bf16'),
    TypeError,
    "dtype must be a dtype, got 'bf16'.*'bfloat16'",
  ),
  # In another order.
  'params-state': (
    lambda: BN.apply(STATE, PARAMS, X, train=True),
    ValueError,
    r'params must be .*got BatchNormState\(mean=an array.*params, state and x',
  ),
  'params-x': (
    lambda: BN.apply(X, PARAMS, STATE, train=True),
    ValueError,
    r'params must be .*got an array of shape \(4, 3, 6\).*params, state and x',
  ),
  'x-state': (
    lambda: BN.apply(PARAMS, X, STATE, train=True),
    TypeError,
    'x must be an array, got BatchNormState. The order is x, state',
  ),
  'state-params': (
    lambda: nk.batch_norm(X, PARAMS, train=True),
    ValueError,
    r'state must be BatchNormState.*got NormParams\(scale=an array',
  ),
  'mean-var': (
    lambda: nk.batch_norm(X, NUMBERS, NUMBERS + 1, train=False),
    ValueError,
    r'or make BatchNormState\(mean, var, count\) of arrays',
  ),
  'tuple-state': (
    lambda: nk.batch_norm(X, (NUMBERS, NUMBERS + 1), train=False),
    ValueError,
    r'or make BatchNormState\(mean, var, count\) of arrays',
  ),
  'params-for-scale': (
    lambda: nk.layer_norm(np.ones((2, 6), np.float32), PARAMS),
    TypeError,
    'scale must be an array, got NormParams',
  ),
  'scale-x': (
    lambda: nk.layer_norm(NUMBERS, X),
    ValueError,
    'If that is x: it comes first',
  ),
  'mask-for-scale': (
    lambda: nk.layer_norm(X, X > 0),
    TypeError,
    'scale must hold numbers.*where=',
  ),
  'mask-position': (
    lambda: nk.batch_norm(X, STATE, np.ones((4, 3, 1), int), train=True),
    TypeError,
    r'scale holds integers.*where=scale.astype\(bool\)',
  ),
  'mask-position-full': (
    lambda: nk.layer_norm(X, *PARAMS, X > 0),
    TypeError,
    'positional arguments: x, scale, bias; .* If that is a mask: where=',
  ),
  'mask-position-apply': (
    lambda: BN.apply(PARAMS, STATE, X, X > 0, train=True),
    TypeError,
    'If that is a mask: where=',
  ),
  'mask-position-linen': (
    lambda: modules('LayerNorm').init(KEY, X, X > 0),
    TypeError,
    'If that is a mask: mask=',
  ),
  # Masks of other kinds.
  'mask-modules': (
    lambda: layers('LayerNorm', 6)(X, mask=np.ones((4, 3, 1), int)),
    ValueError,
    r'mask must be boolean.*int.*mask.astype\(bool\)',
  ),
  'mask-norm': (
    lambda: normkit.nnx.Norm(LN, X)(X, mask=np.ones((4, 3, 1), int)),
    ValueError,
    r'mask must be boolean.*int.*mask.astype\(bool\)',
  ),
  'mask-norm-linen': (
    lambda: wrapped(LN, train=True, mask=np.ones((4, 3), int)),
    ValueError,
    r'give mask\[..., None\]',
  ),
  'mask-first-axes': (
    lambda: nk.layer_norm(X, where=np.ones((4, 3), bool)),
    ValueError,
    r'its axes are the first of x, give where\[..., None\]',
  ),
  'mask-examples': (
    lambda: nk.layer_norm(X, where=np.ones(4, bool)),
    ValueError,
    r'give where\[..., None, None\]',
  ),
  'mask-string': (
    lambda: nk.layer_norm(X, where='valid'),
    TypeError,
    "where must be an array of booleans, got 'valid'",
  ),
  # Dtypes.
  'dtype-eight-bits': (
    lambda: nk.quantized_rms_norm(X, dtype='float8'),
    TypeError,
    'dtype must be float8_e4m3fn or float8_e5m2, got float8',
  ),
  'dtype-integers': (
    lambda: nk.layer_norm(X, dtype=int),
    TypeError,
    r'dtype must have a floating-point.*int.* dtype=jnp.float32',
  ),
  'dtype-init': (
    lambda: nk.LayerNorm(param_dtype=int),
    TypeError,
    r'param_dtype must have.* param_dtype=jnp.float32',
  ),
  # What Orbax gives back without a target.
  'restored-params': (
    lambda: BN.apply(PARAMS._asdict(), STATE, X, train=True),
    ValueError,
    r'got a dict of scale, bias.*normkit.NormParams\(\*\*params\)',
  ),
  'restored-state': (
    lambda: BN.apply(PARAMS, STATE._asdict(), X, train=True),
    ValueError,
    r'got a dict of mean, var, count.*normkit.BatchNormState\(\*\*state\)',
  ),
  'restored-none': (
    lambda: LN.apply(PARAMS, None, X, train=True),
    ValueError,
    r'got NoneType.*make it one: normkit.EmptyState\(\)',
  ),
  'restored-whitening': (
    lambda: nk.iterative_whitening(
      X, dict.fromkeys(nk.WhiteningState._fields, 0), train=True
    ),
    ValueError,
    r'normkit.WhiteningState\(\*\*state\)',
  ),
}


@pytest.mark.parametrize(
  ('make', 'error', 'message'), FAULTS.values(), ids=FAULTS
)
def test_names_the_mend(make, error, message):
  with pytest.raises(error, match=f'(?s){message}'):
    make()


def calls(x=X, **options):
  """Each transform's call."""
  for transform in EVERY:
    params, state = trace(transform.init, X)
    call = functools.partial(transform.apply, x=x, train=True, **options)
    yield functools.partial(trace, call, params, state)


@pytest.mark.parametrize('dtype', ['int32', 'float32'])
def test_a_mask_of_numbers(dtype):
  """Every norm names both ways to make it boolean."""
  for call in calls(where=np.ones((4, 3, 1), dtype)):
    with pytest.raises(TypeError, match=dtype) as caught:
      call()
    assert 'where.astype(bool)' in str(caught.value)
    assert 'jnp.arange(n) < lengths' in str(caught.value)


def test_an_input_of_integers():
  for call in calls(X.astype('int32')):
    with pytest.raises(TypeError, match=r'int32.*x.astype\(jnp.float32\)'):
      call()


def test_a_dtype_of_eight_bits_by_name():
  q, _ = trace(functools.partial(nk.quantized_rms_norm, dtype='float8_e5m2'), X)
  assert q.dtype == 'float8_e5m2'


def test_the_mends_of_masks():
  """They are what the messages say."""
  numbers, lengths = np.array([[1, 1, 0]] * 4), np.array([3, 2, 1, 3])
  for where in (numbers.astype(bool), np.arange(3) < lengths[:, None]):
    y = trace(
      lambda x, where=where: nk.layer_norm(x, where=where[..., None]), X
    )
    assert y.shape == X.shape
  wrapped(LN, train=True, mask=numbers[..., None])  # linen casts, as Flax


@pytest.mark.parametrize('transform', EVERY, ids=lambda t: type(t).__name__)
def test_every_init_refuses_a_shape(transform):
  with pytest.raises(TypeError, match=r'jax.ShapeDtypeStruct\(\(8, 6\)'):
    transform.init((8, 6))


def test_every_transform_is_there():
  names = {n for n in nk.__all__ if hasattr(getattr(nk, n), 'apply')}
  assert names - {'Norm'} == {type(t).__name__ for t in EVERY}


def test_the_mends_of_restored_trees():
  """They are what the messages say."""
  y, state = trace(
    lambda params, state: BN.apply(
      nk.NormParams(**params), nk.BatchNormState(**state), X, train=True
    ),
    PARAMS._asdict(),
    STATE._asdict(),
  )
  assert y.shape == X.shape
  assert isinstance(state, nk.BatchNormState)


def test_no_axis_is_guessed():
  """Where no other axis has the size, and of the batch, none is named."""
  for size in (5, 2):
    with pytest.raises(ValueError, match='fits neither') as caught:
      nk.layer_norm(IMAGES, np.ones(size))
    assert 'has that size' not in str(caught.value)


def test_other_type_errors_are_as_they_were():
  """What is raised inside, and words that nobody uses."""
  with pytest.raises(TypeError, match='x must be an array, got list'):
    nk.layer_norm([1.0])
  for make in (lambda: nk.layer_norm(X, sprockets=1), lambda: LN(X)):
    with pytest.raises(TypeError) as caught:
      make()
    assert ' here' not in str(caught.value)
  with pytest.raises(TypeError, match='sprockets'):
    nk.LayerNorm(sprockets=1)


def test_functions_are_what_they_were():
  """Their names, signatures and docstrings, and they can be pickled."""
  for name in nk.__all__:
    function = getattr(nk, name)
    if inspect.isfunction(function):
      plain = inspect.unwrap(function)
      assert plain.__name__ == name
      assert inspect.signature(function) == inspect.signature(plain)
      assert function.__doc__ == plain.__doc__
      assert pickle.loads(pickle.dumps(function)) is function


def test_transforms_are_what_they_were():
  apply = inspect.signature(nk.BatchNorm.apply)
  names = [*apply.parameters]
  assert names == ['self', 'params', 'state', 'x', 'train', 'where']
  fields = inspect.signature(nk.GroupNorm).parameters
  assert 'num_groups' in fields and 'options' not in fields
  for norm in EVERY:
    assert copy.copy(norm) == norm
  assert pickle.loads(pickle.dumps(BN)) == BN


def test_own_transforms_have_their_own_words():
  class Mine(nk.LayerNorm):
    def __init__(self, size, *, eps):
      super().__init__(epsilon=eps * size)

  class Any(nk.LayerNorm):
    def __init__(self, *args, **options):
      super().__init__(epsilon=args[0] * options['size'])

  assert Mine(6, eps=0.5).epsilon == Mine(size=6, eps=0.5).epsilon == 3
  assert Any(0.5, 1, 2, size=6).epsilon == 3


@pytest.mark.parametrize('missing', ['safetensors', 'orbax', 'matplotlib'])
def test_a_missing_extra(missing, monkeypatch, tmp_path):
  """As where it is not installed."""
  monkeypatch.setitem(sys.modules, missing, None)
  for name in [n for n in sys.modules if n.startswith(f'{missing}.')]:
    monkeypatch.setitem(sys.modules, name, None)
  mend = r"pip install 'normkit\[tools\]'.*checkout.* '\.\[tools\]'"
  uses = {
    'safetensors': lambda: files.save_arrays(tmp_path / 'a', {'x': X}),
    'orbax': lambda: _checkpoints._read_tree(tmp_path),
    'matplotlib': lambda: _views.figure(()),
  }
  with pytest.raises(ModuleNotFoundError, match=mend):
    uses[missing]()


def test_version(capsys):
  with pytest.raises(SystemExit, match='0'):
    cli.main(['--version'])
  assert capsys.readouterr().out == f'normkit {nk.__version__}\n'


@pytest.mark.parametrize(('level', 'status'), [('error', 1), ('warning', 0)])
def test_status_of_inspect(level, status, monkeypatch, capsys):
  """An error in the model is one for whoever called the command."""
  found = types.SimpleNamespace(advice=[types.SimpleNamespace(level=level)])
  for module, name in (
    (cli, '_load_model'),
    (cli, '_restore'),
    (cli._inputs, 'batches'),
  ):
    monkeypatch.setattr(
      module, name, lambda *_: types.SimpleNamespace(train=None)
    )
  monkeypatch.setattr(cli, 'inspect', lambda *_, **__: found)
  args = ['--model=zoo:net', '--input=1x4', '--data=x.npz']
  assert cli.main(['inspect', 'flax.safetensors', *args]) == status
  assert level in capsys.readouterr().out


def test_packages_are_imported_when_asked():
  """That `import normkit` imports none of them, test_package.py holds."""
  assert nk.__getattr__('linen') is normkit.linen
  assert nk.tools.__getattr__('fold').__name__ == 'normkit.tools.fold'
  for package in nk, nk.tools:
    with pytest.raises(AttributeError, match=f"module '{package.__name__}'"):
      package.lynen  # noqa: B018
