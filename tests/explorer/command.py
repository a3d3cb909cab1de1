"""`python -m explorer`: its options and exit status.

Owns the command line; must not know how schedules are run or told.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import click
import msgspec
from rich.console import Console

SCHEDULES = 100
Thing = TypeVar("Thing")


@click.command("explore")
@click.option("--variant", "names", metavar="NAME", multiple=True, help="What to explore.  [default: core]")
@click.option(
    "--scenario", "chosen", metavar="NAME", multiple=True, help="Which scenarios to run.  [default: all]"
)
@click.option(
    "--schedules",
    type=click.IntRange(1),
    default=SCHEDULES,
    show_default=True,
    help="Schedules per scenario.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="The first schedule's number."
)
@click.option("--list", "only_list", is_flag=True, help="List the variants and scenarios.")
@click.option(
    "--table",
    is_flag=True,
    help="Print the tables of the README: variants by scenario, and the mutants.",
)
@click.option("--quiet", is_flag=True, help="Print only the verdict.")
@click.option("--json", "as_json", is_flag=True, help="For scripts: print only the reports, as JSON.")
def explore_command(
    names: tuple[str, ...],
    chosen: tuple[str, ...],
    schedules: int,
    seed: int,
    *,
    only_list: bool,
    table: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Race the daemon's core, or the patch it grew from, against a VMM, and judge every step.

    The real region manager, fault handler and notifier run in this process, one actor at a time, in a drawn
    order. A reference model says what the guest may reach. For each broken rule, the shortest schedule found
    that breaks it is printed. No daemon is needed.

    \b
    Exit status:
      0  no rule was broken
      1  one was
      2  the command line is wrong
    """
    from . import report, summary  # noqa: PLC0415 - they import the daemon's core, which no other command knows
    from .scenarios import SCENARIOS  # noqa: PLC0415
    from .variants import VARIANTS  # noqa: PLC0415

    variants = [_one_of(VARIANTS, name, "--variant") for name in names or ("core",)]
    scenarios = [_one_of(SCENARIOS, name, "--scenario") for name in chosen or SCENARIOS]
    for variant in variants if chosen else ():
        for scenario in scenarios:
            if not variant.applies_to(scenario):
                raise click.UsageError(f"{variant.name} does not support the regions in {scenario.name}")
    console = Console(highlight=False, emoji=False, markup=False)
    if only_list:
        _list(console)
        return
    with console.status("exploring", spinner="line") as status:
        watching: Callable[[str], None] = (lambda _: None) if quiet or as_json else status.update
        if table:
            _tables(schedules, watching)
            return
        reports = []
        for variant in variants:
            reports.append(
                report.explored(variant, scenarios, seed=seed, schedules=schedules, watching=watching)
            )
            if not as_json:
                each = reports[-1]
                console.print(summary.verdict(each) if quiet else summary.summary(each))
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(reports), indent=2))
    raise SystemExit(1 if any(each.counterexamples for each in reports) else 0)


def _one_of(things: Mapping[str, Thing], name: str, option: str) -> Thing:
    if name not in things:
        raise click.BadParameter(f"no such name: {name!r}; see --list", param_hint=option)
    return things[name]


def _list(console: Console) -> None:
    from .scenarios import SCENARIOS  # noqa: PLC0415
    from .variants import VARIANTS  # noqa: PLC0415

    named: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (
        ("variants", [(each.name, each.about) for each in VARIANTS.values()]),
        ("scenarios", [(each.name, each.about) for each in SCENARIOS.values()]),
    )
    for title, things in named:
        width = max(len(name) for name, _ in things)
        console.print(f"{title}:")
        for name, about in things:
            console.print(f"  {name.ljust(width)}  {about}", soft_wrap=True)


def _tables(schedules: int, watching: Callable[[str], None]) -> None:
    from . import tables  # noqa: PLC0415

    click.echo(tables.variants_table(schedules, watching))
    click.echo()
    click.echo(tables.mutants_table(watching))
