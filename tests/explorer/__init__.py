"""Runs the daemon's core, and the patch that it grew from, under drawn schedules, and judges every step.

Owns the scheduler that decides every interleaving, the scenarios, a reference model of what the guest may
reach, and the variants that it judges. It imports the daemon's internals: they are its subject.
"""
