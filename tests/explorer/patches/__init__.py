"""The patch that the project grew from, as first posted and as posted again, as systems under test.

Owns models of them in the terms of the thread: what they do and in which order, not how C spells it. The base
that they are applied to is `root_driver`.
"""
