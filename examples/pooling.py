# %% [markdown]
# # What is pooled: one batch on eight devices
#
# 64 scans of digits, sorted from faint to bold, eight to a device, so that the
# devices hold very different batches. Each form of parallelism normalizes them
# once. Which mean it used is read back from the output: two elements of an
# image tell both the mean and the deviation that it was normalized with.
#
#     python examples/pooling.py --out out
#
# The eight devices are made of the host's processor, also where there are
# others, so that everyone sees the same.

# %%
import argparse
from collections.abc import Callable, Sequence
from functools import partial
import pathlib

import flax.linen as nn
import jax
from jax import shard_map
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np
from rich.console import Console

import data
import figures
import normkit as nk
import options
import summary

DEVICES, EACH = 8, 8
GROUPS = [[0, 1, 2, 3], [4, 5, 6, 7]]

# %% [markdown]
# ## The forms
#
# With `axis_name`, in `pmap`, `vmap` and `shard_map`, the devices of that axis
# share their statistics, whole or in groups. Without, each keeps its own.
# Under `jit` the batch is one, wherever its parts lie; `virtual_batch_size`
# divides it.


# %%
def batch_norm(x: jax.Array, where: jax.Array, **options) -> jax.Array:
  bn = nk.BatchNorm(use_scale=False, use_bias=False, **options)
  params, state = bn.init(x)
  return bn.apply(params, state, x, train=True, where=where)[0]


def mesh() -> jax.sharding.Mesh:
  return jax.make_mesh((DEVICES,), ('device',), axis_types=(AxisType.Auto,))


def mapped(mapping: Callable, **options) -> Callable:
  """`pmap` or `vmap`: the devices are the first axis."""

  def run(x: jax.Array, where: jax.Array) -> jax.Array:
    parts = (a.reshape(DEVICES, EACH, *a.shape[1:]) for a in (x, where))
    y = mapping(partial(batch_norm, **options), axis_name='device')(*parts)
    return y.reshape(x.shape)

  return run


def sharded(**options) -> Callable:
  """`shard_map`: each device sees its shard."""
  spec = P('device')
  return jax.jit(
    shard_map(
      partial(batch_norm, **options), mesh=mesh(), in_specs=spec, out_specs=spec
    )
  )


def placed(**options) -> Callable:
  """`jit` over an array whose shards lie on the devices."""

  def run(x: jax.Array, where: jax.Array) -> jax.Array:
    sharding = NamedSharding(mesh(), P('device'))
    x, where = (jax.device_put(a, sharding) for a in (x, where))
    return jax.jit(partial(batch_norm, **options))(x, where)

  return run


def forms() -> dict[str, Callable]:
  named = {'axis_name': 'device'}
  return {
    'one device': batch_norm,
    'jit, sharded input': placed(),
    'pmap, axis_name': mapped(jax.pmap, **named),
    'vmap, axis_name': mapped(jax.vmap, **named),
    'shard_map, axis_name': sharded(**named),
    'pmap, groups of four': mapped(jax.pmap, axis_index_groups=GROUPS, **named),
    'shard_map, no name': sharded(),
    'jit, virtual_batch_size=4': placed(virtual_batch_size=4),
  }


# %% [markdown]
# ## The data, and what was done to it


