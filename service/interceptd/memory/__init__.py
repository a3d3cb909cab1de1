"""One fault, from lookup to commit: regions, attempts, and what the guest was given."""
