"""Tables and figures that have no experiment here, why, and what the papers print of them."""

from __future__ import annotations

from orthofast.lab.experiment import Absent

ABSENT = (
    Absent("S0-A1", "Appendix Table 1: notation", "A table of symbols.", "holds no measurement"),
    Absent(
        "S0-M3",
        "Table 5, row Transformer: its width",
        "Not stated; PII 0.025 is the baseline of vectors of length 1024.",
        "is an inference, not a measurement",
        {"Atten_Output": "0.025"},
    ),
    Absent(
        "S1-X2",
        "Public training code: what it records",
        "Gaps every fifth epoch, into an array of another length.",
        "is a fault of that code, and no measurement",
    ),
    Absent(
        "S1-X3",
        "Appendices C to G: proofs and further chains",
        "Their statements are measured in S1-F2a, S1-F5 and S1-F6b as far as the main text tells them.",
        "the appendices are not at hand",
    ),
    Absent(
        "S2-X1",
        "Supplement: ImageNet with and without LastBN",
        "LastBN is better.",
        "needs ImageNet, which the lab does not read, and days of a GPU; the supplement's numbers are not at hand",
    ),
)
