"""The weights of a scan, measured by this process alone or dealt to a team of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from orthofast.errors import OrthofastError
from orthofast.scan.folding import Settings, jobs_of
from orthofast.scan.pipeline import Finished
from orthofast.scan.plan import Item
from orthofast.scan.ranks import Rows, Scan, units_of
from orthofast.scan.result import Row
from orthofast.scan.tally import Tally

Run = Callable[[Iterable[list[Item]], Finished], None]  # measures lists of weights as they are drawn


def measure_alone(tally: Tally, run: Run, finished: Finished) -> None:
    """Measure everything that is missing."""
    missing = tally.missing
    if missing:
        run([missing], finished)


def measure_together(scan: Scan, tally: Tally, settings: Settings, run: Run, finished: Finished) -> None:
    """Draw weights until all are measured, take over those of lost ranks, and collect what the others found.

    Args:
        scan: this scan in the store.
        tally: takes all rows; what it holds on rank 0 at the start, from journals, is not measured again.
        settings: what is folded; decides how the work is cut.
        run: measures lists of weights.
        finished: called for the weights this rank measures.
    """
    items = tally.items
    for index, rows in scan.share(dict(tally.known()) if scan.rank == 0 else None).items():
        tally.add(items[index], rows)
    missing = [tally.index(item) for item in tally.missing]
    costs = [sum(job.flops for job in jobs_of(items[index], settings)) for index in missing]
    units = [[missing[i] for i in unit] for unit in units_of(costs, scan.size)]
    home = {index: number for number, unit in enumerate(units) for index in unit}
    found: dict[int, Rows] = {}

    def done(item: Item, rows: list[Row]) -> None:
        finished(item, rows)
        number = home[tally.index(item)]
        known = found.setdefault(number, {})
        known[tally.index(item)] = rows
        if len(known) == len(units[number]):
            scan.done(number, known)

    def drawn(numbers: Iterable[int]) -> Iterator[list[Item]]:
        for number in numbers:
            yield [items[index] for index in units[number]]

    run(drawn(scan.draw(len(units))), done)
    for number in scan.lost(len(units)):
        found.pop(number, None)
        run(drawn([number]), done)
    for number in range(len(units)):
        if number not in found:
            collect(tally, scan.rows(number))


def collect(tally: Tally, rows: Rows) -> None:
    """Rows that another rank found."""
    for index, known in rows.items():
        tally.add(tally.items[index], known)


def collect_published(scan: Scan, tally: Tally) -> None:
    """What the others have published, as far as it can still be had."""
    try:
        for rows in scan.published():
            collect(tally, rows)
    except OrthofastError:
        return
