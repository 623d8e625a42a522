"""normkit's Flax modules beside Flax's own, on random arguments and inputs.

Each use is run by both: initialising, training, evaluation and the gradients.
Variables, dtypes and errors must be the same and values agree to rounding,
unless a rule of `rules.py` explains the difference; and normkit's values must
always be those of the float64 reference. The exit status is 1 if a difference
is left unexplained.
"""

import argparse
from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple
import warnings

from flax import linen as nn, nnx
import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from benchmarks import expected, report, wrappers
from benchmarks.draws import AXIS_NAME, NORMS, Case, draw
from benchmarks.rules import (
  RULES,
  SAME_ERROR,
  Count,
  Leaf,
  Verdict,
  close,
  tally,
  tolerance,
)
from normkit.closures import run_traced
import normkit.linen
import normkit.nnx

# The programs are small and run once: most of the time is compilation.
COMPILER_OPTIONS = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
  'xla_allow_excess_precision': False,
}
# Errors that a person should never see, even where Flax raises the same.
ACCIDENTS = (
  IndexError,
  KeyError,
  AttributeError,
  ArithmeticError,
  AssertionError,
)
Outcome = dict[str, Any] | Exception
Traced = jax.stages.Traced | Exception


class Family(NamedTuple):
  """A kind of Flax modules.

  Attributes:
    name: what the tables call it.
    peer: Flax's package of layers.
    ours: normkit's.
    init: `(layers, case, x) -> (y or None, variables)`.
    apply: `(layers, case, train, variables, x, mask) -> (y, statistics)`.
  """

  name: str
  peer: Any
  ours: Any
  init: Callable[..., tuple[Any, Any]]
  apply: Callable[..., tuple[Any, Any]]


def flags(case: Case, train: bool) -> tuple[dict[str, Any], dict[str, Any]]:
  """What batch norm's constructor and call are told of the averages."""
  if case.norm != 'BatchNorm':
    return {}, {}
  flag = {'use_running_average': not train}
  return (
    flag if case.flag in ('constructor', 'both') else {},
    flag if case.flag in ('call', 'both') else {},
  )


def linen_init(layers, case, x):
  fields, call = flags(case, True)
  module = getattr(layers, case.norm)(**case.options, **fields)
  return module.init_with_output(jax.random.key(0), x, **call)


def linen_apply(layers, case, train, variables, x, mask):
  fields, call = flags(case, train)
  module = getattr(layers, case.norm)(**case.options, **fields)
  call |= {'mask': mask, 'mutable': ['batch_stats']}
  y, updates = module.apply(variables, x, **call)
  return y, updates.get('batch_stats', {})


def nnx_module(layers, case, fields):
  if case.flag == 'neither' and case.norm == 'BatchNorm':
    fields = {'use_running_average': None}
  return getattr(layers, case.norm)(
    expected.width(case), **case.options, **fields, rngs=nnx.Rngs(0)
  )


def nnx_init(layers, case, x):
  del x
  module = nnx_module(layers, case, flags(case, True)[0])
  _, params, stats = nnx.split(module, nnx.Param, nnx.BatchStat)
  trees = {'params': params, 'batch_stats': stats}
  return None, {n: nnx.to_pure_dict(tree) for n, tree in trees.items()}


def nnx_apply(layers, case, train, variables, x, mask):
  fields, call = flags(case, train)
  module = nnx_module(layers, case, fields)
  for name, value in (variables['params'] | variables['batch_stats']).items():
    getattr(module, name).set_value(jnp.asarray(value))
  y = module(x, mask=mask, **call)
  return y, {n: getattr(module, n)[...] for n in variables['batch_stats']}


FAMILIES = {
  family.name: family
  for family in (
    Family('linen', nn, normkit.linen, linen_init, linen_apply),
    Family('nnx', nnx, normkit.nnx, nnx_init, nnx_apply),
  )
}


