"""Sockets: listeners, peers, framing, one request at a time, fairness between uids."""
