"""A VP that asks without a pause: `python -m fakes.hammering_vp SOCKET`. Runs until it is killed."""

from __future__ import annotations

import sys

from fakes.raw_vmm import RawVmm


def main(path: str) -> None:
    with RawVmm(path) as vmm:
        vp = vmm.vp()
        print(vp.intercept(0), flush=True)
        while True:
            vp.intercept(0)


if __name__ == "__main__":
    main(sys.argv[1])
