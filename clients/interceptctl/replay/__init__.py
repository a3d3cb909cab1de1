"""`interceptctl replay`: a recording, repeated against a daemon."""
