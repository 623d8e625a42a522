"""Public models, weights at random, converted into their twins in Flax."""

import argparse
from collections.abc import Callable
import dataclasses
import functools
import os
import re
from typing import Any

import jax
import numpy as np
from rich.progress import track

from benchmarks import report, twins
from normkit import linen
from normkit.tools import convert
from normkit.tools.fold import fold

HEADER = [
  'model',
  'converted, error',
  'back, bit for bit',
  'layers compared',
  'the worst of them',
  'norms folded',
  'folded, error',
]


@dataclasses.dataclass
class Converted:
  """What became of a model.

  Attributes:
    error: how far the outputs are apart, as a share of the largest.
    back: whether all arrays came back as they were.
    compared: what the comparison of layers found, for models of PyTorch.
    folded: what folding found.
  """

  error: float
  back: bool
  compared: convert.Comparison | None
  folded: Any


def norm(framework: str, **options: Any) -> Callable[..., Any]:
  """Batch norm in evaluation as another framework has it."""
  options = convert.batch_norm_options(framework, **options)
  return functools.partial(linen.BatchNorm, use_running_average=True, **options)


TORCH = norm('torch')
LAYER = functools.partial(linen.LayerNorm, epsilon=1e-6)


def renamed(*rules: tuple[str, str]) -> Callable[[str], str]:
  """A function of names: patterns and what stands for them, in this order."""

  def rename(layer: str) -> str:
    for pattern, new in rules:
      layer = re.sub(pattern, new, layer)
    return layer.replace('.', '/')

  return rename


def images(size: int, seed: int = 0) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return rng.normal(size=(4, size, size, 3)).astype(np.float32)


def of_torch(
  module: Any, twin: Any, x: np.ndarray, names: Any = None
) -> Converted:
  """A model of PyTorch: there, back, compared, folded."""
  import torch

  settle_torch(torch, module, x)
  state = {k: v.clone() for k, v in module.state_dict().items()}
  empty = jax.eval_shape(twin.init, jax.random.key(0), x)
  variables = convert.from_torch(state, empty, names=names)
  back = convert.as_tensors(
    convert.to_torch(variables, names=names, like=state)
  )
  same = all(torch.equal(back[name], value) for name, value in state.items())
  found = convert.compare(module, twin, variables, x, names=names)
  return Converted(found.error, same, found, folded(twin, variables, x))


def settle_torch(torch: Any, module: Any, x: np.ndarray) -> None:
  """Draws what is zero or one at first, and trains statistics on batches."""
  torch.manual_seed(0)
  momentums = {
    m: m.momentum for m in module.modules() if hasattr(m, 'momentum')
  }
  for layer in momentums:
    layer.momentum = None  # a plain average
  with torch.no_grad():
    for parameter in module.parameters():
      if parameter.ndim < 2:
        parameter.uniform_(0.5, 1.5)
      elif parameter.std() < 1e-3:
        parameter.normal_(0, 0.02)
    module.train()
    if x.ndim > 2:
      for _ in range(8):
        module(torch.randn(8, 3, *x.shape[1:3]))
  for layer, momentum in momentums.items():
    layer.momentum = momentum
  module.eval()


def folded(twin: Any, variables: Any, x: np.ndarray) -> Any:
  """What becomes of the norms; of tokens, nothing is traced."""
  if not np.issubdtype(x.dtype, np.floating):
    return None
  return fold(twin.apply, variables, x).report


def of_haiku(
  net: Callable[[Any, bool], Any], twin: Any, x: np.ndarray, names: Any
) -> Converted:
  """A model of Haiku: there, back, and folded."""
  import haiku as hk

  model = hk.without_apply_rng(hk.transform_with_state(net))
  init = jax.jit(lambda key, x: model.init(key, x, True))
  params, state = init(jax.random.key(0), x)
  params = drawn(params)
  train = jax.jit(lambda s, x: model.apply(params, s, x, True)[1])
  for seed in range(8):
    state = train(state, images(x.shape[1], seed))
  wanted = jax.jit(lambda x: model.apply(params, state, x, False)[0])(x)
  empty = jax.eval_shape(twin.init, jax.random.key(0), x)
  variables = convert.from_haiku(params, state, empty, names=names)
  back = convert.to_haiku(variables, (params, state), names=names)
  found = against(wanted, twin, variables, x)
  return dataclasses.replace(found, back=alike(back, (params, state)))


def drawn(params: Any) -> Any:
  """Parameters of which those are drawn that are zero or one at first."""
  rng = np.random.default_rng(0)

  def draw(a):
    if a.squeeze().ndim < 2:
      return rng.uniform(0.5, 1.5, a.shape).astype(a.dtype)
    return a if a.any() else rng.normal(0, 0.02, a.shape).astype(a.dtype)

  return jax.tree.map(draw, params)


