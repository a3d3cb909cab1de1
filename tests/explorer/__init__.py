"""`interceptctl explore`: the daemon's core, and the patch that it grew from, run against drawn schedules.

Owns a scheduler that decides every interleaving, scenarios, a reference model of what the guest may reach,
and the variants that are judged by it. The one place outside the daemon that knows its inside: the inside is
its subject.
"""
