"""Logging: what a line passes through, how it looks, and where it goes."""
