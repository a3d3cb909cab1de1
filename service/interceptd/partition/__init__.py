"""A partition's lifetime, and its VPs."""
