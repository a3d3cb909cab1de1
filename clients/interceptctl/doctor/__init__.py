"""Whether this machine has what interceptd and its VMMs need, and what to do where it has not.

Owns the findings and their looks; asks the kernel as the user who runs it, and the daemon only whether it is
there. Must not change anything.
"""
