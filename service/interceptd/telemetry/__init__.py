"""What is counted, timed and published."""