# %%
def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The options; the devices are made of the processor."""
  parser = argparse.ArgumentParser(description='What is pooled, in each form.')
  parser.add_argument(
    '--out', type=pathlib.Path, default=pathlib.Path('out'), help='folder'
  )
  args = parser.parse_args(options.arguments(argv))
  jax.config.update('jax_platforms', 'cpu')
  if jax.config.jax_num_cpu_devices < DEVICES:
    jax.config.update('jax_num_cpu_devices', DEVICES)
  return args


def sorted_digits() -> jax.Array:
  """64 images from faint to bold, (64, 8, 8, 1)."""
  images = data.digits().train_images[: DEVICES * EACH]
  return jnp.asarray(images[np.argsort(images.mean((1, 2, 3)))])


def means_used(x: jax.Array, y: jax.Array) -> np.ndarray:
  """The mean that each image was normalized with, from its extreme pixels."""
  x, y = (np.float64(a).reshape(len(a), -1) for a in (x, y))
  rows = np.arange(len(x))
  low, high = x.argmin(1), x.argmax(1)
  deviation = (x[rows, high] - x[rows, low]) / (y[rows, high] - y[rows, low])
  return x[rows, low] - y[rows, low] * deviation


# %%
if __name__ == '__main__':
  args = parse(None)
  x = sorted_digits()
  every = jnp.ones((len(x), 1, 1, 1), bool)
  used = {name: means_used(x, form(x, every)) for name, form in forms().items()}
  for name, means in used.items():
    print(f'{name}: {len(np.unique(means.round(5)))} means')

# %% [markdown]
# ## The picture


# %%
def draw(x: jax.Array, used: dict[str, np.ndarray]) -> Figure:
  """A row a form, a column an image, the color the mean it was given."""
  figure = Figure(figsize=(9, 4.6), layout='constrained')
  own, strips = figure.subplots(2, 1, height_ratios=(1, 3), sharex=True)
  own.bar(range(len(x)), np.asarray(x).mean((1, 2, 3)), width=1, color='0.6')
  own.set_ylabel('its own mean')
  own.set_title('Eight devices, eight images each: the mean each is given')
  image = strips.imshow(
    np.stack(list(used.values())), aspect='auto', cmap='viridis'
  )
  strips.set_yticks(range(len(used)), list(used))
  strips.set_xlabel('image, from faint to bold')
  mark_devices(strips, len(used))
  figure.colorbar(image, ax=strips, label='mean used')
  return figure


def mark_devices(axes: Axes, rows: int) -> None:
  for edge in range(EACH, DEVICES * EACH, EACH):
    axes.axvline(edge - 0.5, color='white', linewidth=1)
  for row in range(1, rows):
    axes.axhline(row - 0.5, color='white', linewidth=3)


# %%
if __name__ == '__main__':
  figures.save(args.out, pooling=draw(x, used))

# %% [markdown]
# ## Masks: counts that differ between devices
#
# Here the last image of device 0 counts, the last two of device 1, up to all
# eight of device 7. The mean over all elements that count is what one device
# would find. The mean of the devices' means is another number.


# %%
def unequal_mask() -> jax.Array:
  """Device i keeps its last i + 1 images, (64, 1, 1, 1)."""
  device, place = np.divmod(np.arange(DEVICES * EACH), EACH)
  return jnp.asarray(place >= EACH - 1 - device)[:, None, None, None]


def flax_pooled(x: jax.Array, where: jax.Array) -> jax.Array:
  """Flax's batch norm under `pmap`, as it pools."""
  bn = nn.BatchNorm(
    use_running_average=False,
    axis_name='device',
    use_scale=False,
    use_bias=False,
  )

  def run(x, where):
    variables = bn.init(jax.random.key(0), x)
    return bn.apply(variables, x, mask=where, mutable=['batch_stats'])[0]

  parts = (a.reshape(DEVICES, EACH, *a.shape[1:]) for a in (x, where))
  return jax.pmap(run, axis_name='device')(*parts).reshape(x.shape)


def compare(x: jax.Array, where: jax.Array) -> list[tuple[str, float, float]]:
  """The mean used by each form with a mask, and its distance from the truth."""
  wide = np.float64(x)
  truth = wide.mean(where=np.broadcast_to(where, x.shape))
  rows = [('float64, one device', truth, 0.0)]
  pooled = {
    name: form
    for name, form in forms().items()
    if 'groups' not in name and 'no name' not in name and 'virtual' not in name
  }
  for name, form in {**pooled, 'flax, pmap, axis_name': flax_pooled}.items():
    mean = float(np.median(means_used(x, form(x, where))))
    rows.append((name, mean, abs(mean - truth)))
  return rows


def show(rows: list[tuple[str, float, float]]) -> None:
  table = summary.table(
    'a mask, unequal counts', ['form'], ['mean used', 'error']
  )
  for name, mean, error in rows:
    table.add_row(name, f'{mean:.6f}', f'{error:.1e}')
  Console().print(table)


# %%
if __name__ == '__main__':
  show(compare(x, unequal_mask()))
