"""`interceptctl restore`: has the daemon serve the memory of a VMM that is restored from a snapshot."""
