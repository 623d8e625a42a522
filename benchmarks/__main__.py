"""The command line: one subcommand a measurement."""

import argparse
import sys
from types import ModuleType

import jax

from benchmarks import gpu

# Of the CPU, or compiled for chips that are not here.
ON_CPU = 'bytes', 'cpu', 'family', 'kernels', 'parity', 'registers'


def modules() -> list[ModuleType]:
  """Those with commands; some take the device as they are imported.

  For `gpu` it must be free: its work is done in another process.
  """
  if sys.argv[1:2] == ['gpu']:
    return [gpu]
  if sys.argv[1:2] and sys.argv[1] in ON_CPU:
    jax.config.update('jax_platforms', 'cpu')
  from benchmarks import (
    accuracy,
    bytes as moved,
    compiling,
    conversions,
    dropin,
    family,
    folding,
    kernels,
    parity,
    pictures,
    registers,
    speed,
  )

  found = [accuracy, moved, compiling, conversions, dropin, family, folding]
  return [*found, gpu, kernels, parity, pictures, registers, speed]


def main() -> int:
  parser = argparse.ArgumentParser(prog='python -m benchmarks')
  commands = parser.add_subparsers(required=True, metavar='COMMAND')
  for module in modules():
    module.add_command(commands)
  args = parser.parse_args()
  return args.run(args)


if __name__ == '__main__':
  raise SystemExit(main())
