"""`interceptctl record`: a partition's recording, into a file."""
