"""What a daemon leaves to its successor: what was received, and what was carried out."""
