"""Sockets: listeners, peers, framing, one request after the other, fairness between uids."""