def compare(case: Case, ours: Any = None) -> Verdict:
  """Runs a use of a norm by both and judges the differences.

  Args:
    case: the use.
    ours: the package to take instead of normkit's.
  """
  family = FAMILIES[case.family]
  both = family.peer, ours or family.ours
  verdict = Verdict(set(), [])
  with jax.enable_x64(case.wide), jax.numpy_rank_promotion('allow'):
    first = [initialiser(family, case, layers) for layers in both]
    traced = trace_both(case, first, case.x)
    uses = {'initialise': traced}
    shapes = [u.out_info for u in traced if not isinstance(u, Exception)]
    template = jax.eval_shape(functools.partial(start, case), shapes)
    if template is None:
      judge(case, 'initialise', traced, verdict, None)
      return verdict
    given = checkpoint(case, template)
    arguments = case.x, given['params'], given['batch_stats'], case.dy
    for stage in ('train', 'evaluate')[: 1 + (case.norm == 'BatchNorm')]:
      train = stage == 'train'
      functions = [user(family, case, layers, train) for layers in both]
      uses[stage] = trace_both(case, functions, *arguments)
    found = run_all(uses, *arguments)
    variables = {'initialise': start(case, found['initialise'])}
    for stage, outcomes in found.items():
      judge(case, stage, outcomes, verdict, variables.get(stage, given))
  return verdict


def initialiser(
  family: Family, case: Case, layers: Any
) -> Callable[..., dict[str, Any]]:
  """A function of x: the variables by their paths, and the first output."""

  def initialise(x):
    init = on_devices(case, lambda x, _: family.init(layers, case, x))
    y, variables = init(x)
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    found = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    return found if y is None else found | {'y': y}

  return initialise


def user(
  family: Family, case: Case, layers: Any, train: bool
) -> Callable[..., dict[str, Any]]:
  """A function of what a call takes: output, statistics and gradients."""

  def forward(params, x, stats):
    variables = {'params': params, 'batch_stats': stats}
    return on_devices(
      case,
      lambda x, mask: family.apply(layers, case, train, variables, x, mask),
    )(x)

  def use(x, params, stats, dy):
    inputs = (params, x)[: 1 + jnp.issubdtype(x.dtype, jnp.inexact)]
    y, pull, new = jax.vjp(
      lambda params, x=x: forward(params, x, stats), *inputs, has_aux=True
    )
    dparams, *dx = pull(like(dy, y))
    found = {'y': y, **new, **dict(zip(['dx'], dx, strict=False))}
    return found | {'d' + name: value for name, value in dparams.items()}

  return use


def on_devices(case: Case, function: Callable[..., Any]) -> Callable[..., Any]:
  """The function of x alone, mapped if the case is."""
  if not case.mapped:
    return lambda x: function(jnp.asarray(x), case.mask)
  mapped = jax.vmap(function, axis_name=AXIS_NAME)
  return lambda x: mapped(x, case.mask)


def like(dy: Any, y: Any) -> Any:
  """The cotangent in y's dtype."""
  return (dy if jnp.iscomplexobj(y) else dy.real).astype(y.dtype)


def trace_both(
  case: Case, functions: list[Callable[..., Any]], *arguments: Any
) -> list[Traced]:
  """Flax's and normkit's use, traced, or the errors that this raises.

  normkit's warnings count as errors; not those by which nnx, too, says that it
  keeps the real part of a complex number.
  """
  actions = 'ignore', 'ignore' if expected.narrows(case) else 'error'
  both = zip(functions, actions, strict=True)
  return [trace(function, action, *arguments) for function, action in both]


def trace(function: Callable[..., Any], action: str, *arguments: Any) -> Traced:
  with warnings.catch_warnings():
    warnings.simplefilter(action)
    try:
      return jax.jit(function).trace(*arguments)
    except Exception as error:
      return error


