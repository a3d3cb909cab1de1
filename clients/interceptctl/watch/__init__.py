"""`interceptctl watch`: the daemon's events as they happen.

Owns the lines and their printing. Must not know sockets: see `operator_client`.
"""
