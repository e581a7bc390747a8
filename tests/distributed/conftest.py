"""Two and three ranks, an even and an odd ring, started once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="package", params=[2, 3], ids=["two", "three"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(request.param, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()


@pytest.fixture(scope="package")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Enough ranks for a mesh of two by two."""
    pool = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()
