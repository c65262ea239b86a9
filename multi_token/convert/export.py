"""Exports a run to a format that other software loads: `merged`, `language-model`, `llava`.

merged          RUN with its language model inside, the adapter merged: nothing else is needed
language-model  the same, with the language model's folder as an external engine needs it
llava           LLaVA in transformers' format (export_llava.py)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from multi_token import __version__
from multi_token.checkpoint.atomic import staged_folder
from multi_token.checkpoint.language_model_folder import (
    LANGUAGE_MODEL,
    with_saved_language_model,
    write_language_model,
)
from multi_token.checkpoint.save import CONFIG, PROJECTORS, save
from multi_token.convert.chat_templates import accept_content_parts, part_placeholder
from multi_token.convert.merge import merge
from multi_token.errors import ConvertError
from multi_token.language_model.forward import per_layer_inputs
from multi_token.model import MultiTokenForConditionalGeneration

Format = Literal["merged", "language-model", "llava"]
ENCODERS, MANIFEST = "encoders", "manifest.json"
MANIFEST_SCHEMA = 1
_NUM_GOLDEN_TOKENS = 8


def export(
    run: str | os.PathLike[str],
    out: Path,
    *,
    to: Format,
    revision: str | None = None,
    language_model: str | None = None,
) -> None:
    """Write a run, by folder or hub name, to `out` in another format.

    Nothing is written unless all of it can be. Raises ConvertError or CheckpointError.
    """
    with staged_folder(out) as partial:
        model = MultiTokenForConditionalGeneration.from_pretrained(
            run, revision=revision, language_model=language_model
        )
        if to == "llava":
            from multi_token.convert.export_llava import export_llava

            export_llava(model, partial)
            return
        _write_merged(model, partial)
        if to == "language-model":
            _write_for_engines(model, partial)


def _write_merged(model: MultiTokenForConditionalGeneration, out: Path) -> None:
    """Write the run with everything inside that is not on the hub already."""
    chat = model.require_processor().chat
    merge(model)
    write_language_model(model.language_model, chat.tokenizer, chat.template, out / LANGUAGE_MODEL)
    fields = model.config.model
    base, modalities = fields["language_model"], {}
    for name, modality in fields["modalities"].items():
        modalities[name] = {**modality}
        encoder = modality.get("encoder")
        if isinstance(encoder, str) and Path(encoder).is_dir():
            shutil.copytree(encoder, out / ENCODERS / name)
            modalities[name]["encoder"] = f"./{ENCODERS}/{name}"
    # a hub name stays in the card as the base; a local path means nothing elsewhere
    if not Path(base).exists():
        model.config.base_model = base
    model.config.model = {**with_saved_language_model(fields), "modalities": modalities}
    # the merged weights are its base now: `save` would write them a second time as trained ones
    model.trained_language_model = False
    save(model, out)


def _write_for_engines(model: MultiTokenForConditionalGeneration, out: Path) -> None:
    chat = model.require_processor().chat
    tokenizer = chat.tokenizer
    question = [{"role": "user", "content": "What is this?"}]
    tokenizer.chat_template = chat.template  # the recipe's, with its values of variables
    plain = _render(tokenizer, question)
    tokenizer.chat_template = accept_content_parts(chat.template)
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}]}]
    # some engines pass messages in parts and others as texts, which must give the same prompt
    if not plain == _render(tokenizer, question) == _render(tokenizer, parts):
        raise ConvertError(
            "the language model's chat template renders content parts differently from their "
            "joined text, so an engine would get another prompt; set another `chat_template`"
        )
    tokenizer.save_pretrained(out / LANGUAGE_MODEL)
    manifest = _manifest(model, _golden(model, plain))
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (out / MANIFEST).write_text(text, encoding="utf-8")


def _render(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def _golden(model: MultiTokenForConditionalGeneration, text: str) -> dict[str, Any]:
    """A prompt and the model's greedy answer in ids, which a served copy has to reproduce."""
    # argmax of the logits and not `generate`, whose result depends on the generation config
    tokenizer = model.require_processor().tokenizer
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    num_prompt, logprobs = ids.shape[1], []
    for _ in range(_NUM_GOLDEN_TOKENS):
        logits = model.language_model(
            inputs_embeds=model.get_input_embeddings()(ids),
            use_cache=False,
            **per_layer_inputs(model.language_model, ids),
        ).logits[0, -1]
        logprob, likeliest = logits.float().log_softmax(-1).max(-1)
        logprobs.append(round(float(logprob), 4))
        ids = torch.cat([ids, likeliest.view(1, 1)], 1)
    return {
        "text": text,
        "input_ids": ids[0, :num_prompt].tolist(),
        "greedy_ids": ids[0, num_prompt:].tolist(),
        "greedy_logprobs": logprobs,
    }


def _manifest(model: MultiTokenForConditionalGeneration, golden: dict[str, Any]) -> dict[str, Any]:
    template = model.require_processor().tokenizer.chat_template
    hidden_size = int(model.config.identity["hidden_size"])  # type: ignore[index]
    return {
        "schema": MANIFEST_SCHEMA,
        "multi_token_version": __version__,
        "language_model": {
            "folder": LANGUAGE_MODEL,
            **model.config.identity,  # type: ignore[dict-item]
            "embedding_scale": model.capabilities.embedding_scale,
            "needs_ids": model.capabilities.needs_input_ids,
            "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        },
        "modalities": {
            name: {
                "type": modality.type,
                "placeholder": part_placeholder(name),
                "num_tokens": _num_tokens(modality),
                # text that the engine's client writes before an item, or before its parts
                **({"facts": modality.facts} if modality.facts is not None else {}),
                "projector": {"file": PROJECTORS, "prefix": f"{name}."},
            }
            for name, modality in model.modalities.items()
        },
        "tokens": {
            "made_by": f"this folder as a run: {CONFIG} and {PROJECTORS} beside this file",
            "shape": ["num_tokens", hidden_size],
            "num_tokens": "null where it depends on the item",
        },
        "vllm": {
            "serve": f"vllm serve {LANGUAGE_MODEL} --enable-prompt-embeds "
            "--chat-template-content-format openai",
            "part": {"type": "prompt_embeds", "data": "<base64 of torch.save(tokens)>"},
            "dtype": "bfloat16 or float16; the server casts to its own",
            "note": "one part for an item, at the item's place in the message; texts must not "
            "hold <prompt_embeds>, which is the engine's own mark",
        },
        "golden": golden,
    }


def _num_tokens(modality: Any) -> int | None:
    """Tokens of one item, or None if that depends on the item."""
    from PIL import Image

    from multi_token.modalities.image import ImageModality

    if not isinstance(modality, ImageModality):
        return None
    # a square and both orientations: a number that depends on the size differs in one of them
    counts = {
        modality.num_tokens(modality.prepare(Image.new("RGB", size)).num_features)
        for size in ((64, 64), (96, 48), (48, 96))
    }
    return counts.pop() if len(counts) == 1 else None
