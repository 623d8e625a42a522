"""The command line: convert, inspect and fold files of weights.

`normkit`, or `python -m normkit`. A model is a function without arguments that
makes a linen or an nnx module, named as `package.module:function`. A checkpoint
is a file of arrays by the names of the model's leaves, such as `Conv_0/kernel`,
as `normkit convert` writes it, or a folder of orbax.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import importlib
import inspect as signatures
import json
import os
import pathlib
import sys
from typing import Any, NamedTuple

from flax import linen, nnx
import jax
from jax import export
import jax.numpy as jnp

import normkit
from normkit.tools import _checkpoints, _inputs, _views, convert, files
from normkit.tools._extras import needed
from normkit.tools._template import template_of
from normkit.tools.fold import fold
from normkit.tools.inspect import inspect

# What models call the switch of training, and its value in evaluation.
_SWITCHES = {
  'train': False,
  'training': False,
  'is_training': False,
  'deterministic': True,
  'use_running_average': True,
}
_READERS: dict[str, Callable[..., Any]] = {
  'torch': convert.from_torch,
  'keras': convert.from_keras,
}


class Loaded(NamedTuple):
  """A model as a command needs it.

  Attributes:
    variables: what to fill: shapes of linen variables, or an nnx module.
    evaluate: `evaluate(variables, x)`, the outputs in evaluation.
    train: `train(variables, x)` in training, as `inspect` takes it.
  """

  variables: Any
  evaluate: Callable[[Any, Any], Any]
  train: Callable[[Any, Any], Any]

  def collections(self) -> list[str]:
    """The collections of linen variables."""
    return [*self.variables] if isinstance(self.variables, Mapping) else []


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command; returns 0, or 2 after an error, told in one line.

  1 is the status of `inspect` that found an error in the model.

  Examples:
    >>> from normkit.tools import cli
    >>> cli.main(['fold', 'none.safetensors', 'folded.safetensors',
    ...           '--model', 'no_such_module:make', '--input', '1x8'])
    2
  """
  args = _parser().parse_args(argv)
  try:
    status: int = args.run(args) or 0
  except (Exception, SystemExit) as error:  # whatever the model's code raises
    line = ' '.join(str(error).split()) or type(error).__name__
    print(f'normkit {args.command}: error: {line}', file=sys.stderr)
    return 2
  return status


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog='normkit', description=__doc__)
  parser.add_argument(
    '--version', action='version', version=f'normkit {normkit.__version__}'
  )
  commands = parser.add_subparsers(dest='command', required=True)
  for add in (_add_convert, _add_inspect, _add_fold):
    add(commands)
  return parser


def _add_convert(commands: Any) -> None:
  made = _add_command(
    commands,
    'convert',
    _convert,
    'weights of PyTorch or Keras, for a Flax model',
    'normkit convert net.safetensors flax.safetensors --model zoo:net '
    '--input 1x32x32x3 --names names.json --flatten Dense_0=8x4x4',
  )
  made.add_argument(
    '--from', dest='framework', choices=_READERS, default='torch'
  )
  made.add_argument(
    '--names',
    help="'use' or 'order', or a JSON file: names there to paths here, or "
    "both, 'use:FILE'; else as they are",
  )
  made.add_argument(
    '--flatten',
    nargs='*',
    type=_named(_inputs.parse_shape),
    default=[],
    metavar='LAYER=CxHxW',
    help='PyTorch: the shape that was flattened before a dense layer',
  )
  made.add_argument(
    '--ignore', nargs='*', default=[], metavar='NAME', help='names to leave out'
  )
  made.add_argument(
    '--transposed',
    nargs='*',
    metavar='PATTERN',
    help='layers here that are transposed convolutions, if not by that name',
  )
  made.add_argument(
    '--add-to-scale',
    nargs='*',
    type=_named(float),
    default=[],
    metavar='PATTERN=NUMBER',
    help='norms here whose scales in the file lie around another number',
  )
  made.add_argument(
    '--count', type=int, help='updates to store where a batch norm counts them'
  )
  made.add_argument(
    '--inputs-first',
    nargs='*',
    default=[],
    metavar='PATTERN',
    help='PyTorch: layers here whose matrices are (in, out) there (GPT-2)',
  )
  made.add_argument(
    '--scanned',
    nargs='*',
    default=[],
    metavar='PATH',
    help='PyTorch: modules here whose layers are stacked by nn.scan',
  )


