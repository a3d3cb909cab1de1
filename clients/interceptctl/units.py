"""Formats numbers, sizes, times and addresses for people.

Owns units and notation; must not know tables. Addresses are bytes in hex, ranges half-open, as in
/proc/PID/maps; counts are decimal. Narrow columns round; `--json` has the exact numbers.
"""

from __future__ import annotations

from intercept_protocol.addresses import PAGE_SHIFT, PAGE_SIZE
from interceptctl.quantiles import Quantiles

P50_P99 = "  P50   P99"


def count(number: int) -> str:
    """At most five characters up to 10^18: 99999, 1234k, 5678M."""
    for unit in ("", "k", "M", "G", "T"):
        if number < (100_000 if not unit else 10_000):
            return f"{number}{unit}"
        number //= 1000
    return f"{number}P"


def of(number: int, noun: str) -> str:
    """A count with its noun, whose plural ends in s: 1 partition, 1,234 partitions."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def address(page: int) -> str:
    """The byte address at which a page starts."""
    return f"{page << PAGE_SHIFT:#x}"


def span(start_page: int, page_count: int) -> str:
    """Pages as a half-open range of byte addresses."""
    return f"{address(start_page)}-{address(start_page + page_count)}"


def pages(page_count: int) -> str:
    """Pages of 4 KiB as bytes: 4 KiB, 512 MiB, 1.5 GiB."""
    return size(page_count * PAGE_SIZE)


def size(count: int) -> str:
    """Bytes, in at most nine characters: 0.5 KiB, 12.48 MiB, 1023 GiB."""
    rest = count / 1024
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if rest < 1024:
            return f"{rest:.4g} {unit}"
        rest /= 1024
    return f"{rest:.4g} EiB"


def duration(milliseconds: int) -> str:
    """The two largest units: 42s, 12m30s, 3h05m, 17d04h."""
    minutes, seconds = divmod(milliseconds // 1000, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def latency(nanoseconds: float | None) -> str:
    """At most five characters: 2us, 128us, 1.0ms, 134ms, 8.4s; empty for None."""
    if nanoseconds is None:
        return ""
    for unit, length in (("us", 1e3), ("ms", 1e6)):
        value = nanoseconds / length
        if value < 999.5:
            return f"{value:.1f}{unit}" if value < 9.95 and unit == "ms" else f"{value:.0f}{unit}"
    return f"{nanoseconds / 1e9:.3g}s"


def p50_p99(took: Quantiles) -> str:
    """Both in eleven columns, for a column headed P50_P99."""
    return f"{latency(took.p50_ns):>5} {latency(took.p99_ns):>5}"