def run_all(
  uses: dict[str, list[Traced]], *arguments: Any
) -> dict[str, list[Outcome]]:
  """What the uses of each stage return, as one program; errors as they are."""

  def run(*arguments):
    return [
      run_traced(use, *arguments[: 1 if stage == 'initialise' else None])
      for stage, both in uses.items()
      for use in both
      if not isinstance(use, Exception)
    ]

  program = jax.jit(run).lower(*arguments).compile(COMPILER_OPTIONS)
  found = iter(jax.tree.map(np.asarray, program(*arguments)))
  return {
    stage: [use if isinstance(use, Exception) else next(found) for use in both]
    for stage, both in uses.items()
  }


def start(case: Case, outcomes: list[Outcome]) -> dict[str, Any] | None:
  """The variables that initialising gave, Flax's if it could."""
  for found in outcomes:
    if not isinstance(found, Exception):
      tree: dict[str, Any] = {'params': {}, 'batch_stats': {}}
      for path, value in found.items():
        if path != 'y':
          collection, name = path.strip("[]'").split("']['")
          tree[collection][name] = value[0] if case.mapped else value
      return tree
  return None


def checkpoint(case: Case, variables: dict[str, Any]) -> dict[str, Any]:
  """Variables like these with other values, as after some training."""
  rng = np.random.default_rng(0)

  def param(value):
    drawn = 1 + rng.standard_normal(value.shape)
    return drawn.astype(case.stored or value.dtype)

  def stat(name, value):
    drawn = rng.uniform(0.5, 2, value.shape) - (name == 'mean')
    return drawn.astype(value.dtype)

  stats = {n: stat(n, v) for n, v in variables['batch_stats'].items()}
  params = {n: param(v) for n, v in variables['params'].items()}
  return {'params': params, 'batch_stats': stats}


def judge(
  case: Case,
  stage: str,
  outcomes: list[Outcome],
  verdict: Verdict,
  given: dict[str, Any] | None,
) -> None:
  """Adds to the verdict what one stage shows."""
  theirs, ours = outcomes
  if isinstance(theirs, Exception) or isinstance(ours, Exception):
    judge_errors(case, stage, theirs, ours, verdict)
  if isinstance(ours, Exception):
    return
  theirs = ours if isinstance(theirs, Exception) else theirs
  for rule in RULES:
    adapted = rule.adapts(case, theirs)
    if adapted is not theirs:
      theirs = adapted
      verdict.rules.add(rule.name)
  if kinds(theirs) != kinds(ours):
    verdict.problems.append(f'{stage}: {kinds(ours)}, Flax {kinds(theirs)}')
    return
  known = facts(case, stage, ours, given)
  for name, value in ours.items():
    if name in known:
      leaf = Leaf(stage, name, theirs[name], value, known[name])
      judge_leaf(case, leaf, verdict)
    elif not np.array_equal(theirs[name], value):
      verdict.problems.append(f'{stage}: other values of {name}')


def judge_errors(
  case: Case, stage: str, theirs: Any, ours: Any, verdict: Verdict
) -> None:
  """Looks for the rule that explains an error of one, or of another class."""
  if type(theirs) is type(ours) and not isinstance(ours, ACCIDENTS):
    verdict.rules.add(SAME_ERROR)
    return
  for rule in RULES:
    if rule.permits(case, theirs, ours):
      verdict.rules.add(rule.name)
      return
  text = (
    f'{type(o).__name__}: {o}' if isinstance(o, Exception) else 'no error'
    for o in (ours, theirs)
  )
  verdict.problems.append(f'{stage}: {", Flax ".join(text)}')


def kinds(arrays: dict[str, Any]) -> dict[str, str]:
  """Dtype and shape of each array, as one text."""
  return {n: f'{v.dtype}{list(v.shape)}' for n, v in sorted(arrays.items())}


