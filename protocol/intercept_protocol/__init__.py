"""The wire between VMMs and interceptd, without any I/O.

Owns the words that both sides share: addresses, the hypervisor's intercept message, every request and
reply, MessagePack-RPC framing, outcomes and errors. Must not know trio, sockets or logging.
The normative text is ``protocol/README.md``.
"""
