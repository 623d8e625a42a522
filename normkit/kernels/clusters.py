"""Programs that share a row or a group: the members of a cluster.

Each has a part of its features or places, and memory that the others may write.
The interpreter knows no clusters: there members are more threads of a program,
and what a member has of its own has an axis of them.
"""

from collections.abc import Callable
import copy
import dataclasses
import functools
import math
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu
import jax.numpy as jnp
from jaxlib.mlir.dialects import nvvm

from normkit._types import Array
from normkit.kernels.configs import Config

MET, PARTS = 'met', 'parts'  # a barrier of all; where all write their sums


def options(config: Config, interpret: bool) -> dict[str, Any]:
  """Of a kernel: its threads, and the members."""
  if interpret:
    return {'num_threads': config.members * config.warpgroups}
  found: dict[str, Any] = {'num_threads': config.warpgroups}
  if config.members > 1:
    found |= {'cluster': (config.members,), 'cluster_names': ('member',)}
  return found


def memory(
  scratch: dict[str, Any], config: Config, interpret: bool
) -> dict[str, Any]:
  """What is shared by the threads of a program, or by all that stand for it."""
  if config.members == 1 or not interpret:
    return scratch

  def of_all(one: Any) -> Any:
    if isinstance(one, gpu.Barrier):
      barriers: Any = one.num_barriers
      barriers = config.members * math.prod(barriers)
      return dataclasses.replace(one, num_barriers=barriers)
    return gpu.SMEM((config.members, *one.shape), one.dtype)

  return {n: one if n == MET else of_all(one) for n, one in scratch.items()}


class Place:
  """Where a warpgroup is.

  Attributes:
    program: its number, of those that one call has.
    member: of the cluster that its program is.
    group: its number in that.
    number: its number in the cluster.
    is_first: whether it speaks for all.
  """

  def __init__(self, config: Config, interpret: bool) -> None:
    self.config, self.is_one = config, config.members == 1
    self.program = lax.axis_index('program')
    self.is_emulated = interpret and not self.is_one
    self.member, self.group = jnp.int32(0), lax.axis_index('warpgroup')
    if self.is_emulated:
      groups = jnp.int32(config.warpgroups)
      self.member = lax.div(self.group, groups)
      self.group = lax.rem(self.group, groups)
    elif not self.is_one:
      self.member = lax.axis_index('member')
    self.number, self.is_first = self.group, self.group == 0
    if not self.is_one:
      self.number = self.member * config.warpgroups + self.group
      self.is_first = self.number == 0

  def within(self, programs: int) -> tuple[Any, 'Place']:
    """The example, where each has so many programs, and where in that."""
    place, each = copy.copy(self), jnp.int32(programs)
    place.program = lax.rem(self.program, each)
    return lax.div(self.program, each), place

  def own(
    self, refs: dict[str, Any], scratch: dict[str, Any]
  ) -> dict[str, Any]:
    """With the memory of this member alone; but `PARTS`."""
    if not self.is_emulated:
      return refs
    memory = [
      n
      for n, one in scratch.items()
      if n != PARTS and not isinstance(one, gpu.Barrier)
    ]
    return refs | {n: refs[n].at[self.member] for n in memory}

  def parts(self, memory: Any) -> tuple[Any, list[Any]]:
    """Where the sums of all are: of this member, and of each."""
    if self.is_one:
      return memory, [memory]
    members = [jnp.int32(m) for m in range(self.config.members)]
    if self.is_emulated:
      return memory.at[self.member], [memory.at[m] for m in members]
    return memory, [gpu.cluster_ref(memory, {'member': m}) for m in members]

  def added(self, part: Callable[[int, Any], Array], count: int) -> list[Array]:
    """So many sums, of the parts `part(index, member)` of all members."""
    found = [part(index, 0) for index in range(count)]
    if self.is_one:
      return found

    def add(member: Any, sums: list[Array]) -> list[Array]:
      return [s + part(index, member) for index, s in enumerate(sums)]

    return list(lax.fori_loop(1, self.config.members, add, found))

  def by_number(self, run: Callable[[Any], None]) -> None:
    """Runs what asks for this warpgroup's number; a constant, if it can be."""
    if not self.is_one:
      run(self.number)
      return
    for group in range(self.config.warpgroups):
      pl.when(self.group == group)(functools.partial(run, group))

  def share(self, size: int) -> Any:
    """Of an axis that the members share, the `size` of this one."""
    if self.is_one:
      return pl.ds(0, size)
    return pl.ds(self.member * size, size)

  def barrier(self, barriers: Any, index: Any = None, count: int = 1) -> Any:
    """One of so many barriers of this member, or the only one."""
    if self.is_emulated:
      return barriers.at[self.member * count + (0 if index is None else index)]
    return barriers if index is None else barriers.at[index]

  def meet(self, met: Any) -> None:
    """All warpgroups of all members come here before one goes on.

    What each has written before, others read afterwards: the arrival at a
    cluster's barrier releases, the wait acquires, for all of the cluster.
    """
    if self.is_one or self.is_emulated:
      gpu.barrier_arrive(met)
      gpu.barrier_wait(met)
    else:
      gpu.inline_mgpu()(_meet)()


def _meet(_: Any) -> None:
  nvvm.cluster_arrive(aligned=True)
  nvvm.cluster_wait(aligned=True)
