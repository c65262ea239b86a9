"""Tiny language models and tokenizers, built in process, random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from multi_token.chat.named import named_template

TEMPLATES: dict[str, str] = {
    "chatml": named_template("chatml"),
    "smollm2": named_template("smollm2"),
    "llama3": (
        "{{ '<s>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
        "'<|end_header_id|>\n\n' + (m['content'] | trim) + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ '<s>' }}{% if messages[0]['role'] == 'system' %}{% set system = "
        "messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}{% else %}"
        "{% set system = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
        "{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ '<s>' }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + "
        "(m['content'] | trim) + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "marked": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
"""Chat templates written to the published descriptions of their formats."""

# All other templates end a turn with `<|im_end|>`.
_END_OF_TURN = {"llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>"}
_SPECIAL = [
    "<pad>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
]
# The tokenizer's ids, and with them every golden record, depend on each letter of this text.
_CORPUS = [
    "What is this? This is a picture of a cat and a dog, a red square, a blue circle.",
    "user assistant system model tool You are a helpful assistant. Which of these is a fruit?",
    "yes no one two three four five six seven eight nine ten the first the second",
    "Look at <image> and <image>, then say what you see: <vector> or <left_camera>.",
]


def tiny_tokenizer(template: str = "chatml") -> Any:
    """A byte-level tokenizer trained on a few sentences, with a chat template of `TEMPLATES`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=_SPECIAL,
        # Every byte, so that any text can be encoded.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token=_END_OF_TURN.get(template, "<|im_end|>"),
        additional_special_tokens=_SPECIAL[3:],
    )
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def tiny_llama_config(tokenizer: Any, *, hidden_size: int = 32, max_length: int = 512) -> Any:
    """The configuration of a Llama of two layers, for this tokenizer."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # With the usual 0.02 the answers of all prompts are nearly equal.
        initializer_range=0.2,
    )


def tiny_language_model(
    folder: Path, *, template: str = "chatml", seed: int = 0, hidden_size: int = 32
) -> str:
    """A random two-layer Llama with its tokenizer, saved; returns the folder's name."""
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = tiny_tokenizer(template)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_llama_config(tokenizer, hidden_size=hidden_size))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
