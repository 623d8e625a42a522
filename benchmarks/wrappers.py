"""WeightNorm and SpectralNorm beside Flax's, around random layers.

Each use makes a layer, wraps it by both, and takes the output, the statistics
and the gradients of one call. Each of normkit's outputs must be that of the
references in float64, and its gradients their slope.
"""

import re
from typing import Any, NamedTuple
import warnings

from flax import linen as nn, nnx, traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.draws import Draw
from benchmarks.rules import SAME_ERROR, Count, Verdict, tally
import normkit.linen
import normkit.nnx
from tests import reference

NORMS = 'WeightNorm', 'SpectralNorm'
KEY = jax.random.key(0)
FLOAT, HALF, COMPLEX = jnp.float32, jnp.bfloat16, jnp.complex64
STEP = 1e-6  # of the slope
# The parts that differ by intent, each with its reason in docs/flax.md.
KERNEL = 'the kernel is never overwritten'
LAYER_DTYPE = "parameters keep the layer's own dtype"
STORED = 'u and sigma keep the dtype they are stored in'
ZEROS = 'a kernel of zeros leaves u as it was'
LENGTHS = 'complex weights have real lengths'
SCALES = 'scales are nnx.Param'
RULES = LENGTHS, ZEROS, STORED, LAYER_DTYPE, KERNEL, SCALES
Arrays = dict[str, np.ndarray]


class Use(NamedTuple):
  """A layer, how it is wrapped and called.

  Attributes:
    family: 'linen' or 'nnx'.
    norm: the name of the module.
    options: the constructor's arguments.
    kind: 'dense' or 'conv'.
    dtype: that of the layer's weights.
    update: whether the call of spectral norm keeps its statistics.
    zeros: whether the kernel is zero.
  """

  family: str
  norm: str
  options: dict[str, Any]
  kind: str
  dtype: Any
  update: bool
  zeros: bool

  @property
  def flags(self) -> dict[str, bool]:
    spectral = self.norm == 'SpectralNorm'
    return {'update_stats': self.update} if spectral else {}

  @property
  def tolerance(self) -> float:
    dtypes = self.dtype, *(self.options[n] for n in ('dtype', 'param_dtype'))
    return 0.03 if HALF in dtypes else 2e-5

  @property
  def layer(self) -> dict[str, Any]:
    zeros = {'kernel_init': nn.initializers.zeros} if self.zeros else {}
    return {'param_dtype': self.dtype} | zeros


def normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
  values = np.random.default_rng(seed).standard_normal(shape)
  return values.astype(np.float32)


def input_of(use: Use) -> np.ndarray:
  return normal((4, 6) if use.kind == 'dense' else (2, 7, 6), 1)


def draw(family: str, norm: str, *seed: int) -> Use:
  """A random use of a module; the same for the same seed."""
  rng = Draw(NORMS.index(norm), *seed)
  dtype = rng.pick((FLOAT,) * 5 + (HALF,) * 2 + (COMPLEX,))
  dtypes = (None, None, None, FLOAT, FLOAT, HALF, HALF, jnp.int32)
  options = {
    'epsilon': rng.pick((1e-12, 1e-3, 0.0)),
    'dtype': None if dtype == COMPLEX else rng.pick(dtypes),
    'param_dtype': rng.pick((FLOAT, FLOAT, HALF)),
  }
  own = draw_weight_norm if norm == 'WeightNorm' else draw_spectral_norm
  options |= own(rng)
  if family == 'nnx':  # where Flax 0.12.8 cannot draw
    options.pop('scale_init', None)
  kind = rng.pick(('dense', 'conv'))
  return Use(
    *(family, norm, options, kind, dtype),
    update=rng.chance(0.7),
    zeros=rng.chance(0.1),
  )


