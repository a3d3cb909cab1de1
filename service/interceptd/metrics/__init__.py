"""Metrics for Prometheus, over HTTP, on a separate listener.

`observing` takes a snapshot of the daemon, `families` converts it to Prometheus' metrics, `http` serves one
request and `endpoint` connects them. Only `daemon` imports this package: the code that does the work counts
it, whether or not it is scraped.
"""
