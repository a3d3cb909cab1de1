"""The configuration: its schema, its sources, and what is in force."""
