"""`python -m quaver` is `quaver`."""

from quaver.cli import command

command()
