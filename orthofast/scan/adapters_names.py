"""Names of an adapter's modules found among the base's weights, whatever classes were wrapped around either."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from orthofast.scan.rules import load_rules

# what a class around the model puts before its modules' names, or leaves out
AROUND = frozenset(("base_model", "model", "language_model", "transformer"))
FUSED = ("in_proj_weight",)  # parameter of a module that has no weight of its own


class Names:
    """The names of a base's weights.

    Args:
        names: of all stored tensors, measured or not.
        tied: other name of a tensor -> its stored name.
    """

    def __init__(self, names: Iterable[str], tied: Mapping[str, str]) -> None:
        self._skipped_words = AROUND | load_rules().wrappers
        self._exact: dict[str, str] = {}
        self._words: dict[tuple[str, ...], list[str]] = {}
        self._last: dict[str, list[tuple[str, ...]]] = {}
        stored = dict.fromkeys(names)
        for name in stored:
            self._add(name, name)
        for alias, name in tied.items():
            if name in stored:
                self._add(alias, name)

    def _add(self, name: str, stored: str) -> None:
        path = name.removesuffix(".weight")
        words = self._split(path)
        self._exact[path] = stored
        if words not in self._words:
            self._words[words] = []
            self._last.setdefault(words[-1] if words else "", []).append(words)
        if stored not in self._words[words]:
            self._words[words].append(stored)

    def module(self, path: str) -> list[str]:
        """The weight of a module: none, one, or those among which nothing decides."""
        for inner in ("", *(f".{leaf}" for leaf in FUSED)):
            found = self._find(path + inner)
            if found:
                return found
        return []

    def parameters(self, path: str, ends: Iterable[str]) -> list[str]:
        """Parameters of a module among those a configuration names by their ends."""
        found: dict[str, None] = {}
        for end in ends:
            leaf = end.rpartition(".")[2]
            full = f"{path}.{leaf}"
            names = self._find(full) if full == end or full.endswith(f".{end}") else []
            if len(names) == 1:
                found[names[0]] = None
        return list(found)

    def why_not(self, path: str) -> str:
        """One sentence on a module that was not found."""
        words = self._split(path)
        inside = [names[0] for known, names in self._words.items() if words and known[: len(words)] == words]
        if inside:
            return f"{path} is stored in other parts by the base, such as {min(inside)}, to which it is not mapped"
        return f"{path} is not in the base"

    def _find(self, path: str) -> list[str]:
        if path in self._exact:
            return [self._exact[path]]
        words = self._split(path)
        if words in self._words:
            return self._words[words]
        found: dict[str, None] = {}
        for known in self._last.get(words[-1] if words else "", ()):
            shorter, longer = sorted((known, words), key=len)
            if longer[len(longer) - len(shorter) :] == shorter:
                found |= dict.fromkeys(self._words[known])
        return list(found)

    def _split(self, path: str) -> tuple[str, ...]:
        return tuple(word for word in path.split(".") if word not in self._skipped_words)
