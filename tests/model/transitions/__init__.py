"""What the daemon does, as data that can be checked: see `table`."""
