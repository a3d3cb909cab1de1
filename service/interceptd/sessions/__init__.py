"""One module per role: how a connection introduces itself, and what each role may ask."""