def of_keras(model: Any, twin: Any, x: np.ndarray, names: Any) -> Converted:
  """A model of Keras: there, back, and folded."""
  model.set_weights(
    [w if w.ndim > 1 else abs(w) + 0.5 for w in model.get_weights()]
  )
  for layer in model.layers:
    if hasattr(layer, 'momentum'):
      layer.momentum = 0.3
  for seed in range(8):
    model(images(x.shape[1], seed), training=True)
  weights = {
    layer.name: layer.get_weights() for layer in model.layers if layer.weights
  }
  empty = jax.eval_shape(twin.init, jax.random.key(0), x)
  variables = convert.from_keras(weights, empty, names=names)
  back = convert.to_keras(variables, weights, names=names)
  found = against(model(x, training=False), twin, variables, x)
  return dataclasses.replace(found, back=alike(back, weights))


def alike(one: Any, other: Any) -> bool:
  """Whether two trees of arrays are the same, bit for bit."""
  same = jax.tree.map(np.array_equal, one, other)
  return all(jax.tree.leaves(same))


def against(wanted: Any, twin: Any, variables: Any, x: np.ndarray) -> Converted:
  """Outputs compared alone; nothing has come back yet."""
  wanted, y = np.asarray(wanted), np.asarray(jax.jit(twin.apply)(variables, x))
  error = float(np.abs(y - wanted).max() / np.abs(wanted).max())
  return Converted(error, False, None, folded(twin, variables, x))


# The models, each in its public size, or with options a small one.


def timm_resnet(layers=(2, 2, 2, 2), size=64):
  from timm.models import resnet

  module = resnet.ResNet(resnet.BasicBlock, list(layers))
  return of_torch(module, twins.ResNet(TORCH, layers), images(size))


def timm_efficientnet(size=64):
  import timm

  module = timm.create_model('efficientnet_b0')
  return of_torch(module, twins.EfficientNet(TORCH), images(size))


def timm_convnext(depths=(2, 2, 6, 2), widths=(40, 80, 160, 320), size=64):
  from timm.models import convnext

  module = convnext.ConvNeXt(depths=depths, dims=widths, conv_mlp=True)
  return of_torch(module, twins.ConvNeXt(LAYER, depths, widths), images(size))


def timm_vit(width=192, depth=12, heads=3, size=64):
  from timm.models import vision_transformer as vit

  module = vit.VisionTransformer(
    size, 16, 3, 1000, 'token', width, depth, heads
  )
  return of_torch(module, twins.ViT(16, width, depth, heads), images(size))


def torchvision_resnet(size=64):
  import torchvision

  module = torchvision.models.resnet50(weights=None)
  twin = twins.ResNet(TORCH, (3, 4, 6, 3), bottleneck=True)
  return of_torch(module, twin, images(size))


def transformers_vit(width=64, depth=4, heads=4, size=32):
  from transformers import ViTConfig, ViTModel

  config = ViTConfig(
    hidden_size=width,
    num_hidden_layers=depth,
    num_attention_heads=heads,
    intermediate_size=4 * width,
    image_size=size,
    patch_size=8,
  )
  module = ViTModel(config, add_pooling_layer=False)
  twin = twins.ViT(
    *(8, width, depth, heads, 1e-12, None), positions='position_embeddings'
  )
  names = renamed(
    (r'^embeddings$', ''),
    (r'^embeddings\.patch_embeddings\.projection', 'patch_embed.proj'),
    ('^layers', 'blocks'),
    ('attention', 'attn'),
    ('^layernorm', 'norm'),
    ('layernorm_before', 'norm1'),
    ('layernorm_after', 'norm2'),
  )
  return of_torch(module, twin, images(size), names)


def transformers_bert(width=64, depth=4, heads=4):
  from transformers import BertConfig, BertModel

  config = BertConfig(
    vocab_size=100,
    hidden_size=width,
    num_hidden_layers=depth,
    num_attention_heads=heads,
    intermediate_size=4 * width,
    max_position_embeddings=16,
  )
  twin = twins.BERT(100, 16, width, depth, heads)
  names = renamed(
    (r'^embeddings\.(\w+)_embeddings', r'\1'),
    (r'^token_type', 'type'),
    (r'^embeddings\.LayerNorm', 'norm'),
    (r'^encoder\.layer', 'blocks'),
    (r'attention\.self', 'attn'),
    (r'attention\.output\.dense', 'attn.out'),
    (r'attention\.output\.LayerNorm', 'norm1'),
    (r'intermediate\.dense', 'mlp.fc1'),
    (r'output\.dense', 'mlp.fc2'),
    (r'output\.LayerNorm', 'norm2'),
    (r'pooler\.dense', 'pooler'),
  )
  x = np.random.default_rng(0).integers(0, 100, (4, 12), np.int32)
  return of_torch(BertModel(config), twin, x, names)


