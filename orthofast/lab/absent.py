"""Tables and figures that have no experiment here, why, and what the papers print of them."""

from __future__ import annotations

from orthofast.lab.experiment import Absent

GPU = "needs CIFAR and days of a GPU"

ABSENT = (
    Absent(
        "S0-T1",
        "Table 1: PII before and after training by four optimisers",
        "A layer that starts at PII 1 stays near 1 under SGD and falls under adaptive optimisers.",
        "needs MNIST",
        {
            "SGD, layers 1-3": "1.0/0.996, 0.035/0.049, 0.035/0.048, accuracy 93.59",
            "Adam": "1.0/0.432, 0.035/0.153, 0.035/0.109, accuracy 98.22",
            "AdamW": "1.0/0.411, 0.035/0.153, 0.035/0.114, accuracy 97.92",
            "RMSprop": "1.0/0.766, 0.035/0.234, 0.035/0.149, accuracy 97.94",
        },
    ),
    Absent(
        "S0-T2",
        "Table 2: the same of a convolutional network, CIFAR-10",
        "SGD stays closest to the start in every layer.",
        GPU,
        {
            "SGD": "1.0/0.795, 0.070/0.195, 0.050/0.149, accuracy 84.04",
            "Adam": "1.0/0.328, 0.070/0.217, 0.050/0.242, accuracy 85.94",
            "AdamW": "1.0/0.337, 0.070/0.208, 0.050/0.237, accuracy 85.96",
            "RMSprop": "1.0/0.37, 0.070/0.230, 0.050/0.207, accuracy 84.80",
        },
    ),
    Absent(
        "S0-T3",
        "Table 3: perceptrons with and without normalisation and shortcuts",
        "Both together lower PII and do not lower accuracy.",
        "needs MNIST",
        {
            "Sigmoid, Adam": "0.278 to 0.139, accuracy 97.88 to 98.13",
            "Tanh, Adam": "0.136 to 0.118, accuracy 98.01 to 98.14",
            "ReLU, Adam": "0.138 to 0.09, accuracy 98.23 to 98.45",
            "GELU, Adam": "0.141 to 0.081, accuracy 98.16 to 98.24",
            "GELU, SGD": "0.053 to 0.036, accuracy 97.54 to 98.13",
        },
    ),
    Absent(
        "S0-T4",
        "Table 4: residual networks with and without normalisation and shortcuts, CIFAR-10",
        "Both together lower PII and raise accuracy.",
        GPU,
        {
            "GELU, Adam": "0.196 to 0.176, accuracy 95.34 to 98.66",
            "GELU, SGD": "0.206 to 0.155, accuracy 85.48 to 90.22",
        },
    ),
    Absent(
        "S0-T5",
        "Table 5: PII of pretrained transformers",
        "PII is near the isotropic baseline everywhere; large models lie below small ones; LoRA keeps it.",
        "needs the pretrained checkpoints; `orthofast scan --preset paper` reads those at hand",
        {"BERT, Query": "0.046", "LLaMA, Query": "0.023", "Qwen before and after LoRA, Query": "0.022, 0.022"},
    ),
    Absent(
        "S0-F1",
        "Figure 1: cosine and Gram matrix of a layer at its start",
        "Off-diagonal entries are near 0.",
        "is drawn by none of the experiments",
        {"PII": "0.035"},
    ),
    Absent(
        "S0-F2",
        "Figure 2: cosine and Gram matrices with and without normalisation and shortcuts",
        "Off-diagonal entries shrink, the Gram diagonal grows.",
        "needs MNIST",
    ),
    Absent("S0-A1", "Appendix Table 1: notation", "A table of symbols.", "holds no measurement"),
    Absent(
        "S0-A2",
        "Appendix Table 2: as Table 2, CIFAR-100",
        "SGD stays closest to the start.",
        GPU,
        {
            "SGD": "1.0/0.858, 0.070/0.121, 0.050/0.062",
            "Adam": "1.0/0.333, 0.070/0.324, 0.050/0.152",
            "AdamW": "1.0/0.352, 0.070/0.311, 0.050/0.166",
            "RMSprop": "1.0/0.384, 0.070/0.309, 0.050/0.154",
        },
    ),
    Absent(
        "S0-A3",
        "Appendix Table 3: as Table 4, CIFAR-100",
        "Both together lower PII and raise accuracy.",
        f"{GPU}; the published file cannot run, its last layer expects 64 inputs of 512",
        {"GELU, Adam": "0.212 to 0.154, accuracy 39.38 to 49.43", "GELU, SGD": "0.194 to 0.166, 51.59 to 53.34"},
    ),
    Absent(
        "S0-A4",
        "Appendix Table 4: normalisation and shortcuts, one at a time",
        "Both < normalisation < shortcuts < neither, in every layer.",
        "needs MNIST",
        {
            "neither": "0.131, 0.148, 0.153",
            "normalisation": "0.100, 0.107, 0.128",
            "shortcuts": "0.111, 0.137, 0.147",
            "both": "0.079, 0.090, 0.107",
        },
    ),
    Absent(
        "S0-M1",
        "Table 5, row Transformer: last feed-forward matrix without normalisation and shortcut",
        "It has a clearly higher PII.",
        "needs WikiText-2",
        {"Linear_2": "0.162"},
    ),
    Absent(
        "S0-M2",
        "Table 5, last rows: Qwen before and after LoRA",
        "PII changes little.",
        "needs the pretrained checkpoint",
        {"Query": "0.022, 0.022", "Atten_Output": "0.015, 0.024"},
    ),
    Absent(
        "S0-M3",
        "Table 5, row Transformer: its width",
        "Not stated; PII 0.025 is the baseline of vectors of length 1024.",
        "is an inference, not a measurement",
        {"Atten_Output": "0.025"},
    ),
    Absent(
        "S1-X1",
        "Appendix H: comparison with Brock et al. 2021",
        "Orthogonal weights beside scaled weight standardisation.",
        "the appendix is not at hand, and the main text has no numbers",
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
        "S2-T1",
        "Table 1: test error on CIFAR-10, depths 56, 110, 230, 1202",
        "LastBN is best at each depth, and improves with depth.",
        f"{GPU}; depth 1202 needs more than 26 GB",
        {
            "ResNet": "7.52 ± .30, 6.89 ± .52, 7.35 ± .64, 9.42 ± 3.10",
            "PreResNet": "6.89 ± .09, 6.25 ± .08, 6.12 ± .21, 6.07 ± .10",
            "PreResNet_v1": "6.75 ± .26, 6.37 ± .24, 6.32 ± .21, 7.89 ± .58",
            "ResNet_LastBN": "6.50 ± .22, 6.10 ± .09, 5.94 ± .18, 5.68 ± .14",
        },
    ),
    Absent(
        "S2-T1b",
        "Beside Table 1: depths 1202 and 2402 with twice the decay and iterations",
        "Depth 2402 trains with LastBN alone.",
        GPU,
        {"LastBN, 1202": "4.79 ± .12", "LastBN, 2402": "5.04 ± .30", "ResNet, 2402": "does not converge"},
    ),
    Absent(
        "S2-T2",
        "Table 2: test error on CIFAR-100",
        "LastBN is best at each depth, and improves with depth.",
        GPU,
        {
            "ResNet": "29.60 ± .41, 28.3 ± 1.09, 29.25 ± .44, 30.49 ± 4.44",
            "PreResNet": "29.29 ± .44, 27.58 ± .12, 26.72 ± .33, 26.23 ± .26",
            "PreResNet_v1": "29.60 ± .21, 28.54 ± .26, 27.92 ± .34, 30.07 ± 2.04",
            "ResNet_LastBN": "28.82 ± .38, 27.05 ± .23, 25.80 ± .10, 25.51 ± .27",
        },
    ),
    Absent(
        "S2-X1",
        "Supplement: ImageNet with and without LastBN",
        "LastBN is better.",
        "needs ImageNet; the supplement is not at hand",
    ),
)
