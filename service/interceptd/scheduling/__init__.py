"""How the event loop's time is measured and divided among the uids."""
