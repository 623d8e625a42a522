"""Bytes that a compiled program moves, read from its text; no clock involved.

Each instruction of the program reads its operands and writes its results, but
for what stays in registers or on chip:

- what a fusion computes inside is not counted, nor tuples, bitcasts, constants;
- an operand that is only sliced counts as its slice, in whole sectors of
  memory where the slice skips along the fastest axis;
- an array in on-chip memory (`S(1)` in a TPU's layout) counts nothing;
- an array is as large as its tiles: 64 channels take the room of 128 on a TPU;
- a loop counts once for each of its trips;
- a kernel that is called counts its operands and results once, however often
  it reads them.
"""

from collections.abc import Iterator
import functools
import math
import re
from typing import NamedTuple

SECTOR = 32  # bytes: the least that memory hands out
FREE = {
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'after-all',
  'iota',
  'partition-id',
  'replica-id',
  'copy-done',
  'fusion-done',
  'async-done',
  'async-update',
  'slice-done',
  'optimization-barrier',
}
SLICES = {'slice', 'dynamic-slice', 'gather'}
# Which of the results of these is the copy; the others name its source.
PARTS = {'copy-start': 0, 'slice-start': 1}
# Passed through on the way from a parameter to a slice of it.
SAME = {'bitcast', 'copy', 'convert', 'reshape'}


