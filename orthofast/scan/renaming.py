"""Names of two checkpoints of one model: one may carry a wrapper's prefix that the other has not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator

DEPTHS = 2  # words of a prefix, such as "model.language_model."
TRIED = 4  # prefixes of each side, the most frequent


def renamer(before: Collection[str], after: Collection[str]) -> Callable[[str], str]:
    """What a name before is called after.

    Where less than half of the names are on both sides, a prefix is taken off one or both, the one that brings most
    names together, such as "bert." of a model with a head, and at least half of those of the smaller side: fewer meet
    by chance. A name that has no counterpart stays as it is.

    >>> rename = renamer(["encoder.w", "encoder.v", "pooler"], ["bert.encoder.w", "bert.encoder.v", "cls"])
    >>> rename("encoder.w"), rename("pooler")
    ('bert.encoder.w', 'pooler')
    """
    names, others = set(before), set(after)
    most, best = len(names & others), ("", "")
    least = min(len(names), len(others)) / 2
    if most < least:
        for off in _prefixes(names):
            for on in _prefixes(others):
                count = sum(name.startswith(off) and on + name[len(off) :] in others for name in names)
                if count > most and count >= least:
                    most, best = count, (off, on)
    off, on = best

    def rename(name: str) -> str:
        found = on + name.removeprefix(off)
        return found if name.startswith(off) and found in others else name

    return rename


def _prefixes(names: Collection[str]) -> Iterator[str]:
    """Nothing, and the most frequent first words."""
    yield ""
    counts: Counter[str] = Counter()
    for name in names:
        words = name.split(".")
        counts.update(".".join(words[:depth]) + "." for depth in range(1, DEPTHS + 1) if depth < len(words))
    yield from sorted(counts, key=lambda prefix: (-counts[prefix], prefix))[:TRIED]
