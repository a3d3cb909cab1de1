"""Regenerate `protocol/vectors/` after a change of the wire: `PYTHONPATH=tests python -m wire_vectors`."""

from __future__ import annotations

from wire_vectors.files import write

if __name__ == "__main__":
    write()
