"""The norms of published language models: order of rounding, offset, gate.

Each is held to the published code, where torch and transformers are installed,
and everywhere to the same steps in NumPy.
"""

from collections.abc import Callable
import dataclasses
import importlib
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normkit as nk

DOCS = pathlib.Path(__file__).parents[1] / 'docs'
WHY = 'the published code: pip install torch transformers'
SIZE, GROUP = 64, 16
F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
# Of x and gate, and of the weight.
DTYPES = {
  'float32': (F32, F32),
  'bfloat16': (BF16, BF16),
  'mixed': (BF16, F32),
  'float16': (F16, F16),
}


def wide(x):
  return np.asarray(x, np.float32)


def normalized(x, epsilon=1e-6, size=SIZE, center=False):
  """In float32, from exact statistics."""
  parts = np.asarray(x, np.float64).reshape(*x.shape[:-1], -1, size)
  parts = parts - (parts.mean(-1, keepdims=True) if center else 0)
  var = np.square(parts).mean(-1, keepdims=True)
  return np.float32(parts / np.sqrt(var + epsilon)).reshape(x.shape)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(gate):
  return wide(gate) * sigmoid(wide(gate))


def llama(x, w, gate):
  return w * normalized(x).astype(x.dtype)


def olmo(x, w, gate):
  return (w * normalized(x)).astype(x.dtype)


def gemma(x, w, gate):
  return (normalized(x) * (1 + wide(w))).astype(x.dtype)


def nemotron(x, w, gate):
  return (normalized(x, 1e-5, center=True) * (1 + wide(w))).astype(x.dtype)


def qwen_gated(x, w, gate):
  return (w * normalized(x).astype(x.dtype) * silu(gate)).astype(x.dtype)


def mamba(x, w, gate):
  return w * normalized(wide(x) * silu(gate), size=GROUP).astype(x.dtype)


def falcon(x, w, gate):
  return (w * normalized(x, size=GROUP) * silu(gate)).astype(x.dtype)


def falcon_gate_first(x, w, gate):
  return (w * normalized(wide(x) * silu(gate), size=GROUP)).astype(x.dtype)


def kimi(x, w, gate):
  y = wide(w) * normalized(x) * sigmoid(wide(gate))
  return y.astype(x.dtype)


class Model(NamedTuple):
  """A published class, the same here, and its steps in NumPy."""

  cls: str
  options: dict[str, Any]
  transform: Any
  steps: Callable[..., Any]
  dtypes: tuple[str, ...] = tuple(DTYPES)


