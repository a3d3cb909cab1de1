"""Partitions by what they do per second, live.

Owns samples, rates, the frame and its refreshing. Must not know sockets: the daemon is asked by `asking`.
"""
