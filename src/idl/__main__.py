"""`python -m idl` is the command `idl`."""

from idl.cli import main

main()
