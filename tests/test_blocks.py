"""A block of each published model, its weights converted and given back.

The block runs in PyTorch with random weights; its twin here is of Flax's layers
and normkit's norms, and all that it has comes from `tools.convert`. Outputs and
gradients are the same, and the weights come back bit by bit.
"""

from collections.abc import Callable
import importlib
from typing import Any, NamedTuple

from cases import draw
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import second_tier

import normkit as nk
from normkit import linen
from normkit.tools import convert

WHY = "blocks as published: pip install 'normkit[peers]'"
BATCH, TOKENS, WIDTH, HEADS, SIZE, HIDDEN = 2, 6, 32, 4, 8, 48
PLAIN = {'epsilon': 1e-6}
LLAMA = PLAIN | {'round_before_scale': True}
GEMMA = PLAIN | {'scale_offset': 1.0}
Array = Any


def published(name: str) -> Any:
  return pytest.importorskip(name, reason=WHY, exc_type=ImportError)


# The twins; names are those of the blocks.


ZEROS = nn.initializers.zeros  # for shapes alone: traced in no time


class Layers(nn.Module):
  """Layers of one dtype, weights too."""

  dtype: Any

  def dense(self, size, name, use_bias=False):
    types = {'dtype': self.dtype, 'param_dtype': self.dtype}
    return nn.Dense(size, use_bias, **types, kernel_init=ZEROS, name=name)

  def conv(self, size, kernel, padding, name, groups=1, use_bias=True):
    return nn.Conv(
      size,
      kernel,
      padding=padding,
      feature_group_count=groups,
      use_bias=use_bias,
      dtype=self.dtype,
      param_dtype=self.dtype,
      kernel_init=ZEROS,
      name=name,
    )

  def norm(self, name, kind=linen.RMSNorm, **options):
    return kind(**options, param_dtype=self.dtype, name=name)


class FeedForward(Layers):
  activation: Callable[[Array], Array] = jax.nn.silu

  @nn.compact
  def __call__(self, x):
    gate = self.activation(self.dense(HIDDEN, 'gate_proj')(x))
    return self.dense(WIDTH, 'down_proj')(
      gate * self.dense(HIDDEN, 'up_proj')(x)
    )


