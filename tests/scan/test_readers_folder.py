"""Folders, modules and state dicts: one copy of the weights is chosen, the rest is named, configurations are found."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from orthofast.errors import CheckpointError, InputError
from orthofast.scan.readers.checkpoint import open_checkpoint
from orthofast.scan.readers.folder import choose
from tests.scan.attacks import gguf_head, gguf_tensor
from tests.scan.stored_values import same_bits, stored_values

CHOICES: dict[str, tuple[list[str], str, list[str]]] = {
    "index before single file": (
        ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"],
        "index",
        ["model.safetensors.index.json"],
    ),
    "safetensors before pickles": (["model.safetensors", "pytorch_model.bin"], "files", ["model.safetensors"]),
    "safetensors before GGUF": (["model.safetensors", "model-Q4_K.gguf"], "files", ["model.safetensors"]),
    "shards before a consolidated copy": (
        ["consolidated.safetensors", "model-00001-of-00001.safetensors"],
        "files",
        ["model-00001-of-00001.safetensors"],
    ),
    "a variant's index": (
        ["model.safetensors.index.fp16.json", "model.fp16-00001-of-00001.safetensors"],
        "index",
        ["model.safetensors.index.fp16.json"],
    ),
    "index of pickles": (
        ["pytorch_model.bin.index.json", "pytorch_model.bin"],
        "index",
        ["pytorch_model.bin.index.json"],
    ),
    "pickle without optimizer and rng": (
        ["pytorch_model.bin", "optimizer.bin", "training_args.bin", "rng_state_0.pth", "scheduler.pt"],
        "files",
        ["pytorch_model.bin"],
    ),
    "only an optimizer beside one file": (["weights.pt", "optimizer.pt"], "files", ["weights.pt"]),
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], "adapter", ["adapter_model.safetensors"]),
    "adapter as a pickle": (["adapter_config.json", "adapter_model.bin"], "adapter", ["adapter_model.bin"]),
    "model before its adapter": (
        ["adapter_config.json", "adapter_model.safetensors", "model.safetensors"],
        "files",
        ["model.safetensors"],
    ),
    "distributed": ([".metadata", "__0_0.distcp", "train_state.pt"], "dcp", [".metadata"]),
    "splits of one model": (
        ["b-Q4-00001-of-00002.gguf", "b-Q4-00002-of-00002.gguf", "b-Q8.gguf", "mmproj-b.gguf"],
        "gguf",
        ["b-Q4-00001-of-00002.gguf", "b-Q4-00002-of-00002.gguf"],
    ),
    "only a projector": (["mmproj-b.gguf"], "gguf", ["mmproj-b.gguf"]),
    "Meta, one shard": (["consolidated.00.pth", "params.json"], "files", ["consolidated.00.pth"]),
    "Meta, two shards": (
        ["consolidated.00.pth", "consolidated.01.pth", "params.json"],
        "meta",
        ["consolidated.00.pth", "consolidated.01.pth"],
    ),
    "shards of pickles without an index": (
        ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
        "files",
        ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
    ),
}


@pytest.mark.parametrize(("names", "kind", "chosen"), CHOICES.values(), ids=CHOICES.keys())
def test_one_copy_of_the_weights_is_chosen(names: list[str], kind: str, chosen: list[str]) -> None:
    choice = choose([*reversed(names), "config.json", "tokenizer.json"], "folder")
    assert (choice.kind, list(choice.names)) == (kind, chosen)


@pytest.mark.parametrize(
    ("names", "word"),
    [
        ([], "folder holds no .safetensors file"),
        (["a.pt", "b.pt"], r"several files of torch: a\.pt, b\.pt; name the one"),
        (["model.onnx", "tf_model.h5"], r"only model\.onnx, tf_model\.h5, and Keras and ONNX files are not read"),
        (["flax_model.msgpack"], "Flax files are not read; convert"),
        (["optimizer.pt", "rng_state.pth"], "holds no .safetensors file"),
    ],
)
def test_a_folder_without_a_checkpoint_is_refused_by_name(names: list[str], word: str) -> None:
    with pytest.raises(CheckpointError, match=word):
        choose(names, "folder")


def test_folders_inside_that_hold_weights_are_named(tmp_path: Path) -> None:
    """Pipelines of diffusers and named adapters of PEFT lie in folders of their own."""
    for name in ("unet", "vae", "tokenizer"):
        (tmp_path / name).mkdir()
    save_file({"w": torch.ones(2, 2)}, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    torch.save({"w": torch.ones(2, 2)}, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    (tmp_path / "tokenizer" / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match="weights lie in its folders unet, vae: name one of them"):
        open_checkpoint(tmp_path)
    assert len(open_checkpoint(tmp_path / "vae").extents) == 1


def test_copies_in_the_folder_are_noted(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    save_file(tensors, tmp_path / "consolidated.safetensors")
    for folder in ("original", "metal", "other"):
        (tmp_path / folder).mkdir()
    catalog = open_checkpoint(tmp_path)
    assert catalog.notes == [
        "also in the folder and not read: consolidated.safetensors, pytorch_model.bin, original/, metal/"
    ]
    assert [extent.file.name for extent in catalog.extents] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": {"quantization_config": {"quant_method": "fp8"}}}, {"quant_method": "fp8"}),
        ({"config.json": {"compression_config": {"format": "pack"}}}, {"format": "pack"}),
        ({"config.json": {"text_config": {"quantization_config": {"bits": 4}}}}, {"bits": 4}),
        ({"config.json": {}, "quantize_config.json": {"bits": 4}}, {"quant_method": "gptq", "bits": 4}),
        ({"quant_config.json": {"w_bit": 4}}, {"quant_method": "awq", "w_bit": 4}),
        ({"config.json": {"quantization_config": None}}, {}),
    ],
)
def test_the_quantisation_is_found_where_tools_write_it(
    files: dict[str, object], expected: dict[str, object], tmp_path: Path
) -> None:
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert open_checkpoint(tmp_path).quantization == expected


def test_an_adapter_carries_its_configuration(tmp_path: Path) -> None:
    save_file({"base_model.model.q.lora_A.weight": torch.ones(2, 4)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    catalog = open_checkpoint(tmp_path)
    assert catalog.config == {"adapter_config": {"peft_type": "LORA", "r": 2}}
    assert open_checkpoint(tmp_path / "adapter_config.json").extents == catalog.extents
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is not a JSON object"):
        open_checkpoint(tmp_path)


def test_a_head_that_is_not_stored_is_noted(tmp_path: Path) -> None:
    save_file({"model.embed_tokens.weight": torch.ones(4, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    assert open_checkpoint(tmp_path).notes == ["the head is tied to the embedding and stored once"]
    save_file({"lm_head.weight": torch.ones(4, 2)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).notes == []


def test_a_snapshot_of_the_hub_tells_its_commit(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--name" / "snapshots" / ("0123456789" * 4)
    folder.mkdir(parents=True)
    save_file({"w": torch.ones(2, 2)}, folder / "model.safetensors")
    assert open_checkpoint(folder).revision == "0123456789" * 4
    assert open_checkpoint(folder / "model.safetensors").revision == "0123456789" * 4
    assert open_checkpoint(folder.rename(tmp_path / "elsewhere")).revision is None


@pytest.mark.parametrize("kind", ["torch", "gguf"])
def test_a_file_that_shrinks_after_its_header_was_read(kind: str, tmp_path: Path) -> None:
    """A memory map would kill the process here."""
    file = tmp_path / f"shrinks.{kind}"
    if kind == "torch":
        torch.save({"w": torch.ones(64, 64)}, file)
    else:
        file.write_bytes(gguf_head(tensors=1) + gguf_tensor((64, 64)) + bytes(32 + 64 * 64 * 4))
    catalog = open_checkpoint(file)
    os.truncate(file, catalog.extents[0].offset + 5)
    with pytest.raises(CheckpointError, match="became shorter while it was read: 'w' is incomplete"):
        stored_values(catalog)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.config = {"model_type": "tied"}


def test_a_module_is_a_catalog_of_its_own_values() -> None:
    model = Tied()
    catalog = open_checkpoint(model)
    assert catalog.format == "memory"
    assert catalog.tied == {"head.weight": "embed.weight"}
    assert catalog.config == {"model_type": "tied"}
    assert catalog.memory["embed.weight"].data_ptr() == model.embed.weight.data_ptr()
    assert not catalog.memory["embed.weight"].requires_grad
    assert stored_values(catalog).keys() == model.state_dict().keys()
    extents = {extent.name: extent for extent in catalog.extents}
    assert (extents["inner.weight"].offset, extents["inner.weight"].nbytes, extents["inner.weight"].dtype) == (
        0,
        64,
        "F32",
    )


def test_a_state_dict_is_a_catalog_and_what_has_no_values_a_fault() -> None:
    whole = torch.randn(4, 6)
    catalog = open_checkpoint(
        {"a": whole, "t": whole.t(), "meta": torch.empty(3, device="meta"), "sparse": torch.eye(2).to_sparse()}
    )
    assert catalog.memory["t"].stride() == (1, 6)
    assert {fault.name: fault.error.split(" ", 2)[2] for fault in catalog.faults} == {
        "meta": "has no values: it is on the meta device",
        "sparse": "is sparse, quantised or nested, which is not read",
    }
    wrapped = open_checkpoint({"state_dict": {"a": whole}, "epoch": 3})  # type: ignore[dict-item]
    assert same_bits(stored_values(wrapped)["a"], whole)


@pytest.mark.parametrize("source", [nn.ReLU(), {}, {"a": 1}])
def test_nothing_to_measure_in_memory_is_refused(source: object) -> None:
    with pytest.raises(InputError, match="with tensors in it"):
        open_checkpoint(source)  # type: ignore[arg-type]


def test_what_is_no_checkpoint_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="checkpoint needs a path, a hub name, a module or a state dict, got a int"):
        open_checkpoint(3)  # type: ignore[arg-type]


DIM, HIDDEN, HEADS = 8, 12, 2


def meta_model() -> dict[str, torch.Tensor]:
    at = "layers.0."
    return {
        "tok_embeddings.weight": torch.randn(10, DIM),
        f"{at}attention.wq.weight": torch.randn(DIM, DIM),
        f"{at}attention.wk.weight": torch.randn(DIM // 2, DIM),
        f"{at}attention.wo.weight": torch.randn(DIM, DIM),
        f"{at}feed_forward.w1.weight": torch.randn(HIDDEN, DIM),
        f"{at}feed_forward.w2.weight": torch.randn(DIM, HIDDEN),
        f"{at}attention_norm.weight": torch.randn(DIM),
        "norm.weight": torch.randn(DIM),
        "output.weight": torch.randn(10, DIM),
    }


@pytest.mark.parametrize("embedding_axis", [0, 1], ids=["vocabulary cut", "width cut"])
def test_shards_of_meta_are_joined_as_their_layers_were_cut(embedding_axis: int, tmp_path: Path) -> None:
    model = meta_model()
    axes = {"wo": 1, "w2": 1, "tok_embeddings": embedding_axis}
    for k in range(2):
        part = {}
        for name, tensor in model.items():
            axis = axes.get(name.split(".")[-2], 0)
            part[name] = tensor if "norm" in name else tensor.chunk(2, axis)[k].clone()
        torch.save(part, tmp_path / f"consolidated.{k:02d}.pth")
    (tmp_path / "params.json").write_text(json.dumps({"dim": DIM, "n_heads": HEADS}))
    catalog = open_checkpoint(tmp_path)
    assert catalog.faults == []
    found = stored_values(catalog)
    assert found.keys() == model.keys()
    assert [name for name in model if not same_bits(found[name], model[name])] == []


def test_shards_of_meta_that_no_rule_covers_are_faults(tmp_path: Path) -> None:
    for k in range(2):
        torch.save(
            {"norm.weight": torch.ones(4), "adapter.query": torch.ones(4, 4)}, tmp_path / f"consolidated.{k:02d}.pth"
        )
    with pytest.raises(CheckpointError, match=r"2 consolidated shards but no params\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "params.json").write_text('{"dim": 4}')
    catalog = open_checkpoint(tmp_path)
    assert [extent.name for extent in catalog.extents] == ["norm.weight"]
    assert "no rule tells how adapter.query is cut" in catalog.faults[0].error
    (tmp_path / "consolidated.00.pth").rename(tmp_path / "consolidated.02.pth")
    with pytest.raises(CheckpointError, match="some are missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("named", ["m-1.safetensors", "m-2.safetensors"])
def test_of_a_tensor_in_two_shards_the_one_counts_that_the_index_names(named: str, tmp_path: Path) -> None:
    values = {shard: torch.randn(4, 3) for shard in ("m-1.safetensors", "m-2.safetensors")}
    for i, (shard, value) in enumerate(values.items()):
        save_file({"w": value, f"own.{i}": torch.randn(2, 2)}, tmp_path / shard)
    weight_map = {"own.0": "m-1.safetensors", "w": named, "own.1": "m-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    catalog = open_checkpoint(tmp_path)
    assert sorted(extent.name for extent in catalog.extents) == ["own.0", "own.1", "w"]
    assert same_bits(stored_values(catalog)["w"], values[named])
    (fault,) = catalog.faults
    assert fault.error == (
        f"m-1.safetensors and m-2.safetensors both hold 'w'; that of {named} counts, as the index says"
    )
