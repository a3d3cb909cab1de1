"""`interceptctl restore`.

Owns its options. Must not know how they are carried out (`program`).
"""

from __future__ import annotations

from pathlib import Path

import click

from intercept_protocol.messages import AROUND_LIMIT, AROUND_PAGES, OnImageError
from interceptctl.completion import SOCKET_PATH
from interceptctl.finite import Finite

from . import program
from .program import Wish


@click.command("restore")
@click.option(
    "--vmm-socket",
    metavar="PATH",
    type=SOCKET_PATH,
    help="The daemon's VMM socket  [default: vmm.sock in the directory of the operator socket].",
)
@click.option(
    "--listen",
    metavar="PATH",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the VMM hands over its memory: Firecracker's backend_path. The socket is made here.",
)
@click.option(
    "--image",
    metavar="FILE",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The memory file of the snapshot.",
)
@click.option(
    "--around",
    metavar="PAGES",
    type=click.IntRange(1, AROUND_LIMIT),
    default=AROUND_PAGES,
    show_default=True,
    help="How many pages of 4 KiB are brought in when the guest touches one of them.",
)
@click.option(
    "--prefetch",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Bring in the pages of this working set before the guest touches them.",
)
@click.option(
    "--record",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the working set of this run, for --prefetch.",
)
@click.option(
    "--on-image-error",
    type=click.Choice([choice.value for choice in OnImageError]),
    default=OnImageError.HOLD.value,
    show_default=True,
    help="If a page cannot be read: hold the guest and try again, or kill the VMM.",
)
@click.option(
    "--wait",
    "wait_seconds",
    metavar="SECONDS",
    type=Finite(0.001, 3600),
    default=60.0,
    show_default=True,
    help="How long the VMM may take to connect.",
)
@click.option("--detach", is_flag=True, help="Return as soon as the daemon has taken over.")
@click.option("--json", "as_json", is_flag=True, help="Print how it ended as JSON.")
@click.pass_obj
def restore_command(
    path: str,
    *,
    vmm_socket: str | None,
    listen: Path,
    image: Path,
    around: int,
    prefetch: Path | None,
    record: Path | None,
    on_image_error: str,
    wait_seconds: float,
    detach: bool,
    as_json: bool,
) -> None:
    """Have the daemon serve the memory of a VMM that is restored from a snapshot.

    The VMM, a Firecracker of the same user, is then told to load the snapshot with memory backend Uffd and
    the path of --listen. The daemon brings in what the guest touches, until the VMM ends. It needs this
    program no more: Ctrl-C and --detach leave the VMM served.

    --record writes the pages that were touched, in order, with the neighbours that came with them. With
    --around 1 these are the touched pages alone, but that run is slower. With --prefetch too, the pages of
    that file stay in it.

    Exit code 1 also if no VMM comes in time, or the restore ends with an error.
    """
    if record is not None and detach:
        raise click.UsageError("--record needs this program to stay, and --detach makes it return")
    wish = Wish(
        vmm_socket=vmm_socket or str(Path(path).with_name("vmm.sock")),
        listen=listen,
        image=image,
        around=around,
        prefetch=prefetch,
        record=record,
        on_image_error=OnImageError(on_image_error),
        wait_seconds=wait_seconds,
    )
    if detach:
        program.detach(wish, as_json=as_json)
    else:
        program.stay(wish, as_json=as_json)