def draw_weight_norm(rng: Draw) -> dict[str, Any]:
  options = {
    'feature_axes': rng.pick((-1, 0, None, (0, -1), (-1, -1))),
    'use_scale': rng.pick((True, True, False)),
  }
  return options | rng.some({'scale_init': (nn.initializers.normal(),)}, 0.4)


def draw_spectral_norm(rng: Draw) -> dict[str, Any]:
  steps = {'n_steps': rng.pick((0, 1, 1, 3))}
  return steps | rng.some({'error_on_non_matrix': (True,)}, 0.2)


def part(path: str) -> str:
  """What a variable of either family is: kernel, bias, scale, u or sigma."""
  return 'scale' if 'scale' in path else re.findall(r'\w+', path)[-1]


def parts(prefix: str, flat: dict[str, Any]) -> Arrays:
  return {prefix + part(path): np.asarray(v) for path, v in flat.items()}


def loss_of(y: Any) -> Any:
  return jnp.sum(y.real.astype(FLOAT) * normal(y.shape, 2))


def run_linen(package: Any, use: Use, start: Any) -> tuple[Arrays, Any]:
  """What one module makes and gives, from variables or from its own."""
  if use.kind == 'dense':
    layer = nn.Dense(5, **use.layer)
  else:
    layer = nn.Conv(5, (3,), **use.layer)
  module, x = getattr(package, use.norm)(layer, **use.options), input_of(use)
  first, made = module.init_with_output(KEY, x, **use.flags)
  variables = start or made

  def loss(params, x):
    given = {**variables, 'params': params}
    y, new = module.apply(given, x, mutable=['batch_stats'], **use.flags)
    return loss_of(y), (y, new)

  run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  (_, (y, new)), (grads, dx) = run(variables['params'], x)
  flat = {
    prefix: parts(prefix, traverse_util.flatten_dict(tree, sep='/'))
    for prefix, tree in (('', made), ('new ', new), ('d', grads))
  }
  found = {'first y': first, 'y': y, 'dx': dx}
  return flat[''] | flat['new '] | flat['d'] | as_numpy(found), variables


def run_nnx(package: Any, use: Use, start: Any) -> tuple[Arrays, Any]:
  """What one module makes and gives; its keys are the same for both."""
  del start
  rngs = nnx.Rngs(0)
  if use.kind == 'dense':
    layer = nnx.Linear(6, 5, **use.layer, rngs=rngs)
  else:
    layer = nnx.Conv(6, 5, (3,), **use.layer, rngs=rngs)
  module = getattr(package, use.norm)(layer, **use.options, rngs=rngs)
  found = parts('', arrays(nnx.state(module)))
  found['keys drawn'] = rngs.default.count[...]

  def loss(module, x):
    y = module(x, **use.flags)
    return loss_of(y), y

  run = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True))
  (_, y), (grads, dx) = run(module, jnp.asarray(input_of(use)))
  found |= parts('new ', arrays(nnx.state(module))) | parts('d', arrays(grads))
  return as_numpy(found | {'y': y, 'dx': dx}), None


def arrays(state: Any) -> dict[str, Any]:
  """The arrays of a state by their paths, of variables or bare."""
  flat = nnx.to_flat_state(state)
  return {
    '/'.join(map(str, path)): v[...] if isinstance(v, nnx.Variable) else v
    for path, v in flat
  }


def as_numpy(found: dict[str, Any]) -> Arrays:
  return {name: np.asarray(value) for name, value in found.items()}


PACKAGES = {
  'linen': (run_linen, nn, normkit.linen),
  'nnx': (run_nnx, nnx, normkit.nnx),
}


def run_both(use: Use) -> list[Arrays | Exception]:
  """What Flax's and normkit's give, or raise; normkit's warnings are errors."""
  run, *packages = PACKAGES[use.family]
  outcomes, start = [], None
  for package, action in zip(packages, ('ignore', 'error'), strict=True):
    with warnings.catch_warnings():
      warnings.simplefilter(action)
      try:
        found, start = run(package, use, start)
      except Exception as error:
        found = error
    outcomes.append(found)
    start = None if use.zeros else start  # Flax's may be NaN
  return outcomes


