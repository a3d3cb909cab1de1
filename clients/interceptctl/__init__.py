"""The operator's tool: what partitions there are, how they fare, and a few levers.

Owns commands and their looks; must not know how the daemon works, nor do I/O on sockets itself.
"""
