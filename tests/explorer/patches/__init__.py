"""The patch that the project grew from, as it was posted and as it was posted again, as subjects.

Owns models of them in the terms of the thread: what they do and in which order, not how C spells it. The base
that they are applied to is `root_driver`.
"""