def compare(use: Use) -> Verdict:
  """Runs a use by both and judges the differences."""
  theirs, ours = run_both(use)
  verdict = Verdict(set(), [])
  if isinstance(ours, Exception):
    judge_error(use, theirs, ours, verdict)
    return verdict
  if isinstance(theirs, Exception):
    verdict.problems.append(f'no error, Flax {theirs!r}')
    return verdict
  for name in sorted({*theirs, *ours}):
    judge(use, name, theirs, ours, verdict)
  if use.family == 'nnx':
    check_kept(ours, verdict)
  given = theirs if use.family == 'linen' and not use.zeros else ours
  check_reference(use, given, ours, verdict)
  return verdict


def check_kept(ours: Arrays, verdict: Verdict) -> None:
  """A call may change statistics, and nothing else."""
  for name in {'kernel', 'bias', 'scale'} & {*ours}:
    if not np.array_equal(ours['new ' + name], ours[name]):
      verdict.problems.append(f'new {name}: {ours["new " + name]}')


def judge_error(use: Use, theirs: Any, ours: Any, verdict: Verdict) -> None:
  refused = use.norm == 'SpectralNorm' and use.dtype == COMPLEX
  if type(theirs) is type(ours):
    verdict.rules.add(SAME_ERROR)
  elif refused and isinstance(ours, TypeError):
    verdict.rules.add(LENGTHS)
  else:
    told = repr(theirs) if isinstance(theirs, Exception) else 'no error'
    verdict.problems.append(f'{ours!r}, Flax {told}')


def judge(
  use: Use, name: str, theirs: Arrays, ours: Arrays, verdict: Verdict
) -> None:
  """Holds one array to Flax's, by the rules."""
  if name == 'dscale' and name not in theirs:  # Flax's scales may be bare
    return
  if {name} - {*theirs} or {name} - {*ours}:
    verdict.problems.append(f'{name}: one of the two lacks it')
    return
  one, two = ours[name], theirs[name]
  if one.dtype != two.dtype:
    note(verdict, dtype_rule(use, name, ours), name, one.dtype, two.dtype)
  if one.shape != two.shape or not near(one, two, use.tolerance):
    note(verdict, value_rule(use, name, ours), name, one, two)


def note(verdict: Verdict, rule: str, name: str, one: Any, two: Any) -> None:
  if rule:
    verdict.rules.add(rule)
  else:
    verdict.problems.append(f'{name}: {one}, Flax {two}')


def near(one: Any, two: Any, by: float) -> bool:
  one, two = reference.wide(one), reference.wide(two)
  size = max(1, np.max(np.abs(two), initial=0))
  return np.allclose(one, two, rtol=0, atol=by * size)


def dtype_rule(use: Use, name: str, ours: Arrays) -> str:
  """The rule by which an array may be of another dtype than Flax's."""
  stored = name.removeprefix('new ')
  own = ours[name].dtype == use.options['param_dtype']
  if name in ('u', 'sigma') and own and use.family == 'linen':
    return STORED  # as the first call left them
  if part(name) == 'scale' and own and use.family == 'nnx':
    return SCALES
  if name != stored and ours[name].dtype == ours[stored].dtype:
    return STORED if stored in ('u', 'sigma') else KERNEL
  layers = name.removeprefix('d') in ('kernel', 'bias')
  layers = layers and ours[name].dtype == use.dtype
  return LAYER_DTYPE if layers and use.family == 'linen' else ''


def value_rule(use: Use, name: str, ours: Arrays) -> str:
  """The rule by which an array may have other values than Flax's."""
  if name == 'new kernel':
    return KERNEL if np.array_equal(ours[name], ours['kernel']) else ''
  made = name in ('kernel', 'bias', 'scale', 'u', 'sigma', 'keys drawn')
  if made and use.family == 'nnx':  # linen's are those after the first call
    return ''
  if use.zeros:
    return ZEROS
  return LENGTHS if use.dtype == COMPLEX else ''


