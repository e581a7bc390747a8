"""Rows as a data frame or a Parquet file; owns the optional packages pandas and pyarrow."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orthofast.errors import MissingPackageError
from orthofast.scan.document import finite

if TYPE_CHECKING:
    import pandas

    from orthofast.scan.result import Row

INSTALL = "pip install 'orthofast[tables]'"
TEXTS = ("name", "layer", "role", "vectors", "error", "adapter")
COUNTS = ("n", "d", "zero", "nonfinite", "head", "expert")
FLOATS = ("pii", "baseline", "ratio", "standard_error", "max_abs", "drift", "relative_change")


def require_pandas() -> None:
    """Refuse early.

    Raises:
        MissingPackageError: if pandas is not installed; the message says how to install it.
    """
    _require("pandas", "a data frame needs pandas")


def require_parquet() -> None:
    """Refuse early, before a long scan.

    Raises:
        MissingPackageError: if pyarrow is not installed; the message says how to install it.
    """
    _require("pyarrow", "a .parquet file needs pyarrow")


def to_pandas(rows: Sequence[Row], fields: Sequence[str]) -> pandas.DataFrame:
    """One line per row; integers that may be missing as Int64, so that they stay integers."""
    require_pandas()
    import pandas

    frame = pandas.DataFrame(_columns(rows, fields))
    kinds = dict.fromkeys(COUNTS, "Int64") | dict.fromkeys(FLOATS, "float64") | dict.fromkeys(TEXTS, "object")
    return frame.astype({name: kind for name, kind in kinds.items() if name in frame})


def to_parquet(rows: Sequence[Row], fields: Sequence[str]) -> bytes:
    """The rows as a Parquet file, one column per field, lists as lists."""
    require_parquet()
    import pyarrow
    import pyarrow.parquet

    kinds = {name: pyarrow.string() for name in TEXTS}
    kinds |= {name: pyarrow.int64() for name in COUNTS} | {name: pyarrow.float64() for name in FLOATS}
    kinds |= {"max_pair": pyarrow.list_(pyarrow.int64()), "histogram": pyarrow.list_(pyarrow.int64())}
    kinds |= {"tied": pyarrow.list_(pyarrow.string())}
    columns = _columns(rows, fields)
    table = pyarrow.table({name: pyarrow.array(values, kinds.get(name)) for name, values in columns.items()})
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out, compression="zstd")
    return out.getvalue()


def _columns(rows: Sequence[Row], fields: Sequence[str]) -> dict[str, list[Any]]:
    return {name: [finite(getattr(row, name)) for row in rows] for name in fields}


def _require(package: str, needs: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingPackageError(f"{needs}; install the extra with {INSTALL}")