_GATED = nk.GatedRMSNorm(round_before_scale=True)
_MAMBA = nk.GatedRMSNorm(
  norm_before_gate=False, group_size=GROUP, round_before_scale=True
)
_GROUPS = {'group_size': GROUP}
_FALCON = {'n_groups': SIZE // GROUP}
_LLAMA, _GEMMA = (
  nk.RMSNorm(round_before_scale=True),
  nk.RMSNorm(scale_offset=1.0),
)
_HALF = ('bfloat16',)
MODELS = {
  'llama': Model('LlamaRMSNorm', {}, _LLAMA, llama),
  'mistral': Model('MistralRMSNorm', {}, _LLAMA, llama, _HALF),
  'qwen2': Model('Qwen2RMSNorm', {}, _LLAMA, llama, _HALF),
  'qwen3': Model('Qwen3RMSNorm', {}, _LLAMA, llama, _HALF),
  'phi3': Model('Phi3RMSNorm', {}, _LLAMA, llama, _HALF),
  'deepseek_v3': Model('DeepseekV3RMSNorm', {}, _LLAMA, llama, _HALF),
  'smollm3': Model('SmolLM3RMSNorm', {}, _LLAMA, llama, _HALF),
  'granite': Model('GraniteRMSNorm', {}, _LLAMA, llama, _HALF),
  'glm4': Model('Glm4RMSNorm', {}, _LLAMA, llama, _HALF),
  'jamba': Model('JambaRMSNorm', {}, _LLAMA, llama, _HALF),
  't5': Model('T5LayerNorm', {}, _LLAMA, llama, _HALF),
  'olmo2': Model('Olmo2RMSNorm', {}, nk.RMSNorm(), olmo),
  'olmo3': Model('Olmo3RMSNorm', {}, nk.RMSNorm(), olmo, _HALF),
  'gemma3n': Model('Gemma3nRMSNorm', {}, nk.RMSNorm(), olmo, _HALF),
  'gemma4': Model('Gemma4RMSNorm', {}, nk.RMSNorm(), olmo, _HALF),
  'gpt_oss': Model('GptOssRMSNorm', {}, nk.RMSNorm(), olmo, _HALF),
  'gemma2': Model('Gemma2RMSNorm', {}, _GEMMA, gemma),
  'gemma3': Model('Gemma3RMSNorm', {}, _GEMMA, gemma, _HALF),
  'qwen3_next': Model('Qwen3NextRMSNorm', {}, _GEMMA, gemma, _HALF),
  'qwen3_5': Model('Qwen3_5RMSNorm', {}, _GEMMA, gemma, _HALF),
  'nemotron': Model(  # it adds the one in half precision, and so loses digits
    'NemotronLayerNorm1P',
    {},
    nk.LayerNorm(scale_offset=1.0, epsilon=1e-5, use_bias=False),
    nemotron,
    ('float32',),
  ),
  'qwen3_next_gated': Model('Qwen3NextRMSNormGated', {}, _GATED, qwen_gated),
  'qwen3_5_gated': Model('Qwen3_5RMSNormGated', {}, _GATED, qwen_gated, _HALF),
  'mamba2': Model('MambaRMSNormGated', _GROUPS, _MAMBA, mamba),
  'bamba': Model('BambaRMSNormGated', _GROUPS, _MAMBA, mamba, _HALF),
  'zamba2': Model('Zamba2RMSNormGated', _GROUPS, _MAMBA, mamba, _HALF),
  'falcon_h1': Model(
    'FalconH1RMSNormGated',
    _FALCON,
    nk.GatedRMSNorm(group_size=GROUP),
    falcon,
  ),
  'falcon_h1_gate_first': Model(
    'FalconH1RMSNormGated',
    _FALCON | {'norm_before_gate': False},
    nk.GatedRMSNorm(group_size=GROUP, norm_before_gate=False),
    falcon_gate_first,
  ),
  'kimi_linear': Model(
    'KimiLinearRMSNormGated',
    {},
    nk.GatedRMSNorm(activation=jax.nn.sigmoid),
    kimi,
  ),
}
FILES = {
  'falcon_h1_gate_first': 'falcon_h1',
  'qwen3_next_gated': 'qwen3_next',
  'qwen3_5_gated': 'qwen3_5',
}
each = pytest.mark.parametrize(
  ('name', 'dtype'),
  [(name, d) for name, model in MODELS.items() for d in model.dtypes],
)


def given(name, dtype):
  """x, the weight, a gate or None, and the gradient of y."""
  rng = np.random.default_rng(0)
  narrow, weight = DTYPES[dtype]
  arrays = [rng.standard_normal((32, SIZE)) for _ in range(3)]
  x, gate, dy = (a.astype(narrow) for a in arrays)
  w = rng.standard_normal(SIZE).astype(weight)
  return 2 * x, w, gate if is_gated(name) else None, dy


def is_gated(name):
  return isinstance(MODELS[name].transform, nk.GatedRMSNorm)


def ours(name, out, x, w, gate):
  """The transform's result of the dtype `out`."""
  transform = dataclasses.replace(MODELS[name].transform, dtype=out)
  args = (jnp.asarray(x),) + (() if gate is None else (jnp.asarray(gate),))
  params = nk.NormParams(jnp.asarray(w))
  return transform.apply(params, nk.EmptyState(), *args, train=True)[0]


def assert_same(actual, desired):
  """Equal but for a few that lie between two numbers of half precision."""
  actual, desired = np.asarray(actual), np.asarray(desired)
  assert actual.dtype == desired.dtype
  if actual.dtype == F32:
    np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-6)
    return
  units = np.abs(
    actual.view(np.int16).astype(int) - desired.view(np.int16).astype(int)
  )
  assert units.max() <= 1
  assert np.mean(units) < 2e-3


@each
def test_steps(name, dtype):
  x, w, gate, _ = given(name, dtype)
  desired = MODELS[name].steps(x, w, gate)
  run = jax.jit(ours, static_argnums=(0, 1))
  assert_same(run(name, desired.dtype, x, w, gate), desired)