def haiku_resnet(layers=(2, 2, 2, 2), size=64):
  import haiku as hk

  def net(x, is_training):
    groups = {'channels_per_group': (64, 128, 256, 512), 'bottleneck': False}
    projections = (False, True, True, True)
    return hk.nets.ResNet(
      layers, 1000, **groups, use_projection=projections, name='net'
    )(x, is_training)

  options = {'momentum': 0.9}
  twin = twins.ResNet(norm('haiku', **options), layers, same=True)
  names = renamed(
    ('/~/', '.'),
    (r'^net\.', ''),
    ('initial_conv', 'conv1'),
    ('initial_batchnorm', 'bn1'),
    (r'block_group_(\d)', lambda m: f'layer{int(m[1]) + 1}'),
    (r'\.block_', '.'),
    (r'\.conv_(\d)', lambda m: f'.conv{int(m[1]) + 1}'),
    (r'\.batchnorm_(\d)', lambda m: f'.bn{int(m[1]) + 1}'),
    ('shortcut_conv', 'downsample.0'),
    ('shortcut_batchnorm', 'downsample.1'),
    ('logits', 'fc'),
  )
  return of_haiku(net, twin, images(size), names)


WIDTHS = (64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


def haiku_mobilenet(widths=WIDTHS, strides=STRIDES, size=64):
  import haiku as hk

  def net(x, is_training):
    mobile = hk.nets.MobileNetV1(strides, widths, name='net')
    return mobile(x, is_training)

  def number(match):
    return f'_{match[1] or 0}'

  kind = norm('haiku', momentum=0.999)
  twin = twins.MobileNet(kind, widths, strides, 32, first_padding=0)
  block = r'mobile_net_v1_block(?:_(\d+))?\.'
  names = renamed(
    ('/~/|/', '.'),
    (r'^net\.', ''),
    (r'^conv2_d$', 'conv'),
    (r'^batch_norm$', 'bn'),
    (f'{block}(depthwise|pointwise)_conv', lambda m: f'{m[2]}_{m[1] or 0}'),
    (f'{block}batch_norm$', lambda m: f'depthwise_bn_{m[1] or 0}'),
    (f'{block}batch_norm_1$', lambda m: f'pointwise_bn_{m[1] or 0}'),
  )
  return of_haiku(net, twin, images(size), names)


def keras_mobilenet(alpha=0.25, size=64):
  os.environ.setdefault('KERAS_BACKEND', 'jax')
  import keras

  model = keras.applications.MobileNet(
    (size, size, 3), alpha, weights=None, classifier_activation=None
  )
  widths = [int(alpha * width) for width in WIDTHS]
  twin = twins.MobileNet(
    norm('keras'),
    *(widths, STRIDES, int(alpha * 32)),
    padding='SAME',
    first_padding='SAME',
    activation=jax.nn.relu6,
    by_conv=True,
  )
  names = renamed(
    (r'^conv1$', 'conv'),
    (r'^conv1_bn$', 'bn'),
    (r'^conv_dw_(\d+)', lambda m: f'depthwise_{int(m[1]) - 1}'),
    (r'^conv_pw_(\d+)', lambda m: f'pointwise_{int(m[1]) - 1}'),
    (r'^(\w+)_(\d+)_bn', r'\1_bn_\2'),
    ('^conv_preds$', 'logits'),
  )
  return of_keras(model, twin, images(size), names)


MODELS = {
  'timm resnet18': timm_resnet,
  'timm efficientnet_b0': timm_efficientnet,
  'timm convnext_atto': timm_convnext,
  'timm vit_tiny_patch16': timm_vit,
  'torchvision resnet50': torchvision_resnet,
  'transformers ViTModel': transformers_vit,
  'transformers BertModel': transformers_bert,
  'haiku ResNet18': haiku_resnet,
  'haiku MobileNetV1': haiku_mobilenet,
  'keras MobileNet': keras_mobilenet,
}


def cells(found: Converted) -> list[str]:
  """A row without its name."""
  compared, rows = found.compared, found.folded.rows if found.folded else ()
  layers = compared.layers[:-1] if compared else ()
  folds = [row for row in rows if row.layer]
  return [
    f'{found.error:.0e}',
    'yes' if found.back else 'no',
    str(len(layers)) if compared else '-',
    f'{max(row.error for row in layers):.0e}' if compared else '-',
    f'{len(folds)} of {len(rows)}' if rows else '-',
    f'{found.folded.error:.0e}' if folds and found.folded.compared else '-',
  ]


def is_right(found: Converted) -> bool:
  """Whether the twin computes the same, folded too, and all came back."""
  compared, fold = found.compared, found.folded
  return (
    found.error < 1e-5
    and found.back
    and (compared is None or (compared.agrees and not compared.causes))
    and (fold is None or (fold.compared and fold.error < 1e-5))
  )


def run(args: argparse.Namespace) -> int:
  rows, failed = [], []
  for name in track(args.model, 'models'):
    found = MODELS[name]()
    rows.append([name, *cells(found)])
    if not is_right(found):
      failed.append(f'{name}\n{found.compared or found.error}')
  report.publish(
    'conversions', 'Public models in Flax', HEADER, rows, args.update
  )
  print('\n'.join(failed))
  return bool(failed)


def add_command(commands: Any) -> None:
  parser = commands.add_parser(
    'conversions', help='public models converted, compared, folded'
  )
  parser.add_argument('--model', nargs='*', choices=MODELS, default=[*MODELS])
  report.add_update(parser)
  parser.set_defaults(run=run)
