"""Metrics for Prometheus, over HTTP, on a listener of their own.

`observing` looks at the daemon, `families` says what that is in Prometheus' words, `http` answers who asks
for it and `endpoint` joins them. Nothing in the daemon knows of this package but the daemon itself: what it
shows is counted by those who do the work, whether anybody asks or not.
"""
