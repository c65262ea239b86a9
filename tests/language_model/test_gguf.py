"""A GGUF file is a language model like any other, by its path or that of a folder with it alone."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from multi_token.checkpoint.save import save
from multi_token.errors import LanguageModelError
from multi_token.language_model.loading import load_language_model, load_tokenizer
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.model import ModelSpec, Quantization

gguf = pytest.importorskip("gguf")

# transformers' names -> llama.cpp's
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a head in llama.cpp's order: pairs to be rotated are adjacent."""
    halves = weight.view(num_heads, 2, weight.shape[0] // num_heads // 2, -1)
    return halves.transpose(1, 2).reshape(weight.shape)


def write_gguf(folder: Path, path: Path) -> None:
    """The tiny Llama of a folder, with its tokenizer and chat template, as a file of float32."""
    model = load_language_model(str(folder))
    tokenizer = load_tokenizer(str(folder))
    config: Any = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)

    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = set(tokenizer.all_special_tokens)
    kinds = [gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t, _ in tokens]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name not in NAMES:
            layer, _, rest = name.removeprefix("model.layers.").partition(".")
            theirs = LAYER_NAMES[rest.removesuffix(".weight")]
            if theirs in heads:
                tensor = interleaved(tensor, heads[theirs])
            target = f"blk.{layer}.{theirs}.weight"
        else:
            target = NAMES[name]
        writer.add_tensor(target, tensor.float().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def file(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(parts / "language_model", path)
    return path


def spec(name: Path, **fields: Any) -> ModelSpec:
    vector = {"type": "vector", "dim": 5}
    return ModelSpec.model_validate(
        {"language_model": str(name), "modalities": {"vector": vector}, **fields}
    )


@pytest.mark.parametrize("by", ["file", "folder"])
def test_a_gguf_file_gives_the_logits_of_the_safetensors_it_was_made_of(
    by: str, file: Path, parts: Path, tmp_path: Path
) -> None:
    theirs = load_language_model(str(parts / "language_model"))
    ours = load_language_model(str(file if by == "file" else file.parent))
    ids = torch.arange(10, 22)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=0, atol=1e-6
        )
    ours.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_a_gguf_files_tokenizer_and_template_are_its_own(file: Path, parts: Path) -> None:
    ours, theirs = load_tokenizer(str(file)), load_tokenizer(str(parts / "language_model"))
    text = "<|im_start|>user\nWhat is this? 7 fruit!<|im_end|>"
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.chat_template == theirs.chat_template
    assert ours.eos_token_id == theirs.eos_token_id


def test_a_model_on_a_gguf_file_answers_and_is_saved_and_loaded(file: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MultiTokenForConditionalGeneration.from_spec(spec(file))
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "vector", "vector": [1, 2, 3, 4, 5]}]},
            {"role": "assistant", "content": "a red square"},
        ]
    }
    answer = model.generate([row], max_new_tokens=5)
    save(model, tmp_path / "run")
    again = MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert again.config.model["language_model"] == str(file)
    assert again.generate([row], max_new_tokens=5) == answer


def test_several_gguf_files_in_a_folder_are_listed(file: Path, tmp_path: Path) -> None:
    for name in ("b-q4.gguf", "a-q8.gguf"):
        (tmp_path / name).write_bytes(file.read_bytes())
    with pytest.raises(LanguageModelError, match=r"holds 2 GGUF files .*: a-q8.gguf, b-q4.gguf$"):
        load_language_model(str(tmp_path))
    with pytest.raises(LanguageModelError, match="holds 2 GGUF files"):
        load_tokenizer(str(tmp_path))


def test_a_gguf_file_beside_ordinary_weights_is_left_alone(parts: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(parts / "language_model", tmp_path / "both")
    (folder / "other.gguf").write_bytes(b"not read")
    assert load_language_model(str(folder)).config.model_type == "llama"


def test_faults_of_gguf_files_are_errors_with_a_remedy(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LanguageModelError, match="expected a GGUF file, found nothing at"):
        load_language_model(str(tmp_path / "gone.gguf"))
    with pytest.raises(LanguageModelError, match="model.quantization cannot be used with the GGUF"):
        load_language_model(str(file), quantization=Quantization(kind="4bit"))
    for length in (10, 1000, file.stat().st_size - 5000):
        (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:length])
        with pytest.raises(LanguageModelError, match="no language model could be loaded from"):
            load_language_model(str(tmp_path / "cut.gguf"))
    with pytest.raises(LanguageModelError, match="no tokenizer could be loaded from"):
        (tmp_path / "cut.gguf").write_bytes(b"GGUF")
        load_tokenizer(str(tmp_path / "cut.gguf"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(LanguageModelError, match=r'pip install "multi_token\[gguf\]"'):
        load_language_model(str(file))
