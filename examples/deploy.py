# %% [markdown]
# # From training to a file that runs: average, recalibrate, fold, export
#
# A residual network is trained, its weights are averaged, its running
# statistics are made those of the average, its batch norms are folded into the
# convolutions before them, and what is left is written to a file with
# `jax.export`, which holds program and weights, and needs neither Flax nor
# normkit to run. After each step the accuracy is measured, and at the end what
# was won: the latency, and the bytes and operations that XLA counts.
#
# The data are real, and few: patches of ten photographs, the class being which
# of them a patch is from.
#
# All of it, in a minute or two, or a part, sooner, to see it run:
#
#     python examples/deploy.py --out out
#     python examples/deploy.py --out out --small

# %%
from collections.abc import Callable
import functools
import itertools
import pathlib
import time
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import export
from matplotlib.figure import Figure
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import data
import figures
from models import SmallResNet
from normkit.tools.fold import Folded, fold
from normkit.tools.recalibrate import recalibrate
import options
import summary
from train_eval import FEWER, Network
import training

# %% [markdown]
# ## Train, and average the weights
#
# Adam at a steady rate. The average has an equal share of the weights after
# each step of the second half (Izmailov et al., "Averaging Weights Leads to
# Wider Optima and Better Generalization", 2018).

# %%
OPTIMIZER = optax.adam(0.005)
mix = jax.jit(optax.incremental_update)


def train(
  model: nn.Module, dataset: data.Dataset, steps: int, seed: int
) -> tuple[Any, Any]:
  """The variables after the last step, and those with averaged weights."""
  order = training.batches(len(dataset.train_labels), 64, seed)
  order = itertools.islice(order, steps)
  first = training.init(model, OPTIMIZER, dataset.train_images, seed)
  for number, state, _ in training.walk(
    model, OPTIMIZER, dataset, order, first
  ):
    if number <= steps // 2:
      average = state.params
    else:
      average = mix(state.params, average, 1 / (number - steps // 2))
  return state.variables, state.variables | {'params': average}


# %% [markdown]
# ## Recalibrate
#
# No step made the averaged weights, so that the running statistics at hand are
# of others. Batch norm is set layer by layer, in evaluation mode, by what it
# sees of some training images.


# %%
def mend(
  model: nn.Module, variables: Any, dataset: data.Dataset, images: int
) -> Any:
  """The variables with the statistics of so many training images."""
  chosen = np.random.default_rng(0).permutation(len(dataset.train_labels))
  batches = dataset.train_images[chosen[:images]].reshape(
    2, images // 2, *dataset.train_images.shape[1:]
  )
  call = functools.partial(model.apply, train=False, mutable=['batch_stats'])
  return recalibrate(jax.jit(call), variables, batches, layerwise=True)


# %% [markdown]
# ## Fold and export
#
# One file for batches of any size, with the weights as constants. It is read
# back, and the program in it runs.


# %%
def write(folded: Folded, images: np.ndarray, path: pathlib.Path) -> None:
  """Writes program and weights for any number of images like these."""
  call = jax.jit(functools.partial(folded.apply, folded.params))
  (number,) = export.symbolic_shape('number')
  shape = jax.ShapeDtypeStruct((number, *images.shape[1:]), images.dtype)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(export.export(call)(shape).serialize())


def load(path: pathlib.Path) -> Callable[[Any], jax.Array]:
  """The program of a file."""
  return jax.jit(export.deserialize(path.read_bytes()).call)


# %% [markdown]
# ## Measure
#
# The latencies are of one call that is waited for, in rounds that go through
# all programs, so that what disturbs the machine disturbs them alike. "As
# trained" is the whole network under `jax.jit`, with its weights as arguments.
# Bytes and operations are XLA's own count for the compiled program.


# %%
class Cost(NamedTuple):
  """A program at a size of batch: latencies in ms, and XLA's count."""

  latencies: np.ndarray
  megabytes: float
  operations: float


def measure(
  programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]], rounds: int
) -> dict[str, Cost]:
  """The cost of each program, which is a function and its arguments."""
  compiled = {
    name: jax.jit(function).lower(*args).compile()
    for name, (function, args) in programs.items()
  }
  placed = {name: jax.device_put(args) for name, (_, args) in programs.items()}
  seconds: dict[str, list[float]] = {name: [] for name in programs}
  for number in range(rounds + 2):
    for name, program in compiled.items():
      begin = time.perf_counter()
      jax.block_until_ready(program(*placed[name]))
      if number >= 2:  # the first rounds warm up
        seconds[name].append(time.perf_counter() - begin)
  costs = {}
  for name, program in compiled.items():
    counted = program.cost_analysis()
    costs[name] = Cost(
      1e3 * np.array(seconds[name]),
      counted['bytes accessed'] / 1e6,
      counted['flops'] / 1e6,
    )
  return costs