@pytest.mark.parametrize('name', ['llama', 'qwen3_next_gated', 'mamba2'])
def test_the_order_of_rounding_shows(name):
  """Or the test above could not fail."""
  x, w, gate, _ = given(name, 'bfloat16')
  transform = dataclasses.replace(
    MODELS[name].transform, round_before_scale=False
  )
  args = (jnp.asarray(x),) + (() if gate is None else (jnp.asarray(gate),))
  params = nk.NormParams(jnp.asarray(w))
  y, _ = transform.apply(params, nk.EmptyState(), *args, train=True)
  with pytest.raises(AssertionError):
    assert_same(y, MODELS[name].steps(x, w, gate))


def published(name):
  """The published layer."""
  torch = pytest.importorskip('torch', reason=WHY)
  pytest.importorskip('transformers', reason=WHY)
  file = FILES.get(name, name)
  module = importlib.import_module(
    f'transformers.models.{file}.modeling_{file}'
  )
  layer = getattr(module, MODELS[name].cls)(SIZE, **MODELS[name].options)
  if getattr(layer, 'bias', None) is not None:
    torch.nn.init.zeros_(layer.bias)
  return torch, layer


def to_torch(torch, a, grad=True):
  tensor = torch.tensor(wide(a)).to(getattr(torch, a.dtype.name))
  return tensor.requires_grad_(grad)


def to_numpy(torch, a):
  dtype = str(a.dtype).removeprefix('torch.')
  return a.detach().to(torch.float32).numpy().astype(jnp.dtype(dtype))


@each
def test_published(name, dtype):
  """Values to a unit in the last place, and gradients."""
  torch, layer = published(name)
  arrays = given(name, dtype)
  x, w, gate, dy = (
    None if a is None else to_torch(torch, a, i < 3)
    for i, a in enumerate(arrays)
  )
  layer.weight = torch.nn.Parameter(w)
  y = layer(x) if gate is None else layer(x, gate)
  out = to_numpy(torch, y)
  run = jax.jit(ours, static_argnums=(0, 1))
  assert_same(run(name, out.dtype, *arrays[:3]), out)
  y.backward(dy.to(y.dtype))
  _, pull = jax.vjp(lambda *a: ours(name, out.dtype, *a), *arrays[:3])
  found = pull(jnp.asarray(arrays[3], out.dtype))
  desired = [x.grad, layer.weight.grad, None if gate is None else gate.grad]
  tolerance = 1e-5 if dtype == 'float32' else 2e-2
  for actual, tensor in zip(found, desired, strict=True):
    if tensor is not None:
      grad = to_numpy(torch, tensor)
      assert actual.dtype == grad.dtype
      size = np.abs(wide(grad)).max()
      error = np.abs(wide(actual) - wide(grad)).max()
      assert error <= tolerance * size


# The page.


def calls_of_page():
  """What each row of the page says of the models that it names in brackets."""
  page = (DOCS / 'models.md').read_text()
  rows = re.findall(
    r'^\| .* \| `(nk\..*?)` \| (.*?) \|.*\| ((?:`\w+`(?:, )?)+) \|$',
    page,
    re.M,
  )
  names = {'nk': nk, 'jax': jax}
  for call, epsilons, models in rows:
    usual, *others = epsilons.split('; ')
    own = dict(re.fullmatch(r'`(\w+)` (\S+)', o).groups() for o in others)
    for name in re.findall(r'`(\w+)`', models):
      yield name, eval(call, names), float(own.get(name, usual))


def test_the_page_says_what_was_compared():
  """Each model here once, with the options that the tests hold it to."""
  found = {name: call for name, call, _ in calls_of_page()}
  assert found == {name: model.transform for name, model in MODELS.items()}


def test_the_page_says_the_epsilon_of_each():
  """What the configuration class says unless told otherwise."""
  pytest.importorskip('torch', reason=WHY)
  pytest.importorskip('transformers', reason=WHY)
  names = 'rms_norm_eps', 'layer_norm_epsilon', 'norm_eps'
  wrong = {}
  for name, _, epsilon in calls_of_page():
    file = FILES.get(name, name)
    module = importlib.import_module(
      f'transformers.models.{file}.configuration_{file}'
    )
    configs = {
      config
      for key, config in vars(module).items()
      if key.endswith('Config') and config.__module__ == module.__name__
    }
    given = {getattr(c, n) for c in configs for n in names if hasattr(c, n)}
    if given != {epsilon}:
      wrong[name] = epsilon, given
  assert not wrong
