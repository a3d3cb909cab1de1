"""Takes over the partitions of a daemon that died or rested."""
