"""Norms and shapes for a device, the most important first."""

from typing import NamedTuple

from benchmarks import kernels as blocks, speed


class Case(NamedTuple):
  """A norm of some input; `of` has its own scale and bias, if no feature.

  With a gate, last or first, that is in the place of the bias. There is `more`
  in some: x as its own residual, SiLU after that, or rounding before the scale.
  """

  norm: str
  shape: tuple[int, ...]
  dtype: str
  groups: int | None = None
  of: str | None = None
  gate: str | None = None
  more: str | None = None

  def __str__(self) -> str:
    groups = f' in {self.groups} groups' if self.groups else ''
    of = f' by {self.of}' if self.of else ''
    gate = f' gate {self.gate}' if self.gate else ''
    more = f' with {self.more}' if self.more else ''
    shape = 'x'.join(map(str, self.shape))
    return f'{self.norm} {shape} {self.dtype}{groups}{of}{gate}{more}'

  @property
  def parameters(self) -> tuple[int, ...]:
    """The shape of scale and bias."""
    first, *some, size = self.shape
    if self.of == 'example':
      return (first, *[1] * len(some), size)
    if self.of == 'head':
      return (*[1] * len(some), *self.shape[-2:])
    return (size,)

  @property
  def center(self) -> bool:
    return self.norm != 'RMSNorm'

  @property
  def has_peers(self) -> bool:
    """Whether Flax and torch have it."""
    is_other = self.of is not None or self.gate is not None
    return self.groups in (None, speed.GROUPS) and not is_other


ROWS = 'LayerNorm', 'RMSNorm'
WIDTHS = 4096, 1024, 8192, 256, 16_384, 65_536, 2048, 768
DTYPES = 'bfloat16', 'float32'
# The public tables for H200 in shared units: rows x width.
PUBLIC = [
  ('RMSNorm', (16_384, 4096)),
  ('RMSNorm', (8192, 8192)),
  ('RMSNorm', (4096, 16_384)),
  ('RMSNorm', (8192, 5120)),
  ('LayerNorm', (1024, 12_288)),
]
UNET = [(8, 64, 64, 128), (8, 32, 32, 256), (8, 16, 16, 512), (8, 8, 8, 1280)]
IMAGES, LARGE = (64, 28, 28, 512), (16, 56, 56, 512)
# DiT-XL/2 and Flux, and queries with a scale a head.
OWN = [
  ('LayerNorm', (256, 256, 1152), 'example'),
  ('LayerNorm', (8, 4096, 3072), 'example'),
  ('RMSNorm', (32_768, 32, 128), 'head'),
]
# After Qwen3-Next's delta rule, and in Mamba 2 of 2.7 billion parameters.
GATES = [((2**20, 128), 'last'), ((16_384, 5120), 'first')]
# What is checked alone: other operands, dtypes and channels; rows that are no
# multiple of a tile, or of the 16 bytes that copies bring.
MORE = [
  Case('LayerNorm', (2**15, 4096), 'bfloat16', more='residual'),
  Case('RMSNorm', (2**15, 4096), 'bfloat16', more='silu'),
  Case('RMSNorm', (2**15, 4096), 'bfloat16', more='rounding'),
  *(Case('LayerNorm', (2**15, n), 'bfloat16') for n in (1000, 100, 7001)),
  *(Case('LayerNorm', (2**15, n), 'float16') for n in (4096, 49_152)),
  Case('GroupNorm', IMAGES, 'float16', 32),
  Case('GroupNorm', UNET[0], 'bfloat16', 128),  # instance norm
  Case('GroupNorm', (8, 30, 30, 60), 'bfloat16', 6),
]
BLOCK_WIDTHS = 4096, 2048, 1024, 8192, 768
BLOCK_ELEMENTS = 2**24


def norms_of(is_dry: bool) -> list[Case]:
  """What is timed alone, most important first."""
  if is_dry:
    rows = Case('LayerNorm', (6, 64), 'float32')
    own = Case('LayerNorm', (3, 3, 64), 'float32', of='example')
    gated = rows._replace(norm='RMSNorm', gate='last')
    return [rows, own, gated, Case('GroupNorm', (2, 4, 4, 64), 'float32', 32)]
  return [
    *(Case(norm, shape, 'bfloat16') for norm, shape in PUBLIC),
    *(Case('GroupNorm', shape, 'bfloat16', 32) for shape in UNET),
    *rows_of('bfloat16'),
    *(Case(norm, shape, 'bfloat16', of=of) for norm, shape, of in OWN),
    *(Case('RMSNorm', shape, 'bfloat16', gate=gate) for shape, gate in GATES),
    *(Case('GroupNorm', IMAGES, dtype, 32) for dtype in DTYPES),
    Case('GroupNorm', LARGE, 'bfloat16', 32),
    *rows_of('float32'),
  ]


def rows_of(dtype: str) -> list[Case]:
  """As large as the largest of the public tables, and larger."""
  return [
    Case(norm, (2**27 // width, width), dtype)
    for width in WIDTHS
    for norm in ROWS
  ]


def blocks_of(is_dry: bool) -> list[Case]:
  """What is timed in blocks."""
  if is_dry:
    return norms_of(is_dry)[:1]
  return [
    *(
      Case(norm, (BLOCK_ELEMENTS // width, width), dtype)
      for dtype in DTYPES
      for width in BLOCK_WIDTHS
      for norm in ROWS
    ),
    Case('GroupNorm', IMAGES, 'bfloat16', 32),  # float32 stays with XLA
  ]


def kinds_of(case: Case, is_dry: bool) -> list[str]:
  """Blocks with more than the norm in them."""
  family = blocks.FAMILIES[case.groups is not None]
  return list(family.blocks)[1 : 2 if is_dry else None]


def checks_of(is_dry: bool) -> list[Case]:
  """What is checked: first what may be recorded, then what is timed alone."""
  found = [*blocks_of(is_dry), *norms_of(is_dry), *(MORE if not is_dry else ())]
  return list({checked(case): case for case in found}.values())


def checked(case: Case) -> Case:
  """The same sets, some hundreds of rows: numbers depend on no more."""
  if case.groups:
    return case._replace(shape=(2, *case.shape[1:]))
  count = max(2**20 // case.shape[-1], 9) + 1
  if case.of == 'example':
    return case._replace(shape=(3, min(count, case.shape[1]), case.shape[-1]))
  if case.of == 'head':
    some = min(count // case.shape[-2] + 1, case.shape[0])
    return case._replace(shape=(some, *case.shape[1:]))
  return case._replace(shape=(min(count, case.shape[0]), case.shape[-1]))