def check_reference(
  use: Use, given: Arrays, ours: Arrays, verdict: Verdict
) -> None:
  """Holds the output, the statistics and the gradients to float64."""
  names = 'kernel', 'bias', 'scale', 'u'
  values = {n: reference.wide(given[n]) for n in names if n in given}
  values['x'] = reference.wide(input_of(use))
  facts = {'y': output(use, values, values)}
  if use.flags and use.update and use.options['n_steps']:
    _, u, _, sigma = iterated(use, values)
    lost = {'new u': values['u'], 'new sigma': 0}
    facts |= lost if use.zeros else {'new u': u, 'new sigma': sigma}
  for name, fact in facts.items():
    if not near(ours[name], fact, use.tolerance):
      verdict.problems.append(f'{name}: {ours[name]}, reference {fact}')
  gradients = {n: ours['d' + n] for n in values if 'd' + n in ours}
  if not all(np.all(np.isfinite(g)) for g in gradients.values()):
    verdict.problems.append('gradients are not finite')
  elif not use.zeros:
    check_slope(use, values, gradients, verdict)


def iterated(use: Use, values: Arrays) -> tuple[Any, ...]:
  steps, epsilon = use.options['n_steps'], use.options['epsilon']
  with np.errstate(invalid='ignore'):
    return reference.spectral_norm_reference(
      values['kernel'], values['u'], steps, epsilon
    )


def normalized(use: Use, values: Arrays, start: Arrays) -> np.ndarray:
  """The kernel that the layer sees; `start` is what u and v come from."""
  kernel, options = values['kernel'], use.options
  if use.zeros or options.get('n_steps') == 0:
    return kernel
  if use.norm == 'WeightNorm':
    axes, epsilon = options['feature_axes'], options['epsilon']
    scale = values.get('scale', 1.0)
    return reference.weight_norm_reference(kernel, scale, axes, epsilon)
  _, u, v, _ = iterated(use, start)
  return kernel / (v[:, 0] @ kernel.reshape(len(v), -1) @ u[0])


def output(use: Use, values: Arrays, start: Arrays) -> np.ndarray:
  """The layer by its definition."""
  x, kernel = values['x'], normalized(use, values, start)
  if use.kind == 'dense':
    return x @ kernel + values['bias']
  x = np.pad(x, ((0, 0), (1, 1), (0, 0)))
  return values['bias'] + sum(x[:, k : k + 7] @ kernel[k] for k in range(3))


def check_slope(
  use: Use, values: Arrays, gradients: Arrays, verdict: Verdict
) -> None:
  """Holds the gradients to the reference's slope in a random direction."""
  rng = np.random.default_rng(3)
  way = {n: rng.standard_normal(values[n].shape) for n in gradients}
  losses = []
  for step in (STEP, -STEP):
    moved = values | {n: values[n] + step * d for n, d in way.items()}
    y = output(use, moved, values)
    losses.append(np.sum(y.real * normal(y.shape, 2)))
  slope = (losses[0] - losses[1]) / (2 * STEP)
  terms = [reference.wide(gradients[n]).real * d for n, d in way.items()]
  size = 1 + sum(np.sum(np.abs(term)) for term in terms)
  found = sum(np.sum(term) for term in terms)
  if not abs(found - slope) <= use.tolerance * size:
    verdict.problems.append(f'slope: {found}, reference {slope}')


def measure(family: str, norm: str, count: int, seed: int) -> Count:
  """Compares so many uses of one of the modules."""
  return tally(
    {
      f'wrappers.draw({family!r}, {norm!r}, {seed}, {index})': compare(
        draw(family, norm, seed, index)
      )
      for index in range(count)
    }
  )
