"""Goes on where a daemon that died has stopped."""