def _add_inspect(commands: Any) -> None:
  made = _add_command(
    commands,
    'inspect',
    _inspect,
    'running statistics beside those of data, and advice',
    'normkit inspect flax.safetensors --model zoo:net --input 64x32x32x3 '
    '--data images.npz --framework torch --figure layers.png',
  )
  _add_data(made, required=True)
  made.add_argument('--steps', type=int, help='how many the run had')
  made.add_argument('--framework', help='where the weights come from')
  made.add_argument('--figure', type=pathlib.Path, help='a picture to write')
  made.add_argument(
    '--overwrite', action='store_true', help='replace files that are there'
  )


def _add_fold(commands: Any) -> None:
  made = _add_command(
    commands,
    'fold',
    _fold,
    'norms into the layers beside them, for inference',
    'normkit fold flax.safetensors folded.safetensors --model zoo:net '
    '--input 1x32x32x3 --program folded.jax',
  )
  _add_data(made, required=False)
  made.add_argument(
    '--program',
    type=pathlib.Path,
    help='also write the folded model, by jax.export, for inputs of this shape',
  )


def _add_command(
  commands: Any,
  name: str,
  run: Callable[[Any], int | None],
  text: str,
  example: str,
) -> argparse.ArgumentParser:
  """A command on a file, and what all of them take."""
  made: argparse.ArgumentParser = commands.add_parser(
    name,
    help=text,
    description=text,
    epilog=f'example:\n  {example}',
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  made.set_defaults(run=run)
  made.add_argument('source', type=pathlib.Path, help='the file to read')
  if name != 'convert':
    made.add_argument(
      '--step', type=int, help='of a folder of steps; else the latest'
    )
  if name != 'inspect':
    made.add_argument('target', type=pathlib.Path, help='the file to write')
    made.add_argument(
      '--overwrite', action='store_true', help='replace files that are there'
    )
  made.add_argument(
    '--model',
    required=True,
    metavar='MODULE:FUNCTION',
    help='what makes the model, without arguments',
  )
  made.add_argument(
    '--input',
    required=True,
    type=_inputs.parse,
    metavar='1x32x32x3',
    help='the shape of an input, the batch first; 1x128:int32 of integers',
  )
  return made


def _add_data(parser: argparse.ArgumentParser, required: bool) -> None:
  parser.add_argument(
    '--data',
    type=pathlib.Path,
    required=required,
    help='inputs: an .npz or safetensors file of one array, or of several, '
    "one of them 'images' or 'x'"
    + ('' if required else '; else they are drawn at random'),
  )


def _convert(args: argparse.Namespace) -> None:
  _check_free(args.overwrite, args.target)
  model = _load_model(args.model, args.input)
  options: dict[str, Any] = {
    'ignore': args.ignore,
    'count': args.count,
    'add_to_scale': dict(args.add_to_scale),
  }
  if args.transposed is not None:
    options['transposed'] = args.transposed
  if args.framework == 'torch':
    options['flatten'] = dict(args.flatten)
    options['inputs_first'] = args.inputs_first
    options['scanned'] = args.scanned
  elif args.inputs_first or args.scanned:
    raise ValueError('--inputs-first and --scanned are for PyTorch.')
  elif args.flatten:
    raise ValueError(
      '--flatten is for PyTorch: in Keras channels are last too.'
    )
  arrays = files.load_arrays(args.source)
  names = _names(args, arrays, model)
  read = _READERS[args.framework]
  filled = read(arrays, model.variables, names=names, **options)
  leaves = template_of(filled).leaves
  named = {'/'.join(filter(None, k)): value for k, value in leaves.items()}
  files.save_arrays(args.target, named, overwrite=args.overwrite)
  print(f'{args.target}: {len(named)} arrays')


def _inspect(args: argparse.Namespace) -> int:
  if args.figure is not None:
    _check_free(args.overwrite, args.figure)
    _views.check_ending(args.figure)
  model = _load_model(args.model, args.input)
  variables = _restore(args, model)
  found = inspect(
    model.train,
    variables,
    _inputs.batches(args.data, args.input),
    steps=args.steps,
    framework=args.framework,
  )
  if sys.stdout.isatty():
    with needed('tools'):
      from rich.console import Console  # noqa: PLC0415

    Console().print(found.table())
    print('\n'.join(map(str, found.advice)))
  else:
    print(found)
  if args.figure is not None:
    found.figure().savefig(args.figure)
  return int(any(advice.level == 'error' for advice in found.advice))


def _fold(args: argparse.Namespace) -> None:
  outputs = [args.target, *([args.program] if args.program else [])]
  _check_free(args.overwrite, *outputs)
  model = _load_model(args.model, args.input)
  variables = _restore(args, model)
  if args.data is None:
    x = _inputs.drawn(args.input)
    print('inputs drawn at random: give --data to check on real ones')
  else:
    x = next(iter(_inputs.batches(args.data, args.input)))
  folded = fold(model.evaluate, variables, x)
  print(folded.report)
  program = None
  names = _checkpoints.leaf_names(folded.params, model.collections())
  params = _checkpoints.in_file(folded.params, names)
  if args.program is not None:

    def run(params: Any, x: Any) -> Any:
      shapes = {name: value.shape for name, value in folded.params.items()}
      given = {name: params[here] for name, here in names.items()}
      return folded.apply(
        {k: v.reshape(shapes[k]) for k, v in given.items()}, x
      )

    exported = export.export(jax.jit(run))(params, x)
    program = bytes(exported.serialize())
  files.save_arrays(args.target, params, overwrite=args.overwrite)
  if program is not None:
    files.save_bytes(args.program, program, overwrite=args.overwrite)


def _load_model(name: str, x: jax.ShapeDtypeStruct) -> Loaded:
  """Makes the model that `name` names, for inputs like x."""
  module, _, function = name.partition(':')
  if not module or not function:
    raise ValueError(
      f'--model {name!r} must be MODULE:FUNCTION, such as zoo:net for the '
      'function net in zoo.py.'
    )
  sys.path.insert(0, os.getcwd())
  model = getattr(importlib.import_module(module), function)()
  if isinstance(model, nnx.Module):
    return Loaded(model, _nnx_call(False), _nnx_call(True))
  if not isinstance(model, linen.Module):
    raise TypeError(
      f'--model {name!r} made {type(model).__name__}, where a linen or an nnx '
      'module is needed.'
    )
  known = signatures.signature(model.__call__).parameters
  off: Any = {key: value for key, value in _SWITCHES.items() if key in known}
  on: Any = {key: not value for key, value in off.items()}

  def evaluate(variables: Any, x: Any) -> Any:
    return model.apply(variables, x, **off)

  def train(variables: Any, x: Any) -> Any:
    rngs = {'dropout': jax.random.key(0)}
    return model.apply(variables, x, **on, rngs=rngs, mutable=['batch_stats'])

  try:
    empty = jax.eval_shape(
      lambda: model.init(jax.random.key(0), jnp.zeros_like(x), **off)
    )
  except Exception as error:  # whatever the caller's model raises
    raise ValueError(
      f'{name} does not take an --input of {x.shape} {x.dtype}: {error}'
    ) from error
  return Loaded(empty, evaluate, train)


def _nnx_call(train: bool) -> Callable[[Any, Any], Any]:
  def call(model: Any, x: Any) -> Any:
    (model.train if train else model.eval)()
    return model(x)

  return call


def _restore(args: argparse.Namespace, model: Loaded) -> Any:
  """The model with the arrays of a checkpoint; raises unless all fit."""
  template = template_of(model.variables)
  collections = model.collections()
  return _checkpoints.restore(args.source, template, collections, args.step)


def _names(
  args: argparse.Namespace, arrays: Mapping[str, Any], model: Loaded
) -> Any:
  """What `names` of the converters takes, from the option."""
  given, colon, rest = (args.names or '').partition(':')
  if given != 'use' or (colon and not rest):
    return _names_of(args.names)
  options = {} if args.transposed is None else {'transposed': args.transposed}
  names = convert.match(
    arrays,
    model.variables,
    model.evaluate,
    args.input,
    names=_names_of(rest or None),
    framework=args.framework,
    ignore=args.ignore,
    inputs_first=args.inputs_first,
    **options,
  )
  print(names)
  return names


def _names_of(given: str | None) -> Any:
  """The names of a file, or the word that stands for them."""
  if given in (None, 'order'):
    return given
  try:
    names = json.loads(pathlib.Path(given).read_text())
  except ValueError as error:
    raise ValueError(f'--names {given}: not JSON: {error}') from error
  if not isinstance(names, dict) or not all(
    isinstance(value, str) for value in names.values()
  ):
    raise ValueError(f'--names {given}: not an object of strings.')
  return names


def _check_free(overwrite: bool, *paths: pathlib.Path) -> None:
  """Raises before any work if a file could not, or may not, be written."""
  if len({path.resolve() for path in paths}) < len(paths):
    raise ValueError(f'{str(paths[0])!r} is given for two files')
  for path in paths:
    if not path.parent.is_dir():
      raise FileNotFoundError(f'{str(path.parent)!r} is not a folder')
    files.check_free(path, overwrite)


def _named(read: Callable[[str], Any]) -> Callable[[str], tuple[str, Any]]:
  """The type of an option NAME=VALUE."""

  def value(text: str) -> tuple[str, Any]:
    name, _, rest = text.rpartition('=')
    return name, read(rest)

  return value
