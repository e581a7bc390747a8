"""The rules against llama.cpp's own map from the names of 126 architectures to what each tensor is."""

from __future__ import annotations

import pytest

from orthofast.scan.roles import Roles

gguf = pytest.importorskip("gguf")
from gguf.tensor_mapping import TensorNameMap  # noqa: E402

ROLE_OF = {
    "TOKEN_EMBD": "Embedding",
    "TOKEN_TYPES": "Embedding",
    "POS_EMBD": "Embedding",
    "OUTPUT": "Head",
    "ATTN_QKV": "QKV",
    "ATTN_Q": "Query",
    "ATTN_K": "Keys",
    "ATTN_V": "Values",
    "ATTN_OUT": "Atten_Output",
    "ATTN_Q_A": "Query.latent",
    "ATTN_Q_B": "Query",
    "ATTN_KV_A_MQA": "KV.latent",
    "ATTN_KV_B": "KV",
    "ATTN_GATE": "Attention.gate",
    "FFN_GATE_INP": "Router",
    "FFN_GATE_INP_SHEXP": "Router",
    "FFN_UP": "Linear_1.weight",
    "FFN_UP_EXP": "Linear_1.weight",
    "FFN_UP_SHEXP": "Linear_1.weight",
    "FFN_UP_CHEXP": "Linear_1.weight",
    "FFN_GATE": "Linear_1.gate",
    "FFN_GATE_EXP": "Linear_1.gate",
    "FFN_GATE_SHEXP": "Linear_1.gate",
    "FFN_GATE_CHEXP": "Linear_1.gate",
    "FFN_DOWN": "Linear_2.weight",
    "FFN_DOWN_EXP": "Linear_2.weight",
    "FFN_DOWN_SHEXP": "Linear_2.weight",
    "FFN_DOWN_CHEXP": "Linear_2.weight",
    "DEC_ATTN_Q": "Query",
    "DEC_ATTN_K": "Keys",
    "DEC_ATTN_V": "Values",
    "DEC_ATTN_OUT": "Atten_Output",
    "DEC_CROSS_ATTN_Q": "Query",
    "DEC_CROSS_ATTN_K": "Keys",
    "DEC_CROSS_ATTN_V": "Values",
    "DEC_CROSS_ATTN_OUT": "Atten_Output",
    "DEC_FFN_UP": "Linear_1.weight",
    "DEC_FFN_GATE": "Linear_1.gate",
    "DEC_FFN_DOWN": "Linear_2.weight",
    "ENC_ATTN_Q": "Query",
    "ENC_ATTN_K": "Keys",
    "ENC_ATTN_V": "Values",
    "ENC_ATTN_OUT": "Atten_Output",
    "ENC_FFN_UP": "Linear_1.weight",
    "ENC_FFN_GATE": "Linear_1.gate",
    "ENC_FFN_DOWN": "Linear_2.weight",
    "V_ENC_ATTN_QKV": "QKV",
    "V_ENC_ATTN_Q": "Query",
    "V_ENC_ATTN_K": "Keys",
    "V_ENC_ATTN_V": "Values",
    "V_ENC_ATTN_O": "Atten_Output",
    "V_ENC_FFN_UP": "Linear_1.weight",
    "V_ENC_FFN_GATE": "Linear_1.gate",
    "V_ENC_FFN_DOWN": "Linear_2.weight",
    "A_ENC_ATTN_Q": "Query",
    "A_ENC_ATTN_K": "Keys",
    "A_ENC_ATTN_V": "Values",
    "A_ENC_OUTPUT": "Atten_Output",
    "A_ENC_FFN_UP": "Linear_1.weight",
    "A_ENC_FFN_DOWN": "Linear_2.weight",
}
MISSES: dict[str, str] = {}


def judged() -> list[tuple[str, str, str]]:
    """(name, its role by llama.cpp's map, the role read)."""
    wanted = {}
    for table in (TensorNameMap.mappings_cfg, TensorNameMap.block_mappings_cfg):
        for tensor, names in table.items():
            if tensor.name in ROLE_OF:
                for name in (gguf.TENSOR_NAMES[tensor], *names):
                    wanted[name.format(bid=3, xid=5)] = ROLE_OF[tensor.name]
    roles = Roles({f"{name}.weight": (8, 8) for name in wanted}, {"num_local_experts": 4})
    return [(name, role, roles.read(f"{name}.weight", (8, 8)).role) for name, role in wanted.items()]


def test_names_of_126_architectures_get_the_role_llama_cpp_gives_them() -> None:
    found = judged()
    wrong = {name: read for name, role, read in found if read != role}
    assert wrong == MISSES
    assert len(found) > 400
