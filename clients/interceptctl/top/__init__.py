"""`interceptctl top`: live rates of partitions and VPs.

Owns samples, rates, the frame and its refreshing. Must not know sockets: see `operator_client`.
"""
