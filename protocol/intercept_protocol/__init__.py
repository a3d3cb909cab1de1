"""The wire protocol between VMMs and interceptd, sans I/O.

Owns what both sides share: addresses, the hypervisor's intercept message, every request and reply,
MessagePack-RPC framing, outcomes and errors. Must not know trio, sockets or logging. The normative text is
``protocol/README.md``.
"""
