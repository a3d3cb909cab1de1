"""`interceptd keep`: starts the daemon again whenever it ends, and holds its descriptors meanwhile.

As much of a service manager as that takes: sd_pid_notify_with_fds(3) and sd_listen_fds(3). It has to outlive
every fault of the daemon, so it is small, imports the standard library alone, and knows neither the wire nor
what a descriptor is for.
"""