class Attention(Layers):
  """Causal, two queries a key; norms of each head, or of all of them."""

  head_norm: Any = None
  all_heads: bool = False

  @nn.compact
  def __call__(self, x, cos, sin):
    q, k, v = (
      self.dense(heads * SIZE, f'{name}_proj')(x)
      for name, heads in (('q', HEADS), ('k', HEADS // 2), ('v', HEADS // 2))
    )
    if self.all_heads:
      q, k = self.normed(q, k)
    q, k, v = (a.reshape(BATCH, TOKENS, -1, SIZE) for a in (q, k, v))
    if self.head_norm is not None and not self.all_heads:
      q, k = self.normed(q, k)
    q, k = (rotated(a, cos, sin) for a in (q, k))
    k, v = (jnp.repeat(a, 2, axis=2) for a in (k, v))
    logits = jnp.einsum('bthd,bshd->bhts', q, k) * SIZE**-0.5
    is_past = jnp.tril(jnp.ones((1, 1, TOKENS, TOKENS), bool))
    logits = jnp.where(is_past, logits, -jnp.inf).astype(jnp.float32)
    weights = jax.nn.softmax(logits).astype(x.dtype)
    y = jnp.einsum('bhts,bshd->bthd', weights, v)
    return self.dense(WIDTH, 'o_proj')(y.reshape(BATCH, TOKENS, -1))

  def normed(self, q, k):
    names = zip((q, k), ('q_norm', 'k_norm'), strict=True)
    return [self.norm(name, **self.head_norm)(a) for a, name in names]


def rotated(x, cos, sin):
  one, other = jnp.split(x, 2, axis=-1)
  turned = jnp.concatenate([-other, one], -1)
  return x * cos[:, :, None] + turned * sin[:, :, None]


class Llama(Layers):
  """Before each part."""

  @nn.compact
  def __call__(self, x, cos, sin):
    y = self.norm('input_layernorm', **LLAMA)(x)
    x = x + Attention(self.dtype, name='self_attn')(y, cos, sin)
    y = self.norm('post_attention_layernorm', **LLAMA)(x)
    return x + FeedForward(self.dtype, name='mlp')(y)


class Gemma(Layers):
  """Before and after each part; in Gemma 3 of each query and key, too."""

  kind: type = linen.RMSNorm
  options: Any = None
  of_heads: Any = None

  @nn.compact
  def __call__(self, x, cos, sin):
    def norm(name):
      return self.norm(name, self.kind, **self.options)

    y = norm('input_layernorm')(x)
    y = Attention(self.dtype, self.of_heads, name='self_attn')(y, cos, sin)
    x = x + norm('post_attention_layernorm')(y)
    y = norm('pre_feedforward_layernorm')(x)
    gelu = jax.nn.gelu  # by tanh
    y = FeedForward(self.dtype, gelu, name='mlp')(y)
    return x + norm('post_feedforward_layernorm')(y)


class Olmo(Layers):
  """After each part, and of all queries and keys."""

  @nn.compact
  def __call__(self, x, cos, sin):
    y = Attention(self.dtype, PLAIN, True, name='self_attn')(x, cos, sin)
    x = x + self.norm('post_attention_layernorm', **PLAIN)(y)
    y = FeedForward(self.dtype, name='mlp')(x)
    return x + self.norm('post_feedforward_layernorm', **PLAIN)(y)


class DeltaNet(Layers):
  """Gated delta rule, token by token: one head of keys, two of values."""

  @nn.compact
  def __call__(self, x):
    both = self.dense(6 * SIZE, 'in_proj_qkvz')(x)
    q, k, v, z = jnp.split(both, [SIZE, 2 * SIZE, 4 * SIZE], axis=-1)
    write, decay = jnp.split(self.dense(4, 'in_proj_ba')(x), 2, axis=-1)
    mixed = jnp.concatenate([q, k, v], -1)
    causal = self.conv(
      4 * SIZE, (4,), ((3, 0),), 'conv1d', 4 * SIZE, use_bias=False
    )
    mixed = jax.nn.silu(causal(mixed))
    q, k, v = jnp.split(mixed, [SIZE, 2 * SIZE], axis=-1)
    bias = self.param('dt_bias', nn.initializers.ones, (2,), self.dtype)
    log = self.param('A_log', nn.initializers.ones, (2,), self.dtype)
    wide = jnp.float32
    write = jax.nn.sigmoid(write).astype(wide)
    rate = decay.astype(wide) + bias.astype(wide)[None, None]
    rate = -jnp.exp(log.astype(wide))[None, None] * jax.nn.softplus(rate)
    q, k = (nk.l2_norm(a.astype(wide), epsilon=1e-6) for a in (q, k))
    v = v.reshape(BATCH, TOKENS, 2, SIZE).astype(wide)

    def step(state, now):  # (batch, heads, keys, values)
      q, k, v, write, rate = now
      state = state * jnp.exp(rate)[..., None, None]
      held = jnp.einsum('bhkv,bk->bhv', state, k)
      new = (v - held) * write[..., None]
      state = state + jnp.einsum('bk,bhv->bhkv', k, new)
      return state, jnp.einsum('bhkv,bk->bhv', state, q) * SIZE**-0.5

    series = [jnp.moveaxis(a, 1, 0) for a in (q, k, v, write, rate)]
    _, y = jax.lax.scan(step, jnp.zeros((BATCH, 2, SIZE, SIZE), wide), series)
    y = jnp.moveaxis(y, 0, 1).astype(x.dtype)
    norm = self.norm('norm', linen.GatedRMSNorm, **LLAMA)
    y = norm(y, z.reshape(y.shape)).astype(x.dtype)
    return self.dense(WIDTH, 'out_proj')(y.reshape(BATCH, TOKENS, -1))


class QwenNext(Layers):
  @nn.compact
  def __call__(self, x):
    y = self.norm('input_layernorm', **GEMMA)(x)
    x = x + DeltaNet(self.dtype, name='linear_attn')(y)
    y = self.norm('post_attention_layernorm', **GEMMA)(x)
    return x + FeedForward(self.dtype, name='mlp')(y)


class Mixer(Layers):
  """A state space, token by token: four heads, two groups of eight states."""

  @nn.compact
  def __call__(self, x):
    inner, groups, states = HEADS * SIZE, 2, 8
    width = inner + 2 * groups * states
    both = self.dense(inner + width + HEADS, 'in_proj')(x)
    gate, y, rate = jnp.split(both, [inner, inner + width], axis=-1)
    y = jax.nn.silu(self.conv(width, (4,), ((3, 0),), 'conv1d', width)(y))
    wide, ones = jnp.float32, nn.initializers.ones
    bias, log, skip = (
      self.param(name, ones, (HEADS,), self.dtype).astype(wide)
      for name in ('dt_bias', 'A_log', 'D')
    )
    y = y.astype(wide)
    y, write, read = jnp.split(y, [inner, inner + groups * states], axis=-1)
    y = y.reshape(BATCH, TOKENS, HEADS, SIZE)
    write, read = (
      jnp.repeat(a.reshape(BATCH, TOKENS, groups, states), 2, axis=2)
      for a in (write, read)
    )
    rate = jax.nn.softplus(rate.astype(wide) + bias[None, None])

    def step(state, now):  # (batch, heads, features, states)
      y, write, read, rate = now
      kept = jnp.exp(-jnp.exp(log)[None] * rate)[..., None, None]
      new = jnp.einsum('bhd,bhn->bhdn', y * rate[..., None], write)
      state = state * kept + new
      return state, jnp.einsum('bhdn,bhn->bhd', state, read)

    series = [jnp.moveaxis(a, 1, 0) for a in (y, write, read, rate)]
    start = jnp.zeros((BATCH, HEADS, SIZE, states), wide)
    _, found = jax.lax.scan(step, start, series)
    found = jnp.moveaxis(found, 0, 1) + y * skip[None, None, :, None]
    norm = self.norm(
      'norm',
      linen.GatedRMSNorm,
      norm_before_gate=False,
      group_size=inner // groups,
      **LLAMA,
    )
    found = norm(found.reshape(BATCH, TOKENS, inner), gate)
    return self.dense(WIDTH, 'out_proj')(found.astype(x.dtype))


class Mamba(Layers):
  @nn.compact
  def __call__(self, x):
    y = Mixer(self.dtype, name='mixer')(self.norm('norm', **LLAMA)(x))
    return x.astype(jnp.float32) + y.astype(jnp.float32)


class ResponseMLP(Layers):
  """Its matrices are 1 x 1 convolutions where channels are first."""

  by_conv: bool = False

  def matrix(self, size, name):
    if self.by_conv:
      return self.conv(size, (1, 1), 'VALID', name)
    return self.dense(size, name, use_bias=True)

  @nn.compact
  def __call__(self, x):
    x = jax.nn.gelu(self.matrix(4 * SIZE, 'fc1')(x), approximate=False)
    response = nk.GlobalResponseNorm(param_dtype=self.dtype)
    x = linen.Norm(response, name='grn')(x, train=False)
    return self.matrix(SIZE, 'fc2')(x)


class ConvNeXt(Layers):
  """V2's, of channels last."""

  by_conv: bool = False

  @nn.compact
  def __call__(self, x):
    y = self.conv(SIZE, (7, 7), 'SAME', 'conv_dw', SIZE)(x)
    y = self.norm('norm', linen.LayerNorm, **PLAIN)(y)
    return x + ResponseMLP(self.dtype, self.by_conv, name='mlp')(y)


class AdaLNZero(Layers):
  """Modulated, and the gate of a branch on the residual."""

  @nn.compact
  def __call__(self, x, condition):
    dense = self.dense(6 * WIDTH, 'linear', use_bias=True)
    parts = jnp.split(dense(jax.nn.silu(condition)), 6, axis=-1)
    y = nk.adaptive_layer_norm(x, *parts[:2])
    return nk.adaptive_residual(x, y, parts[2])


# The blocks.


def transformer(family, layer, config, **options):
  """A decoder layer of transformers, as a function of arrays alone."""
  torch = published('torch')
  module = published(f'transformers.models.{family}.modeling_{family}')
  configs = importlib.import_module(
    f'transformers.models.{family}.configuration_{family}'
  )
  made = getattr(configs, config)(
    hidden_size=WIDTH,
    intermediate_size=HIDDEN,
    num_hidden_layers=1,
    num_attention_heads=HEADS,
    num_key_value_heads=HEADS // 2,
    head_dim=SIZE,
    rms_norm_eps=1e-6,
    vocab_size=8,
    **options,
  )
  made._attn_implementation = 'eager'
  block = getattr(module, layer)(made, 0).eval()
  mask = torch.full((1, 1, TOKENS, TOKENS), -torch.inf).triu(1)

  def run(x, cos=None, sin=None):
    given = {'position_embeddings': (cos, sin)}
    if cos is not None:
      given['attention_mask'] = mask.to(x.dtype)
    return block(x, **given)

  return block, run


def mamba():
  published('torch')
  module = published('transformers.models.mamba2.modeling_mamba2')
  config = module.Mamba2Config(
    hidden_size=WIDTH,
    num_heads=HEADS,
    head_dim=SIZE,
    expand=1,
    state_size=8,
    n_groups=2,
    chunk_size=4,
    num_hidden_layers=1,
    layer_norm_epsilon=1e-6,
    vocab_size=8,
  )
  block = module.Mamba2Block(config, 0).eval()
  return block, block


def convnext(by_conv):
  published('torch')
  module = published('timm.models.convnext')
  block = module.ConvNeXtBlock(
    SIZE, use_grn=True, ls_init_value=None, conv_mlp=by_conv
  ).eval()
  return block, lambda x: block(x.movedim(-1, 1)).movedim(1, -1)


def ada():
  published('torch')
  module = published('diffusers.models.normalization')
  block = module.AdaLayerNormZero(WIDTH).eval()

  def run(x, condition):
    y, gate, *_ = block(x, emb=condition)
    return x + gate[:, None] * y

  return block, run


class Case(NamedTuple):
  """A block, its twin, what it is given beside x, what is added to scales."""

  make: Callable[[], Any]
  twin: Callable[[Any], nn.Module]
  given: str = ''
  added: Any = None


def gemma_2_block():
  """With logits that are not capped: all of Gemma 2's norms are here."""
  return transformer(
    'gemma2',
    'Gemma2DecoderLayer',
    'Gemma2Config',
    layer_types=['full_attention'],
    query_pre_attn_scalar=SIZE,
    attn_logit_softcapping=None,
  )


def gemma_block():
  kinds = {'layer_types': ['full_attention'], 'query_pre_attn_scalar': SIZE}
  name = 'Gemma3DecoderLayer', 'Gemma3TextConfig'
  return transformer('gemma3', *name, **kinds)


CASES = {
  'llama': Case(
    lambda: transformer('llama', 'LlamaDecoderLayer', 'LlamaConfig'),
    Llama,
    'angles',
  ),
  'gemma2': Case(
    gemma_2_block,
    lambda dtype: Gemma(dtype, linen.RMSNorm, GEMMA),
    'angles',
  ),
  'gemma3': Case(
    gemma_block,
    lambda dtype: Gemma(dtype, linen.RMSNorm, GEMMA, GEMMA),
    'angles',
  ),
  'gemma3_into_flax': Case(
    gemma_block,
    lambda dtype: Gemma(dtype, nn.RMSNorm, PLAIN, GEMMA),
    'angles',
    {'*layernorm': 1.0},
  ),
  'olmo2': Case(
    lambda: transformer('olmo2', 'Olmo2DecoderLayer', 'Olmo2Config'),
    Olmo,
    'angles',
  ),
  'olmo3': Case(
    lambda: transformer(
      'olmo3',
      'Olmo3DecoderLayer',
      'Olmo3Config',
      layer_types=['full_attention'],
    ),
    Olmo,
    'angles',
  ),
  'qwen3_next': Case(
    lambda: transformer(
      'qwen3_next',
      'Qwen3NextDecoderLayer',
      'Qwen3NextConfig',
      layer_types=['linear_attention'],
      num_experts=0,
      linear_num_key_heads=1,
      linear_num_value_heads=2,
      linear_key_head_dim=SIZE,
      linear_value_head_dim=SIZE,
      linear_conv_kernel_dim=4,
    ),
    QwenNext,
  ),
  'mamba2': Case(mamba, Mamba),
  'convnext_v2': Case(lambda: convnext(False), ConvNeXt, 'image'),
  'convnext_v2_channels_first': Case(
    lambda: convnext(True),
    lambda dtype: ConvNeXt(dtype, True),
    'image',
  ),
  'ada_ln_zero': Case(ada, AdaLNZero, 'condition'),
}
FIRST = {'gemma3', 'mamba2', 'convnext_v2'}
# The twins of others, which run in bfloat16 too, or a part of them, as Gemma 2
# is of Gemma 3; 1 + w has no room there.
ROUNDED_ALIKE = {'gemma2', 'olmo3', 'convnext_v2_channels_first'}
ROWS = [
  (name, dtype)
  if name in FIRST and dtype == 'float32'
  else second_tier(name, dtype)
  for name in CASES
  for dtype in ('float32', 'bfloat16')
  if dtype == 'float32' or not (CASES[name].added or name in ROUNDED_ALIKE)
]


def inputs(kind, dtype):
  """x, and what comes beside it."""
  shape = (BATCH, 9, 10, SIZE) if kind == 'image' else (BATCH, TOKENS, WIDTH)
  x = draw(shape, dtype)
  if kind == 'condition':
    return x, draw((BATCH, WIDTH), dtype, seed=1)
  if kind != 'angles':
    return (x,)
  angles = np.outer(np.arange(TOKENS), 10.0 ** -np.arange(SIZE // 2))
  angles = np.concatenate([angles, angles], -1)[None]
  given = (np.asarray(f(angles), dtype) for f in (np.cos, np.sin))
  return x, *map(jax.device_put, given)


def to_torch(torch, a, grad=False):
  tensor = torch.tensor(np.asarray(a, np.float32))
  return tensor.to(getattr(torch, a.dtype.name)).requires_grad_(grad)


def as_float(a):
  a = a.detach().float().numpy() if hasattr(a, 'detach') else a
  return np.asarray(a, np.float32)


def close(actual, desired, tolerance):
  desired = as_float(desired)
  size = np.abs(desired).max() + 1e-30
  np.testing.assert_allclose(
    as_float(actual) / size, desired / size, rtol=0, atol=tolerance
  )


@pytest.mark.parametrize(('name', 'dtype'), ROWS)
def test_block(name, dtype):
  case = CASES[name]
  block, run = case.make()
  torch = published('torch')
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in block.parameters():
      parameter.normal_(std=0.3)
  block.to(getattr(torch, dtype))
  args = inputs(case.given, dtype)
  given = [to_torch(torch, a, not i) for i, a in enumerate(args)]
  y = run(*given)
  dy = draw(y.shape, seed=9)
  y.backward(torch.tensor(np.asarray(dy)).to(y.dtype))
  state = {n: p.detach() for n, p in block.named_parameters()}

  twin = case.twin(jnp.dtype(dtype))
  key = jax.eval_shape(jax.random.key, 0)
  empty = jax.eval_shape(twin.init, key, *args)
  variables = convert.from_torch(state, empty, add_to_scale=case.added)
  back = convert.to_torch(variables, add_to_scale=case.added, like=state)
  assert back.keys() == state.keys()
  for key, tensor in state.items():
    given_back = back[key].astype(np.float32)
    if case.added and 'layernorm' in key:  # 1 + w was rounded
      np.testing.assert_allclose(given_back, as_float(tensor), atol=1e-7)
    else:
      np.testing.assert_array_equal(given_back, as_float(tensor))

  @jax.jit
  def step(variables, x):
    def apply(variables, x):
      return twin.apply(variables, x, *args[1:])

    found, pull = jax.vjp(apply, variables, x)
    return found, *pull(dy.astype(found.dtype))

  with jax.numpy_rank_promotion('allow'):  # Flax adds biases so
    found, dvariables, dx = step(variables, args[0])
  assert found.dtype.name == str(y.dtype).removeprefix('torch.')
  tolerance = 1e-6 if dtype == 'float32' else 0.015
  close(found, y, tolerance)
  close(dx, given[0].grad, 3 * tolerance)
  gradients = {n: p.grad for n, p in block.named_parameters()}
  found = convert.to_torch(dvariables, like=gradients)
  for key, gradient in gradients.items():
    close(found[key], gradient, 3 * tolerance)