# %% [markdown]
# ## All of it, for one seed


# %%
class Result(NamedTuple):
  """One seed: what each step leaves, and how the outputs compare.

  Attributes:
    accuracies: held-out accuracy after each step, in %.
    error: the largest difference of a logit between the recalibrated network
      and the program of the file, as a share of the largest logit.
    report: what was folded.
    costs: by size of batch and program, where they were measured.
    kilobytes: the size of the file.
  """

  accuracies: dict[str, float]
  error: float
  report: str
  costs: dict[int, dict[str, Cost]]
  kilobytes: float


SIZES = (1, 64)


def deploy(
  model: nn.Module,
  dataset: data.Dataset,
  out: pathlib.Path,
  *,
  steps: int,
  images: int,
  rounds: int,
  seed: int,
) -> Result:
  """Trains a network, makes files of it and measures them, if in rounds."""
  trained, averaged = train(model, dataset, steps, seed)
  mended = mend(model, averaged, dataset, images)
  call = functools.partial(model.apply, train=False)
  folded = fold(call, mended, dataset.train_images[:16])
  path = out / 'deploy.jax'
  write(folded, dataset.test_images, path)
  program = load(path)
  logits = {
    'trained': training.logits_of(model, trained, dataset.test_images),
    'averaged': training.logits_of(model, averaged, dataset.test_images),
    'recalibrated': training.logits_of(model, mended, dataset.test_images),
    'folded': training.in_parts(
      jax.jit(functools.partial(folded.apply, folded.params)),
      dataset.test_images,
    ),
    'file': training.in_parts(program, dataset.test_images),
  }
  wanted = np.array(logits['recalibrated'])
  off = np.abs(np.array(logits['file']) - wanted).max() / np.abs(wanted).max()
  costs = {}
  for size in SIZES if rounds else ():
    batch = dataset.test_images[:size]
    costs[size] = measure(
      {
        'as trained': (call, (mended, batch)),
        'folded': (folded.apply, (folded.params, batch)),
        'file': (program, (batch,)),
      },
      rounds,
    )
  return Result(
    {
      name: 100 * float((y.argmax(-1) == dataset.test_labels).mean())
      for name, y in logits.items()
    },
    float(off),
    str(folded.report),
    costs,
    path.stat().st_size / 1e3,
  )


# %% [markdown]
# ## What came out


# %%
def accuracy_table(results: list[Result]) -> Table:
  """The accuracy after each step, over the seeds."""
  title = 'Held-out accuracy, %, mean ± std over seeds'
  table = summary.table(title, ['step'], ['accuracy'])
  for name in results[0].accuracies:
    found = [result.accuracies[name] for result in results]
    table.add_row(name, summary.spread(found))
  return table


def cost_table(costs: dict[int, dict[str, Cost]]) -> Table:
  """Latencies, bytes and operations, of one seed."""
  columns = 'median, ms', 'quartiles, ms', 'MB accessed', 'Mflop'
  title = 'A call, on the device at hand'
  table = summary.table(title, ['batch', 'program'], columns)
  for size, programs in costs.items():
    for name, cost in programs.items():
      low, median, high = np.percentile(cost.latencies, (25, 50, 75))
      table.add_row(
        str(size),
        name,
        f'{median:.3f}',
        f'{low:.3f} to {high:.3f}',
        f'{cost.megabytes:.3f}',
        f'{cost.operations:.2f}',
      )
  return table