def facts(
  case: Case, stage: str, ours: dict[str, Any], given: Any
) -> dict[str, expected.Fact]:
  """What the reference says of one stage."""
  if 'y' not in ours:
    return {}
  first = stage == 'initialise'
  if first:  # without a mask, as is usual
    case = dataclasses.replace(case, mask=None)
  dy = None if first else like(case.dy, ours['y'])
  params, stats = given['params'], given['batch_stats']
  if not case.option('force_float32_reductions', True):
    dtype = case.option('param_dtype', jnp.float32)
    params = {n: v.astype(dtype) for n, v in params.items()}
  pooled = not (first and case.norm == 'BatchNorm')
  return expected.facts(case, params, stats, dy, stage != 'evaluate', pooled)


def judge_leaf(case: Case, leaf: Leaf, verdict: Verdict) -> None:
  """Holds an array to the reference, and to Flax's by the rules."""
  by = tolerance(case, leaf)
  near = close(leaf.ours, leaf.fact.value, by) | leaf.fact.flat
  wrong = np.isfinite(by) & ~(near & np.isfinite(leaf.ours))
  off = ~close(leaf.theirs, leaf.ours, np.nan_to_num(by, posinf=0))
  for rule in RULES:
    claimed = off & rule.claims(case, leaf)
    if claimed.any():
      verdict.rules.add(rule.name)
      off = off & ~claimed
  others = ('reference', leaf.fact.value, wrong), ('Flax', leaf.theirs, off)
  for name, other, where in others:
    if where.any():
      one, two = (
        np.broadcast_to(a, where.shape)[where][:3] for a in (leaf.ours, other)
      )
      verdict.problems.append(f'{leaf.stage}: {leaf.name}: {one}, {name} {two}')


def measure(family: str, norm: str, count: int, seed: int) -> Count:
  """Compares so many uses of one norm."""
  if norm in wrappers.NORMS:
    return wrappers.measure(family, norm, count, seed)
  return tally(
    {
      f'draw({family!r}, {norm!r}, {seed}, {index})': compare(
        draw(family, norm, seed, index)
      )
      for index in range(count)
    }
  )


def tables(counts: dict[tuple[str, str], Count]) -> list[list[list[str]]]:
  """The rows of both tables: of the modules, and of the rules."""
  modules, rules = [], []
  for (family, norm), c in counts.items():
    explained = c.compared - c.equal - c.raised - len(c.unexplained)
    numbers = c.compared, c.equal, c.raised, explained, len(c.unexplained)
    modules.append([f'{family}.{norm}', *map(str, numbers)])
  for rule in (*(rule.name for rule in RULES), *wrappers.RULES):
    needed = [
      sum(c.rules[rule] for (f, _), c in counts.items() if f == family)
      for family in FAMILIES
    ]
    rules.append([rule, *map(str, needed)])
  return [modules, rules]


def run(args: argparse.Namespace) -> int:
  every = *NORMS, *wrappers.NORMS
  chosen = [(family, norm) for family in args.family for norm in every]
  counts = {
    names: measure(*names, args.count, args.seed)
    for names in track(chosen, 'comparing')
  }
  headers = (
    ['module', 'compared', 'equal', SAME_ERROR, 'explained', 'unexplained'],
    ['rule', *FAMILIES],
  )
  titles = 'uses of a module', 'uses in which a rule was needed'
  both = zip(titles, headers, tables(counts), strict=True)
  for name, (title, header, rows) in zip(
    ('dropin', 'rules'), both, strict=True
  ):
    report.publish(name, title, header, rows, args.update)
  unexplained = [text for c in counts.values() for text in c.unexplained]
  print('\n'.join(unexplained) or 'nothing is unexplained')
  return 1 if unexplained else 0


def add_command(commands: Any) -> None:
  parser = commands.add_parser('dropin', help=__doc__.splitlines()[0])
  parser.add_argument(
    '--count', type=int, default=100, help='uses of each module'
  )
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--family', nargs='*', choices=FAMILIES, default=list(FAMILIES)
  )
  report.add_update(parser)
  parser.set_defaults(run=run)
