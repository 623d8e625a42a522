"""The command line: one subcommand a measurement."""

import argparse

from benchmarks import (
  accuracy,
  bytes as moved,
  compiling,
  dropin,
  family,
  folding,
  gpu,
  kernels,
  pictures,
  registers,
  speed,
)


def main() -> int:
  parser = argparse.ArgumentParser(prog='python -m benchmarks')
  commands = parser.add_subparsers(required=True, metavar='COMMAND')
  accuracy.add_command(commands)
  moved.add_command(commands)
  compiling.add_command(commands)
  dropin.add_command(commands)
  family.add_command(commands)
  folding.add_command(commands)
  gpu.add_command(commands)
  kernels.add_command(commands)
  pictures.add_command(commands)
  registers.add_command(commands)
  speed.add_command(commands)
  args = parser.parse_args()
  return args.run(args)


if __name__ == '__main__':
  raise SystemExit(main())
