"""`interceptd keep`: starts the daemon again when it dies or rests, and holds its descriptors meanwhile.

It is a service manager with sd_pid_notify_with_fds(3) and sd_listen_fds(3), and no more. It must outlive
every fault of the daemon, so it is small, imports only the standard library, and knows neither the wire nor
what a descriptor is for.
"""
