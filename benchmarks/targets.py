"""Compilers for CPU, H200 and TPU, the last three of devices that are not here.

The programs are those that the devices would run: XLA's own compilers, told
which chip they compile for. What the extra `targets` installs is needed, and
for convolutions on H200 cuDNN too.
"""

from collections.abc import Callable
import functools
import importlib.util
import os
import pathlib
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# XLA's description of the chip, from its sources (Apache-2.0):
# xla/backends/gpu/target_config/specs/h200.txtpb.
H200 = pathlib.Path(__file__).with_name('h200.txtpb')
TPUS = {'v5e': 'v5e:2x2', 'v6e': 'v6e:2x2'}
TARGETS = 'cpu', 'h200', *TPUS
MODULES = {'h200': 'jax_plugins.xla_cuda13', 'v5e': 'libtpu', 'v6e': 'libtpu'}
# libtpu asks for the machine's metadata unless told; no timing of candidates
# without the device, and no memory of other programs.
ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
GPU_OPTIONS = {'xla_gpu_autotune_level': 0}


def has(module: str) -> bool:
  """Whether a module is installed."""
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # its parent package is not there either
    return False


def is_installed(target: str) -> bool:
  """Whether the compiler for the target is here."""
  return target not in MODULES or has(MODULES[target])


def installed() -> list[str]:
  """The targets whose compilers are here; says which are not."""
  missing = [t for t in TARGETS if not is_installed(t)]
  if missing:
    print(f'no compiler for {", ".join(missing)}: pip install -e ".[targets]"')
  return [t for t in TARGETS if t not in missing]


@functools.cache
def device(target: str) -> Any:
  """The device to compile for."""
  if target == 'cpu':
    return jax.devices('cpu')[0]
  os.environ.update(ENVIRONMENT)
  if target in TPUS:
    topology = topologies.get_topology_desc(
      platform='tpu', topology_name=TPUS[target]
    )
  else:
    topology = topologies.get_topology_desc(
      platform='cuda',
      topology_name='h200',
      topology='1x1x1',
      target_config=H200.read_text(),
    )
  return topology.devices[0]


def compile_for(
  target: str, function: Callable[..., Any], *arguments: Any
) -> jax.stages.Compiled:
  """Compiles a function of arrays; their shapes and dtypes will do."""
  place = SingleDeviceSharding(device(target))

  def placed(a: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)

  options = GPU_OPTIONS if target == 'h200' else None
  lowered = jax.jit(function).lower(*jax.tree.map(placed, arguments))
  return lowered.compile(options)
