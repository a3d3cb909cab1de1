"""What a daemon leaves to its successor: requests that it received, and changes that it made."""
