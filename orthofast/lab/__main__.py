"""``python -m orthofast.lab``: the lab's command line, once the packages of its extra are there."""

from __future__ import annotations

import importlib
import importlib.util
import sys

PACKAGES = ("jinja2", "sklearn", "vl_convert")
MISSING_PACKAGE = 4


def main() -> None:
    """Run the command, or say what it needs."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(f"orthofast: the lab needs {', '.join(missing)}; pip install 'orthofast[lab]'\n")
        raise SystemExit(MISSING_PACKAGE)
    importlib.import_module("orthofast.lab.command").main()


if __name__ == "__main__":
    main()
