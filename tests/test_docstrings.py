"""Sentences that many docstrings need, once; all of them are held to these.

Editors read a docstring from the source, so each function and transform has all
of its arguments written out. An argument that means something else somewhere
has words of its own there, and that place is named here.
"""

import dataclasses
import inspect
import re

import pytest

import normkit as nk
import normkit.linen
import normkit.nnx
import normkit.weights

_SHARE = 'the share of the old running value that is kept, in [0, 1]'
_EITHER = 'a number or a scalar array'
_KERNELS = "'triton', 'mosaic_gpu' or 'mosaic_tpu', kernels for"
SENTENCES = {
  'axis_index_groups': [
    'groups of indices of `axis_name`, each pooled by itself.'
  ],
  'axis_name': [
    f'names of mapped axes over which {what} pooled.'
    for what in ('statistics are', 'sums are', 'batches are', 'Var_B is')
  ]
  + [
    'names of mapped axes over which sums are pooled, of the places, not of '
    'the channels.'
  ],
  'dtype': [
    f'dtype of {what}; None keeps {whose}.'
    for what in ('the result', 'y', 'the normalized weights')
    for whose in ("x's", "weight's", "each weight's")
  ],
  'implementation': [
    "'xla', or None to choose.",
    "'mosaic_gpu', 'xla', or None to choose.",
    "'triton', 'mosaic_gpu', 'mosaic_tpu', 'xla', or None to choose.",
    f'{_KERNELS} channels last without mask and pooling; '
    "'xla'; or None to choose.",
  ],
  'param_dtype': [
    f'dtype of the {what} that `init` makes.'
    for what in ('parameters', 'parameter', 'u and sigma', 'scales', 'gains')
  ],
  'scale_offset': [
    'added to the parameter to make the scale.',
    'added to the parameter to make the scale; with 1 it starts at zero, as in '
    'Gemma.',
    'added to `scale`, in float32 or wider; 1 for weights around zero, as in '
    'Gemma.',
    'added to `scale`, in float32 or wider; 1 for weights around zero, as in '
    'Nemotron.',
  ],
  'round_before_scale': [
    f"round the normalized values to x's dtype before {rest}, as in {models}."
    for rest in (
      'the scale multiplies them',
      '`scale` multiplies them, and their product to the wider dtype of both',
    )
    for models in ('Llama', 'Mamba 2 and Qwen3-Next')
  ],
  'use_scale': ['whether there is a scale.', 'whether there are scales.'],
  'use_bias': ['whether there is a bias.'],
  'batch_axis': ['the examples, an axis or several; () for a single example.'],
  'momentum': [
    f'{_SHARE}; {_EITHER}.',
    f'{_SHARE}, {_EITHER}, as in Flax. None weighs all updates equally.',
    f"{_SHARE}, {_EITHER}, as in Flax (PyTorch's 0.1 is 0.9 here). None weighs "
    'all updates equally.',
  ],
}
# Which of them mean something else, and where.
OWN = {
  'moments': {'axis_index_groups', 'axis_name', 'dtype'},
  'normalize': {'implementation'},  # of any axes
  'quantized_rms_norm': {'dtype'},  # of eight bits
  'quantized_layer_norm': {'dtype'},
  'streaming_norm': {'momentum'},  # of batches
  'WeightStandardization': {'dtype'},
}
_ENTRY = re.compile(r'^  (\w+(?:,\s+\w+)*):\s*(\S.*(?:\n   .*)*)', re.MULTILINE)
_SECTION = r'^(?:Args|Attributes):\n((?:  .*\n|\n)+)'


def entries(value):
  """The arguments that a docstring has, and what it says of them."""
  doc = f'{inspect.getdoc(value)}\n'
  for section in re.findall(_SECTION, doc, re.MULTILINE):
    for names, text in _ENTRY.findall(section):
      for name in re.split(r',\s+', names):
        yield name, ' '.join(text.split())


def documented():
  return [*rows()]


def rows():
  for module in (nk, normkit.weights):
    for name in module.__all__:
      yield pytest.param(name, getattr(module, name), id=name)


def stray(name, value):
  """What a docstring says otherwise than the table."""
  return {
    argument: text
    for argument, text in entries(value)
    if argument in SENTENCES.keys() - OWN.get(name, set())
    and text not in SENTENCES[argument]
    and not text.startswith('as `')  # another norm has it
  }


@pytest.mark.parametrize(('name', 'value'), documented())
def test_sentences(name, value):
  assert not stray(name, value)


def test_every_sentence_is_used():
  used = {
    (argument, text)
    for param in documented()
    for argument, text in entries(param.values[1])
  }
  for argument in SENTENCES.keys() - {'dtype'}:
    for text in SENTENCES[argument]:
      assert (argument, text) in used


def test_a_stray_sentence_is_found():
  def function(axis_name):
    """Nothing.

    Args:
      axis_name: whatever.
    """

  assert stray('function', function) == {'axis_name': 'whatever.'}


PAIRS = {
  'batch_norm': nk.BatchNorm,
  'batch_renorm': nk.BatchRenorm,
  'derf': nk.Derf,
  'dyt': nk.DyT,
  'evonorm_b0': nk.EvoNormB0,
  'evonorm_s0': nk.EvoNormS0,
  'filter_response_norm': nk.FilterResponseNorm,
  'gated_rms_norm': nk.GatedRMSNorm,
  'global_response_norm': nk.GlobalResponseNorm,
  'group_norm': nk.GroupNorm,
  'instance_norm': nk.InstanceNorm,
  'iterative_whitening': nk.IterativeWhitening,
  'l2_norm': nk.ScaleNorm,
  'layer_norm': nk.LayerNorm,
  'rms_norm': nk.RMSNorm,
  'streaming_norm': nk.StreamingNorm,
}
# Fields that need be no options of the function: of parameters, or their shape.
OF_PARAMETERS = {
  'alpha',
  'group_size',
  'param_dtype',
  'scale_offset',
  'shift',
  'use_bias',
  'use_scale',
  'use_threshold',
}


def options(function):
  parameters = inspect.signature(function).parameters.values()
  names = {p.name for p in parameters if p.kind == p.KEYWORD_ONLY}
  return names - {'train', 'where'}


def fields(transform):
  return {field.name for field in dataclasses.fields(transform)}


def test_every_transform_has_its_function():
  transforms = {
    value
    for name in nk.__all__
    if hasattr(value := getattr(nk, name), 'apply') and value is not nk.Norm
  }
  assert transforms == {*PAIRS.values()}


@pytest.mark.parametrize('name', PAIRS)
def test_functions_and_transforms_have_the_same_options(name):
  """Or an option would be lost on the way, or could not be asked for."""
  of_function, of_transform = options(getattr(nk, name)), fields(PAIRS[name])
  assert of_function <= of_transform
  assert of_transform - of_function <= OF_PARAMETERS


@pytest.mark.parametrize('name', PAIRS)
def test_every_argument_is_told(name):
  function, transform = getattr(nk, name), PAIRS[name]
  arguments = inspect.signature(function).parameters.keys()
  assert arguments <= dict(entries(function)).keys()
  assert fields(transform) <= dict(entries(transform)).keys()
