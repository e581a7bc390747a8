"""Figures of recorded experiments as SVG files for light and dark pages, drawn again only where they would change."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from docs.recorded import Judged
from orthofast.errors import InputError, MissingPackageError

try:
    import vl_convert

    from orthofast.lab import svg
    from orthofast.lab.drawing import DARK_OF, declaration
except ImportError as missing:
    raise MissingPackageError(
        f"the figures of the lab's gallery need vl-convert ({missing}): pip install 'orthofast[lab]'"
    ) from None

THEMES = ("light", "dark")
SIZE = re.compile(r'<svg[^>]*?\swidth="([\d.]+)"[^>]*?\sheight="([\d.]+)"|<svg[^>]*?\sviewBox="0 0 ([\d.]+) ([\d.]+)"')
KEPT = "drawn.json"
# what turns a declaration into files, beside the declaration
TOOLS = f"{metadata.version('vl-convert-python')} {inspect.getsource(svg)} {sorted(DARK_OF.items())}"


@dataclass(frozen=True)
class Drawing:
    """One figure as a file.

    Attributes:
        file: the SVG.
        width: px.
        height: px.
    """

    file: Path
    width: int
    height: int


def draw(name: str, judged: Iterable[Judged], folder: Path) -> dict[str, dict[str, Drawing]]:
    """Draw the figures of a record, each for both themes.

    Args:
        name: of the record, for the files' names.
        judged: its experiments.
        folder: where the files go, and what they were drawn from; made if it is not there.

    Returns:
        Identifier -> theme -> drawing.

    Raises:
        InputError: if a figure cannot be made of the recorded numbers, with the experiment's identifier.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = _known(folder)
    made: dict[str, dict[str, Drawing]] = {}
    for one in judged:
        key = f"{one.experiment.id}-{name}"
        files = {theme: folder / f"{key}-{theme}.svg" for theme in THEMES}
        try:
            figure = one.experiment.figure(one.run.raws)
            title = f"{one.experiment.id}  {one.experiment.title}"
            spec = json.dumps(declaration(figure, title, len(one.run.seeds)), sort_keys=True)
            mark = hashlib.sha256(f"{TOOLS}{spec}".encode()).hexdigest()
            if known.get(key) != mark or not all(file.is_file() for file in files.values()):
                light = svg.rounded(str(vl_convert.vegalite_to_svg(spec)))
                files["light"].write_text(light, encoding="utf-8")
                files["dark"].write_text(svg.recoloured(light, DARK_OF), encoding="utf-8")
                known[key] = mark
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise InputError(f"{one.experiment.id} as recorded on {name} cannot be drawn ({what})") from error
        made[one.experiment.id] = {theme: Drawing(file, *_size(file)) for theme, file in files.items()}
    (folder / KEPT).write_text(json.dumps(known, indent=0, sort_keys=True), encoding="utf-8")
    return made


def _known(folder: Path) -> dict[str, str]:
    """Identifier and record -> mark of what the two files were drawn from."""
    try:
        found = json.loads((folder / KEPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _size(file: Path) -> tuple[int, int]:
    with file.open(encoding="utf-8") as text:
        found = SIZE.search(text.read(2000))
    if found is None:
        raise InputError(f"{file} has no width and height; remove it")
    width, height = (one for one in found.groups() if one)
    return round(float(width)), round(float(height))
