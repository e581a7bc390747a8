"""`python -m benchmarks.make_checkpoint MODEL OUT`: checkpoints of known models' shapes, for tests and timing.

Names, shapes, stored types, order inside a file and shards of about 5 GB as on the hub; entries are random (files full
of holes would be read too fast), and ``planted.json`` lists structures whose PII is known: duplicate rows, zero rows,
orthogonal and nearly orthogonal rows, the identity with a rank-1 bump, a NaN where it is asked for. Memory stays at a
few blocks of 8 MiB whatever the size; a twin in another format holds one tensor, ``bin`` one shard, ``dcp`` all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.checkpoint_content import Content
from benchmarks.checkpoint_files import write_planted, write_shards
from benchmarks.checkpoint_shapes import MODELS, Shapes, config, tensors, with_layers
from benchmarks.checkpoint_twins import TWINS

SHARD_GB = 5.0


def write_checkpoint(
    folder: Path, model: Shapes, *, seed: int = 0, nan: bool = False, shard_gb: float = SHARD_GB, hollow: bool = False
) -> Content:
    """A folder with config, shards, index and the list of what is planted.

    Args:
        folder: is made; files of the same names are replaced.
        model: from :data:`MODELS`, perhaps with fewer layers.
        seed: of the random entries.
        nan: also one NaN.
        shard_gb: largest shard, in units of 10^9 bytes.
        hollow: headers alone; the files have their sizes and take no space.

    Returns:
        What the tensors hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    specs = list(tensors(model))
    content = Content(seed, specs, nan=nan)
    write_shards(folder, specs, None if hollow else content.blocks, shard_gb)
    (folder / "config.json").write_text(json.dumps(config(model), indent=2) + "\n")
    if not hollow:
        write_planted(folder, content.planted)
    return content


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a checkpoint and its twins; 2 for a request that cannot be served."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.make_checkpoint", description=__doc__)
    made.add_argument("model", choices=list(MODELS))
    made.add_argument("out", type=Path, help="folder; twins go to folders inside it, named after them")
    made.add_argument("--layers", type=int, help="the first so many layers (default: all)")
    made.add_argument("--gb", type=float, help="as many layers as fit into so many gigabytes, even more than it has")
    made.add_argument("--body", action="store_true", help="without embedding, last norm and head")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--nan", action="store_true", help="one matrix holds a NaN")
    made.add_argument("--shard-gb", type=float, default=SHARD_GB, help=f"largest file (default {SHARD_GB:g})")
    made.add_argument("--headers-only", action="store_true", help="files with holes, for opening and inspecting alone")
    made.add_argument("--twin", action="append", default=[], choices=list(TWINS), help="may be repeated")
    options = made.parse_args(arguments)
    try:
        model = MODELS[options.model]
        if options.body:
            model = replace(model, edges=False, last_layers=0)
        model = with_layers(model, options.layers, options.gb)
        if options.headers_only and options.twin:
            raise ValueError("--headers-only makes no twins; leave out --twin")
        content = write_checkpoint(
            options.out, model, seed=options.seed, nan=options.nan, shard_gb=options.shard_gb,
            hollow=options.headers_only,
        )  # fmt: skip
        for twin in options.twin:
            TWINS[twin](options.out / twin, model, content)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    specs = list(tensors(model))
    print(f"{options.out}: {len(specs)} tensors, {sum(spec.nbytes for spec in specs) / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
