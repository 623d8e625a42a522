"""One of several processes: `python worker.py INDEX COUNT ADDRESS REPORT`.

Normalizes a global array over the devices of all processes. Writes to the file
REPORT, as JSON, for each form the largest error of y here, that of the running
variance, relative, and how many devices took part; the reference is float64 on
the whole array. (Standard output is Gloo's, which writes there.)
"""

import json
import pathlib
import sys

import jax
from jax import shard_map
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np

import normkit as nk


def main(index: int, count: int, address: str, report: str) -> None:
  jax.config.update('jax_num_cpu_devices', 2)
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(address, count, index, initialization_timeout=60)
  rng = np.random.default_rng(0)
  x = (rng.standard_normal((16, 3, 4)) + 1000).astype(np.float32)
  where = rng.random((16, 3, 1)) < np.linspace(0, 1, 16)[:, None, None]
  mesh = jax.make_mesh((2 * count,), ('d',))
  placed = [place(a, NamedSharding(mesh, P('d'))) for a in (x, where)]
  found = {}
  for name, form in forms(mesh, x).items():
    y, state = jax.jit(form)(*placed)
    error, spread = map(float, errors(x, where, y, state))
    found[name] = error, spread, len(jax.devices())
  pathlib.Path(report).write_text(json.dumps(found))
  jax.distributed.shutdown()


def place(a, sharding):
  return jax.make_array_from_callback(a.shape, sharding, a.__getitem__)


def forms(mesh, x):
  def step(x, where, axis_name=None):
    bn = nk.BatchNorm(momentum=0.0, axis_name=axis_name)
    return bn.apply(params, state, x, train=True, where=where)

  params, state = nk.BatchNorm().init(x)
  named = shard_map(
    lambda *a: step(*a, axis_name='d'),
    mesh=mesh,
    in_specs=P('d'),
    out_specs=(P('d'), P()),
  )
  return {'jit': step, 'shard_map': named}


def errors(x, where, y, state):
  valid, wide = np.broadcast_to(where, x.shape), x.astype(np.float64)
  mean = wide.mean((0, 1), where=valid)
  var = np.square(wide - mean).mean((0, 1), where=valid)
  wanted = (wide - mean) / np.sqrt(var + 1e-5)
  error = max(
    np.abs(wanted[shard.index] - np.asarray(shard.data))[
      valid[shard.index]
    ].max(initial=0)
    for shard in y.addressable_shards
  )
  return error, np.abs(
    np.asarray(state.var.addressable_data(0)) / var - 1
  ).max()


if __name__ == '__main__':
  main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
