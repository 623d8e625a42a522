"""`python -m normkit`: the tools for whole models, from a shell."""

from normkit.tools import cli

if __name__ == '__main__':
  raise SystemExit(cli.main())
