"""The operator's tool: list and inspect partitions, and steer the daemon.

Owns the commands and their output; must not know how the daemon works, nor do I/O on sockets itself.
"""
