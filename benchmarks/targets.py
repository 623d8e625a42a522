"""Compilers for CPU, GPUs and TPUs, which need not be here.

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

# XLA's descriptions of the chips, from its sources (Apache-2.0):
# xla/backends/gpu/target_config/specs/, h200.txtpb and a100_sxm_80.txtpb.
GPUS = {
  name: pathlib.Path(__file__).with_name(f'{name}.txtpb')
  for name in ('h200', 'b200', 'a100')
}
TPUS = {'v5e': 'v5e:2x2', 'v6e': 'v6e:2x2'}
TARGETS = 'cpu', 'h200', *TPUS
MODULES = dict.fromkeys(GPUS, 'jax_plugins.xla_cuda13') | dict.fromkeys(
  TPUS, 'libtpu'
)
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


def device(target: str) -> Any:
  """The device to compile for."""
  return devices(target)[0]


def ptxas() -> pathlib.Path | None:
  """NVIDIA's assembler, which says what a kernel spills, if it is here."""
  found = importlib.util.find_spec('nvidia')
  for folder in found.submodule_search_locations if found else []:
    for path in pathlib.Path(folder).glob('*/bin/ptxas'):
      return path
  return None


@functools.cache
def devices(target: str, count: int = 1) -> list[Any]:
  """So many devices to compile for; a TPU's are always four."""
  if target == 'cpu':
    return jax.devices('cpu')[:count]
  os.environ.update(ENVIRONMENT)
  if target in TPUS:
    topology = topologies.get_topology_desc(
      platform='tpu', topology_name=TPUS[target]
    )
  else:
    topology = topologies.get_topology_desc(
      platform='cuda',
      topology_name=target,
      topology=f'1x1x{count}',
      target_config=GPUS[target].read_text(),
    )
  return list(topology.devices)


def compile_for(
  target: str,
  function: Callable[..., Any],
  *arguments: Any,
  options: dict[str, Any] | None = None,
) -> jax.stages.Compiled:
  """Compiles a function of arrays; their shapes and dtypes will do."""
  place = SingleDeviceSharding(device(target))

  def placed(a: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)

  options = (GPU_OPTIONS if target in GPUS else {}) | (options or {})
  lowered = jax.jit(function).lower(*jax.tree.map(placed, arguments))
  return lowered.compile(options)