def findings(results: list[Result]) -> list[str]:
  """What the numbers say, in words."""

  def gain(after: str, before: str) -> str:
    found = [r.accuracies[after] - r.accuracies[before] for r in results]
    return summary.spread(found)

  told = [
    'Averaging weights, statistics as they were: '
    f'{gain("averaged", "trained")} points; recalibrating the average: '
    f'{gain("recalibrated", "averaged")} points more; together: '
    f'{gain("recalibrated", "trained")}.',
    'The program of the file differs from the recalibrated network by at most '
    f'{max(r.error for r in results):.0e} of the largest logit.',
  ]
  for size, programs in results[-1].costs.items():
    before, after = programs['as trained'], programs['file']
    ratios = np.percentile(after.latencies / before.latencies, (25, 50, 75))
    low, median, high = ratios
    told.append(
      f'Batch of {size}: the file takes {median:.2f} times as long as the '
      f'network as trained (quartiles of the rounds: {low:.2f} to {high:.2f}), '
      f'{after.megabytes / before.megabytes:.2f} times the bytes and '
      f'{after.operations / before.operations:.2f} times the operations.'
    )
  return told


def draw_accuracies(results: list[Result], title: str) -> Figure:
  """The accuracy after each step, a line a seed."""
  figure, ((axes,),) = figures.make(title)
  names = list(results[0].accuracies)
  for i, result in enumerate(results):
    axes.plot(
      names,
      list(result.accuracies.values()),
      label=f'seed {i}',
      **figures.look(i),
    )
  axes.set(xlabel='after this step', ylabel='held-out accuracy, %')
  figures.legend(figure)
  return figure


def draw_costs(costs: dict[int, dict[str, Cost]], title: str) -> Figure:
  """Latencies as boxes, bytes and operations as bars."""
  figure, panels = figures.make(title, 2, len(costs))
  for (above, below), (size, programs) in zip(
    panels.T, costs.items(), strict=True
  ):
    above.boxplot(
      [cost.latencies for cost in programs.values()],
      tick_labels=list(programs),
      whis=(5, 95),
      showfliers=False,
      medianprops={'color': figures.look('batch')['color']},
    )
    above.set(title=f'batch of {size}', ylabel='ms: quartiles, 5% to 95%')
    above.set_ylim(bottom=0)
    place = np.arange(len(programs))
    first = programs['as trained']
    for i, (label, name) in enumerate(
      {'bytes accessed': 'megabytes', 'operations': 'operations'}.items()
    ):
      share = [
        getattr(cost, name) / getattr(first, name) for cost in programs.values()
      ]
      color = figures.look(('group', 'ghost')[i])['color']
      below.bar(
        place + 0.4 * i - 0.2,
        share,
        0.36,
        label=label,
        color=color,
        hatch=('', '//')[i],
        edgecolor='white',
      )
    below.set_xticks(place, list(programs))
    below.set_ylabel('share of "as trained"')
  figures.legend(figure)
  return figure


# %% [markdown]
# ## The runs
#
# In a notebook, options stand in the next cell: `['--small']` for `None`.

# %%
if __name__ == '__main__':
  args = options.parse(
    None, 'From training to a file that runs alone.', 'the photographs'
  )
  seeds = 2 if args.small else 3
  model = Network(layers=FEWER) if args.small else SmallResNet()
  settings, rounds = {'steps': 100, 'images': 1024}, 200
  if args.small:
    settings, rounds = {'steps': 4, 'images': 64}, 5
  dataset = data.part(args.data or data.photographs(), args.small)
  console = Console(markup=False, emoji=False, width=100)

# %% [markdown]
# ### What each step does to accuracy

# %%
if __name__ == '__main__':
  results = []
  for seed in range(seeds):
    with console.status(f'seed {seed}'):
      measured = rounds if seed == seeds - 1 else 0
      result = deploy(
        model, dataset, args.out, seed=seed, rounds=measured, **settings
      )
    results.append(result)
  last = results[-1]
  console.print(last.report, accuracy_table(results))
  title = 'What each step does to accuracy'
  figures.save(args.out, deploy_accuracy=draw_accuracies(results, title))

# %% [markdown]
# ### What a call costs

# %%
if __name__ == '__main__':
  console.print(cost_table(last.costs))
  summary.tell((f'- {finding}' for finding in findings(results)), args.small)
  title = f'What a call costs, in {rounds} rounds'
  figures.save(args.out, deploy_cost=draw_costs(last.costs, title))
  console.print(
    f'Wrote {args.out / "deploy.jax"}, {last.kilobytes:.0f} kB: program and '
    'weights of the last seed.'
  )