class Array(NamedTuple):
  """An array in a program: its type, its layout, where it is."""

  dtype: str
  shape: tuple[int, ...]
  layout: str

  @property
  def itemsize(self) -> int:
    if self.dtype == 'pred':
      return 1
    bits = re.search(r'\d+', self.dtype)
    return max(int(bits[0]) // 8, 1) if bits else 0

  @property
  def is_on_chip(self) -> bool:
    return bool(re.search(r'S\([1-9]', self.layout))

  @property
  def order(self) -> list[int]:
    """The axes, the fastest first."""
    axes = re.match(r'[\d,]*', self.layout)[0]
    return [int(a) for a in axes.split(',')] if axes else []

  @property
  def bytes(self) -> int:
    """The room that it takes in main memory."""
    return 0 if self.is_on_chip else self.room

  @property
  def room(self) -> int:
    """The room that it takes wherever it is, tiles filled up."""
    sizes = [self.shape[a] for a in self.order]
    if tiles := re.search(r'T\(([\d,]+)\)', self.layout):
      tile = [int(t) for t in tiles[1].split(',')][::-1]
      sizes += [1] * (len(tile) - len(sizes))
      for axis, size in enumerate(tile):
        sizes[axis] = -(-sizes[axis] // size) * size
    return math.prod(sizes) * self.itemsize


class Instruction(NamedTuple):
  """One line of a computation."""

  name: str
  results: tuple[Array, ...]
  kind: str
  arguments: str
  rest: str
  is_root: bool

  @property
  def operands(self) -> list[str]:
    return re.findall(r'%([\w.\-]+)', self.arguments)

  def attribute(self, name: str) -> str | None:
    found = re.search(rf'\b{name}=%?([\w.\-]+)', self.rest)
    return found[1] if found else None

  @property
  def bytes(self) -> int:
    """The room of what it makes."""
    return sum(a.bytes for a in self.results)


Computation = dict[str, Instruction]


class Traffic(NamedTuple):
  """What a program does to memory.

  Attributes:
    bytes: bytes read and written.
    kernels: instructions that move any, each trip of a loop counted.
  """

  bytes: int
  kernels: int

  def __add__(self, other: 'Traffic') -> 'Traffic':  # type: ignore[override]
    return Traffic(self.bytes + other.bytes, self.kernels + other.kernels)

  def times(self, trips: int) -> 'Traffic':
    return Traffic(self.bytes * trips, self.kernels * trips)


ARRAY = re.compile(r'(\w+)\[([\d,]*)\](?:\{([^}]*)\})?')
LINE = re.compile(
  r'\s*(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$', re.DOTALL
)
HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')


def measure(text: str) -> Traffic:
  """The traffic of a program, `compiled.as_text()`."""
  computations, entry = parse(text)
  return traffic(computations, entry)


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """The computations of a program by name, and the name of its first."""
  computations: dict[str, Computation] = {}
  entry, current = '', None
  for line in text.splitlines():
    if header := HEADER.match(line):
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif line.startswith('}'):
      current = None
    elif current is not None and (found := LINE.match(line)):
      instruction = parse_instruction(found)
      current[instruction.name] = instruction
  if not entry:
    raise ValueError('the text holds no ENTRY computation: not a program?')
  return computations, entry


def parse_instruction(found: re.Match[str]) -> Instruction:
  root, name, results, kind, rest = found.groups()
  end = closing(rest)
  made = Instruction(
    name,
    tuple(arrays(results)),
    kind,
    rest[:end],
    rest[end:],
    bool(root),
  )
  if kind != 'fusion-start':
    return made
  # It names its operands before its results, and after them what it waits for.
  results = made.results[len(made.operands) : -1]
  return made._replace(kind='fusion', results=results)


def closing(text: str) -> int:
  """Where the parenthesis that is open at the start is closed."""
  depth = 1
  for index, character in enumerate(text):
    depth += (character == '(') - (character == ')')
    if depth == 0:
      return index
  return len(text)


def arrays(text: str) -> Iterator[Array]:
  for dtype, shape, layout in ARRAY.findall(text):
    sizes = tuple(int(s) for s in shape.split(',')) if shape else ()
    yield Array(dtype, sizes, layout)


def traffic(computations: dict[str, Computation], name: str) -> Traffic:
  """The traffic of one computation, of those that it calls too."""
  computation = computations[name]
  total = Traffic(0, 0)
  for instruction in computation.values():
    total += one(computations, computation, instruction)
  return total


def one(
  computations: dict[str, Computation],
  computation: Computation,
  instruction: Instruction,
) -> Traffic:
  kind = instruction.kind
  inner = functools.partial(traffic, computations)
  if kind in FREE:
    return Traffic(0, 0)
  if kind == 'while':
    trips = count_trips(computations, instruction)
    return inner(instruction.attribute('body')).times(trips)
  if kind == 'conditional':
    many = re.search(r'branch_computations=\{(.*?)\}', instruction.rest)
    names = re.findall(r'[\w.\-]+', many[1]) if many else []
    two = 'true_computation', 'false_computation'
    names = names or [instruction.attribute(name) for name in two]
    return max(map(inner, names))
  if kind == 'call':
    return inner(instruction.attribute('to_apply'))
  if kind == 'async-start':
    return inner(instruction.attribute('calls'))
  moved = writes(computations, instruction) + sum(
    reads(computations, computation, instruction, index)
    for index in range(len(instruction.operands))
  )
  return Traffic(moved, int(moved > 0))


def count_trips(computations: dict[str, Computation], loop: Instruction) -> int:
  """How often a loop runs: said with it, or the bound that it counts to."""
  if said := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
    return int(said[1])
  condition = computations[loop.attribute('condition')].values()
  bounds = [i.arguments for i in condition if i.kind == 'constant']
  if len(bounds) != 1:
    raise ValueError(f'{loop.name}: how often the loop runs is unknown')
  return int(bounds[0])


def writes(
  computations: dict[str, Computation], instruction: Instruction
) -> int:
  """Bytes written; into a larger array in place, only what is new."""
  if instruction.kind in PARTS:
    return instruction.results[PARTS[instruction.kind]].bytes
  if instruction.kind == 'dynamic-update-slice':
    return 0  # counted, read and written, with its operands
  if instruction.kind != 'fusion':
    return instruction.bytes
  inside = computations[instruction.attribute('calls')]
  returned = roots(inside)
  if len(returned) != len(instruction.results):
    return instruction.bytes  # of a kernel, which returns a tuple itself
  pairs = zip(instruction.results, returned, strict=True)
  return sum(min(a.bytes, written(inside, root)) for a, root in pairs)


def roots(computation: Computation) -> list[Instruction]:
  """What a computation returns, the elements of a tuple one by one."""
  root = next(i for i in computation.values() if i.is_root)
  if root.kind != 'tuple':
    return [root]
  return [computation[name] for name in root.operands]


def written(computation: Computation, root: Instruction) -> int:
  while root.kind in SAME and root.operands[0] in computation:
    above = computation[root.operands[0]]
    if above.kind not in SAME | {'dynamic-update-slice'}:
      break
    root = above
  if root.kind == 'dynamic-update-slice':
    return computation[root.operands[1]].bytes
  return root.bytes


def reads(
  computations: dict[str, Computation],
  computation: Computation,
  instruction: Instruction,
  index: int,
) -> int:
  """Bytes read of one operand."""
  operand = computation[instruction.operands[index]]
  if instruction.kind == 'slice-start':
    return 0 if operand.bytes == 0 else instruction.results[1].room
  if instruction.kind in SLICES:
    return sliced(operand, instruction) if index == 0 else operand.bytes
  if instruction.kind == 'dynamic-update-slice':
    return 2 * operand.bytes if index == 1 else 0
  if instruction.kind != 'fusion' or len(operand.results) != 1:
    return operand.bytes
  inside = computations[instruction.attribute('calls')]
  whole = operand.bytes
  parameter = next(
    i
    for i in inside.values()
    if i.kind == 'parameter' and i.arguments == str(index)
  )
  return min(whole, read_inside(inside, parameter, operand))


def read_inside(
  inside: Computation, value: Instruction, operand: Instruction
) -> int:
  """Bytes that a fusion reads of a parameter."""
  total = 0
  for user in inside.values():
    if value.name not in user.operands:
      continue
    if user.kind in SLICES and user.operands[0] == value.name:
      total += sliced(operand, user)
    elif user.kind == 'dynamic-update-slice' and user.operands[0] == value.name:
      total += 0
    elif user.kind in SAME and not user.is_root:
      total += read_inside(inside, user, operand)
    else:
      return operand.bytes
  return total


def sliced(operand: Instruction, user: Instruction) -> int:
  """Bytes of a slice; sectors, where it skips along the fastest axis."""
  source, result = operand.results[0], user.results[0]
  if source.is_on_chip:
    return 0
  count = math.prod(result.shape)
  step = re.search(r'slice=\{(.*)\}', user.rest)
  size = source.itemsize
  # A fusion may see its parameter in another shape.
  order = source.order
  if len(source.shape) != len(result.shape):
    order = result.order
  if step and order:
    steps = re.findall(r'\[\d+:\d+(?::(\d+))?\]', step[1])
    fastest = int(steps[order[0]] or 1)
    size = min(size * fastest, max(size, SECTOR))
  return count * size
