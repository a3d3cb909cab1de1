"""`python -m explorer`; see `make explore`."""

from explorer.command import explore_command

explore_command(prog_name="python -m explorer")
