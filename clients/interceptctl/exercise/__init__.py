"""The exerciser: a fake VMM with fake guests drives a real daemon over its socket and checks every answer.

It looks at the wire: was each answer true at some instant between request and reply? Owns the exercise, from
the history of what is true (`truth`) to its output; must not know how the daemon works. In reading
order: `clock`, `history`, `world`, `truth` and `judge` say what is right; `layout`, `vmm`, `workload`,
`notifier` and `guest` act; `exercise` puts them together; `live` and `summary` show
it; `daemon_process` and `command` make it a program.
"""
