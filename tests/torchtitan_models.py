"""Tiny random HF checkpoints of what `convert: torchtitan` knows, and torchtitan's own models and adapters for them."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

# torchtitan's expert kernels are written in triton, which a torch for the CPU does not bring, and are imported with
# any of its models. Nothing here calls them.
_KERNELS = "torchtitan.distributed.minimal_async_ep.kernels"
if _KERNELS not in sys.modules:
    sys.modules[_KERNELS] = types.ModuleType(_KERNELS)
    sys.modules[_KERNELS].__getattr__ = lambda _: None  # type: ignore[method-assign]

VOCABULARY, DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, EXPERT_HIDDEN = 96, 32, 48, 2, 4, 2, 16, 4, 24
LENGTH, THETA = 128, 10_000.0

SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": DIM, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "pad_token_id": 0,
    "max_position_embeddings": LENGTH, "rms_norm_eps": 1e-5, "rope_theta": THETA, "attn_implementation": "eager",
}  # fmt: skip
MOE = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_HIDDEN, "norm_topk_prob": True}
LATENT = {
    "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_HIDDEN, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "num_key_value_heads": HEADS, "head_dim": 8,
    "n_shared_experts": 2, "routed_scaling_factor": 1.0, "norm_topk_prob": False,
}  # fmt: skip
GPT_OSS = {
    "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "num_attention_heads": 64, "num_key_value_heads": 8,
    "head_dim": 64, "intermediate_size": EXPERT_HIDDEN, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "head_dim": DIM // HEADS},
    "qwen3": {"model_type": "qwen3"},
    "qwen3, tied": {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3_moe": {"model_type": "qwen3_moe", **MOE},
    "deepseek_v3": {"model_type": "deepseek_v3", **LATENT, "q_lora_rank": None},
    "deepseek_v3, mtp": {"model_type": "deepseek_v3", **LATENT, "q_lora_rank": 8, "num_nextn_predict_layers": 1},
    "gpt_oss": {"model_type": "gpt_oss", **GPT_OSS},
}


def save(directory: Path, name: str, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Any]:
    """Write model `name` as transformers saves it; its keys and its config."""
    model = hf_model(name).to(dtype)
    model.save_pretrained(directory)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    if "mtp" in name:  # transformers has no such layers: one as DeepSeek's checkpoints have it, after the others
        tensors |= _mtp_layer(tensors)
        save_file(tensors, path)
    return tensors, model.config


def hf_model(name: str) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.for_model(**{**SMALL, "tie_word_embeddings": False, **MODELS[name]})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for tensor in model.state_dict().values():
        torch.nn.init.normal_(tensor, std=0.3)  # norms of 1 and biases of 0 would tell nothing
    return model


def _mtp_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    last, new = f"model.layers.{LAYERS - 1}.", f"model.layers.{LAYERS}."
    made = {new + key.removeprefix(last): value + 1 for key, value in tensors.items() if key.startswith(last)}
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        made[f"{new}{norm}.weight"] = torch.randn(DIM).to(tensors["lm_head.weight"].dtype)
    return made | {f"{new}eh_proj.weight": torch.randn(DIM, 2 * DIM).to(tensors["lm_head.weight"].dtype)}


def torchtitan_config(name: str, *, fused: bool = False, prediction: bool = True) -> Any:
    """torchtitan's model config; `.build()` makes the model. `fused` has one parameter for q, k and v.

    `prediction` is whether a model whose checkpoint has layers of multi-token prediction has them too.
    """
    from torchtitan.models import common, deepseek_v3, gpt_oss, llama3, qwen3

    cosine = common.CosSinRoPE.Config(dim=HEAD_DIM, max_seq_len=LENGTH, theta=THETA)
    heads = {"n_heads": HEADS, "n_kv_heads": KV_HEADS, "fuse_qkv": fused}
    whole = {"n_layers": LAYERS, "dim": DIM, "attn_backend": "flex"}
    more: dict[str, Any] = {}
    match name.partition(",")[0]:
        case "llama":
            cls = llama3.Llama3Model
            rope = common.ComplexRoPE.Config(dim=DIM // HEADS, max_seq_len=LENGTH, theta=THETA, scaling="none")
            layers = llama3._build_llama3_layers(**whole, **heads, hidden_dim=HIDDEN, rope=rope)
        case "qwen3":
            cls, more = qwen3.Qwen3Model, {"enable_weight_tying": "tied" in name}
            layers = qwen3._build_qwen3_layers(**whole, **heads, head_dim=HEAD_DIM, hidden_dim=HIDDEN, rope=cosine)
        case "qwen3_moe":
            cls = qwen3.Qwen3Model
            layers = qwen3._build_qwen3_moe_layers(
                **whole, **heads, head_dim=HEAD_DIM, moe_hidden_dim=EXPERT_HIDDEN, num_experts=EXPERTS, top_k=2,
                moe_comm_backend="standard", rope=cosine,
            )  # fmt: skip
        case "deepseek_v3":
            cls = deepseek_v3.DeepSeekV3Model
            layers = deepseek_v3._build_dsv3_layers(
                **whole, n_heads=HEADS, n_dense_layers=1, q_lora_rank=MODELS[name]["q_lora_rank"] or 0, kv_lora_rank=8,
                qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, dense_hidden_dim=HIDDEN,
                moe_hidden_dim=EXPERT_HIDDEN, num_experts=EXPERTS, num_shared_experts=2, router_top_k=2,
                router_score_func="sigmoid", moe_comm_backend="standard", non_blocking_capacity_factor=None,
                mscale=1.0, rope=common.ComplexRoPE.Config(dim=8, max_seq_len=LENGTH, theta=THETA, scaling="none"),
            )  # fmt: skip
            if "mtp" in name and prediction:
                more = {"mtp_layers": deepseek_v3._build_mtp_layers(layers[-1], dim=DIM, num_mtp_layers=1)}
        case _:
            cls = gpt_oss.GptOssModel
            layers = gpt_oss._build_gptoss_layers(
                **whole, hidden_dim=EXPERT_HIDDEN, num_experts=EXPERTS, top_k=2, load_balance_coeff=1e-3,
                fuse_qkv=fused, moe_comm_backend="standard",
                rope=common.CosSinRoPE.Config(dim=64, max_seq_len=LENGTH, theta=THETA),
            )  # fmt: skip
    ones = {"weight": torch.nn.init.ones_}
    return cls.Config(
        dim=DIM,
        vocab_size=VOCABULARY,
        tok_embeddings=common.Embedding.Config(num_embeddings=VOCABULARY, embedding_dim=DIM, param_init=ones),
        norm=common.RMSNorm.Config(normalized_shape=DIM, param_init=ones),
        lm_head=common.Linear.Config(in_features=DIM, out_features=VOCABULARY, param_init=ones),
        layers=layers,
        **more,
    )


def adapter(name: str, config: Any) -> Any:
    """torchtitan's own, of the model's family."""
    from torchtitan.models.deepseek_v3.state_dict_adapter import DeepSeekV3StateDictAdapter
    from torchtitan.models.gpt_oss.state_dict_adapter import GptOssStateDictAdapter
    from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
    from torchtitan.models.qwen3.state_dict_adapter import Qwen3StateDictAdapter

    families = {
        "llama": Llama3StateDictAdapter,
        "qwen3": Qwen3StateDictAdapter,
        "qwen3_moe": Qwen3StateDictAdapter,
        "deepseek_v3": DeepSeekV3StateDictAdapter,
        "gpt_oss": GptOssStateDictAdapter,
    }
    return families[name.partition(",")[0]](config, None)
