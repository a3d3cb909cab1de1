"""The schedule explorer: runs the daemon's core, and the patch that it grew from, under random schedules.

It looks at interleavings, and judges every step. Owns the scheduler that decides every interleaving, the
scenarios, the reference of what the guest may reach, and the variants under test. It imports the daemon's
internals: they are what it tests.
"""
