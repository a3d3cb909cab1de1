"""`interceptctl doctor`: what interceptd and its VMMs need, what is missing here, and how to fix it.

Owns the findings and their output. Probes the kernel as the current user, and the daemon's sockets. Must not
change anything.
"""
