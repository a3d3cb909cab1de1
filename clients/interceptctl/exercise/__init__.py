"""A fake VMM with fake guests that drives a real daemon and checks every answer against what is true.

Owns the exercise, from the plain model (`truth`) to what is shown of it; must not know how the daemon works:
all it sees is the wire. In the order of reading: `clock`, `history`, `world`, `truth` and `judge` say what is
right; `layout`, `vmm`, `turmoil`, `notifier` and `guest` make things happen; `exercise` puts them together;
`live` and `summary` show it; `daemon_process` and `command` make it a program.
"""
