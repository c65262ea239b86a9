"""Tiny configurations of many families of language models, as transformers defines them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_PER_LAYER: dict[str, Any] = {
    **_SMALL,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "head_dim": 8,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 0,
    "hidden_size_per_layer_input": 8,
}

# Row of the table -> model type of transformers and its fields. A window of 8 tokens is shorter
# than the conversations of the trials, so that it matters.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", _SMALL),
    "Mistral": ("mistral", {**_SMALL, "sliding_window": 8}),
    "Mixtral": ("mixtral", {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2": ("qwen2", {**_SMALL, "tie_word_embeddings": True}),
    "Qwen3": ("qwen3", {**_SMALL, "head_dim": 8}),
    "Qwen3-MoE": ("qwen3_moe", {**_SMALL, **_EXPERTS, "head_dim": 8}),
    "Gemma": ("gemma", {**_SMALL, "head_dim": 8}),
    "Gemma2": ("gemma2", {**_SMALL, **_SLIDING, "head_dim": 8}),
    "Gemma3": ("gemma3_text", {**_SMALL, **_SLIDING, "head_dim": 8}),
    "Phi-3": ("phi3", {**_SMALL, "sliding_window": 8}),
    "GPT-2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "GPT-NeoX": ("gpt_neox", _SMALL),
    "OPT": ("opt", {**_SMALL, "ffn_dim": 64, "word_embed_proj_dim": 16}),
    "Falcon": ("falcon", {**_SMALL, "multi_query": True}),
    "BLOOM": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "StableLM": ("stablelm", _SMALL),
    "OLMo2": ("olmo2", _SMALL),
    "Granite": (
        "granite",
        {**_SMALL, "embedding_multiplier": 12.0, "logits_scaling": 4.0, "residual_multiplier": 0.5},
    ),
    "Cohere": ("cohere", {**_SMALL, "logit_scale": 0.25}),
    "SmolLM3": ("smollm3", {**_SMALL, "no_rope_layers": [1, 0]}),
    "Mamba2": (
        "mamba2",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 4,
            "head_dim": 16,
            "n_groups": 2,
            "chunk_size": 8,
        },
    ),
    "Falcon-H1": (
        "falcon_h1",
        {
            **_SMALL,
            "head_dim": 8,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
            "embedding_multiplier": 3.0,
            "lm_head_multiplier": 0.5,
        },
    ),
    "LFM2": ("lfm2", {**_SMALL, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
    "Qwen3-Next": (
        "qwen3_next",
        {
            **_SMALL,
            **_EXPERTS,
            "head_dim": 8,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "GPT-OSS": (
        "gpt_oss",
        {**_SMALL, **_SLIDING, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "Gemma3n": (
        "gemma3n_text",
        {
            **_PER_LAYER,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "Gemma4": ("gemma4_text", {**_PER_LAYER, "global_head_dim": 8}),
    "RWKV": ("rwkv", {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}),
    "xLSTM": (
        "xlstm",
        {"hidden_size": 128, "num_heads": 2, "num_hidden_layers": 2, "qk_dim_factor": 1.0},
    ),
    "BERT": ("bert", _SMALL),
}


def tiny_config(family: str, *, vocab_size: int = 400, **changes: Any) -> Any:
    """The configuration of a family's tiny model."""
    from transformers import AutoConfig

    kind, fields = FAMILIES[family]
    fields = {**fields, **changes, "vocab_size": vocab_size}
    if "vocab_size_per_layer_input" in fields:
        fields["vocab_size_per_layer_input"] = vocab_size
    return AutoConfig.for_model(kind, pad_token_id=0, bos_token_id=1, eos_token_id=2, **fields)


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random model of a family, in eval mode; every parameter is drawn, none is left at zero."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def save_tiny_model(family: str, folder: Path, **changes: Any) -> None:
    """A family's tiny model and a tiny tokenizer, as a folder that a recipe can name."""
    from multi_token.testing import tiny_tokenizer

    tiny_model(family, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
