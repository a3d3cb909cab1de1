"""`python -m interceptd`."""

from interceptd.cli import main

main()
