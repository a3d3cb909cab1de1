"""sd_notify and socket activation."""
