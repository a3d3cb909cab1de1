"""Counters, latency histograms and the event bus."""
