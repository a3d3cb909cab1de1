"""What happens in the daemon, as it happens.

Owns the lines and their printing. Must not know sockets: the daemon is asked by `asking`.
"""
