"""Settings of the manual."""

import re
import sys
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the extension docs.gallery_directives

project = "orthofast"
author = "the orthofast authors"
version = release = metadata.version("orthofast")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "docs.gallery_directives",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_show_copyright = False
html_title = f"orthofast {version}"
html_static_path = ["_static"]
html_css_files = ["manual.css"]
html_math_renderer = "mathml"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_member_order = "bysource"
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
add_module_names = False
suppress_warnings = ["ref.python"]  # two rooms have a Skipped of their own

CAPITAL_GREEK = re.compile(r"<mi>(?=&#x003(?:9[1-9A-F]|A[0-9]);</mi>)")  # upright, as TeX sets them
LITERAL = re.compile(r"(``.*?``)")


def keep_signs(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings write |cos| and *kernel for readers of the source; reStructuredText would take them as markup."""
    for number, line in enumerate(lines):
        pieces = LITERAL.split(line)
        pieces[::2] = [re.sub(r"\||(?<![\w*])\*(?=\w)", r"\\\g<0>", piece) for piece in pieces[::2]]
        lines[number] = "".join(pieces)


def show_math(writer: Any, node: nodes.Element) -> None:
    """Formulas as MathML, which browsers draw without a script and without a network."""
    latex, block = node.astext(), isinstance(node, nodes.math_block)
    formula = convert(latex, display="block" if block else "inline")
    if "\\" in formula or "&<" in formula:  # a command or an environment it does not know
        logging.getLogger(__name__).warning("no MathML for %s", latex, location=node)
    formula = CAPITAL_GREEK.sub('<mi mathvariant="normal">', formula)
    kind = "div" if block else "span"
    writer.body.append(f'<{kind} class="math" title="{escape(latex)}">{formula}</{kind}>')
    raise nodes.SkipNode


def find_home(app: Any, env: Any, node: Any, shown: Any) -> Any:
    """Docstrings say orthofast.pii, or name the file that defines it; the reference has it under its room."""
    target, domain = node.get("reftarget", ""), env.get_domain("py")
    last = target.rpartition(".")[2]
    known = [name for name, entry in domain.objects.items() if name.startswith("orthofast.") and not entry.aliased]
    homes = [name for name in known if name.rpartition(".")[2] == last]
    if not target.startswith("orthofast.") or len(homes) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", homes[0], node, shown)


def setup(app: Any) -> None:
    """Run before napoleon reads the docstrings."""
    app.connect("autodoc-process-docstring", keep_signs, priority=400)
    app.connect("missing-reference", find_home)
    app.add_html_math_renderer("mathml", inline_renderers=(show_math, None), block_renderers=(show_math, None))
