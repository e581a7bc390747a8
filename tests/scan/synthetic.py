"""Results as large models would give them, made without weights: 70B with heads, many experts, an adapter."""

from __future__ import annotations

import random

from orthofast.metrics.coherence import isotropic_baseline
from orthofast.scan import Row, ScanResult, Skipped

LLAMA = {
    "self_attn.q_proj": ("Query", 8192, 8192, 64),
    "self_attn.k_proj": ("Keys", 1024, 8192, 8),
    "self_attn.v_proj": ("Values", 1024, 8192, 8),
    "self_attn.o_proj": ("Atten_Output", 8192, 8192, 64),
    "mlp.gate_proj": ("Linear_1.gate", 28672, 8192, 0),
    "mlp.up_proj": ("Linear_1.weight", 28672, 8192, 0),
    "mlp.down_proj": ("Linear_2.weight", 8192, 28672, 0),
}
PROVENANCE: dict[str, object] = {
    "checkpoint": "made up",
    "versions": {"orthofast": "0", "torch": "2", "numpy": "2", "python": "3"},
    "backends": ["reference"],
    "files": [{"name": "model-00001-of-00030.safetensors", "nbytes": 4_976_698_592}],
    "timings": {"read_s": 1.0, "fold_s": 2.0, "total_s": 3.0},
    "date": "2026-01-01T00:00:00+00:00",
}
BINS = 201


def row(generator: random.Random, name: str, layer: str, role: str, side: str, sizes: tuple[int, int]) -> Row:
    n, d = sizes if side == "rows" else sizes[::-1]
    baseline = isotropic_baseline(d)
    ratio = generator.uniform(0.9, 1.3) * (1.6 if role == "Query" and layer in ("0", "1") else 1.0)
    return Row(name, layer, role, side, n, d, baseline * ratio, baseline, ratio, 0, 0, None)


def histogram(generator: random.Random, d: int) -> tuple[int, ...]:
    """Counts of normal cosines of width 1.2 / sqrt(d), the odd one far out."""
    counts = [0] * BINS
    for _ in range(4000):
        value = generator.gauss(0.0, 1.2 / d**0.5)
        counts[min(BINS - 1, max(0, int((value + 1) / 2 * BINS)))] += 1
    counts[int(0.93 * BINS)] += 1
    return tuple(counts)


def dense(layers: int = 80, heads: bool = True, histograms: bool = True, seed: int = 1) -> ScanResult:
    """Llama of 70B: layers x 7 matrices x 2 sides, each head of each attention matrix."""
    generator = random.Random(seed)
    drawn = {d: histogram(generator, d) for d in (1024, 8192, 28672)} if histograms else {}
    rows = []
    for layer in range(layers):
        for leaf, (role, out, inward, count) in LLAMA.items():
            name = f"model.layers.{layer}.{leaf}.weight"
            for side in ("rows", "cols"):
                made = row(generator, name, str(layer), role, side, (out, inward))
                made.histogram = drawn.get(made.d or 0)
                made.max_abs, made.max_pair = generator.uniform(0.2, 0.99), (3, generator.randrange(4, made.n or 5))
                rows.append(made)
            for head in range(count if heads else 0):
                part = row(generator, name, str(layer), role, "rows", (128, 8192))
                part.head = head
                rows.append(part)
    skipped = [
        Skipped(f"model.layers.{layer}.{norm}.weight", "norm scale of shape [8192]: one vector has no pairs")
        for layer in range(layers)
        for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    return ScanResult(rows, skipped, PROVENANCE | {"checkpoint": f"Llama with {layers} layers"})


def experts(layers: int = 60, count: int = 256, seed: int = 2) -> ScanResult:
    """DeepSeek's shape: 3 matrices of 256 experts in each layer, 92 thousand rows of both sides."""
    generator = random.Random(seed)
    sizes = {"gate_proj": ("Linear_1.gate", 2048, 7168), "up_proj": ("Linear_1.weight", 2048, 7168)}
    sizes |= {"down_proj": ("Linear_2.weight", 7168, 2048)}
    rows, skipped = [], []
    for layer in range(layers):
        for leaf, (role, out, inward) in sizes.items():
            for expert in range(count):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{leaf}.weight"
                for side in ("rows", "cols"):
                    made = row(generator, name, str(layer), role, side, (out, inward))
                    made.expert = expert
                    rows.append(made)
                skipped.append(Skipped(f"{name}_scale_inv", "scales of another tensor"))
    return ScanResult(rows, skipped, PROVENANCE | {"checkpoint": f"{count} experts in {layers} layers"})


def adapted(layers: int = 12, seed: int = 3) -> ScanResult:
    """A base of 12 layers with the queries and values of an adapter: base, merged and delta."""
    result = dense(layers, heads=False, histograms=False, seed=seed)
    generator = random.Random(seed)
    added = []
    for found in result.rows:
        found.adapter = "base"
        if found.role in ("Query", "Values"):
            drift = generator.uniform(0.001, 0.02)
            for adapter, factor in (("merged", 1 + generator.uniform(-0.02, 0.08)), ("delta", 9.0)):
                pii = (found.pii or 0.0) * factor
                extra = Row(
                    found.name,
                    found.layer,
                    found.role,
                    found.vectors,
                    found.n,
                    found.d,
                    pii,
                    found.baseline,
                    pii / (found.baseline or 1.0),
                    0,
                    0,
                    None,
                    adapter=adapter,
                )
                if adapter == "merged":
                    extra.drift, extra.relative_change = drift, drift * 3
                added.append(extra)
    return ScanResult(result.rows + added, result.skipped, result.provenance | {"checkpoint": "base with adapter"})
