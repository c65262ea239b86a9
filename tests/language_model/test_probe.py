"""probe.py: capabilities are found by running tokens; each missing one has a sentence."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, TextStreamer

from multi_token.errors import LanguageModelError
from multi_token.generate import generate_ids
from multi_token.language_model.lora import adapter_parameters, attach_adapter
from multi_token.language_model.probe import check_trainable, probe
from multi_token.recipe.train import AdapterSpec
from multi_token.testing import tiny_image_encoder, tiny_language_model
from multi_token.types import MediaSpan, Sample


def table() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "docs" / "language_models.py"
    spec = importlib.util.spec_from_file_location("language_models_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLE = table()
trials, families = TABLE.part("trials"), TABLE.part("families")


class IdsInItsLayers(LlamaForCausalLM):
    """Looks ids up after its first layer; embeddings alone would silently give other logits."""

    def forward(self, input_ids: Any = None, **inputs: Any) -> Any:
        output = super().forward(input_ids=input_ids, **inputs)
        if input_ids is not None:
            output.logits = output.logits + 0.1 * (input_ids % 7)[..., None]
        return output


class IdsOnly(LlamaForCausalLM):
    """Takes no embeddings."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **inputs: Any) -> Any:
        if inputs_embeds is not None:
            raise ValueError("give me ids")
        return super().forward(input_ids=input_ids, **inputs)


class KnownEmbeddingsOnly(LlamaForCausalLM):
    """Finds the ids again, as some do, and fails at embeddings that are no token's."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **inputs: Any) -> Any:
        if inputs_embeds is not None:
            known = inputs_embeds[:, :, None] == self.get_input_embeddings().weight
            if not known.all(-1).any(-1).all():
                raise ValueError("not one of my tokens")
        return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **inputs)


class Untrainable(LlamaForCausalLM):
    """Lets no gradient through."""

    def forward(self, *args: Any, **inputs: Any) -> Any:
        with torch.no_grad():
            return super().forward(*args, **inputs)


class Drifting(LlamaForCausalLM):
    """Changes its own weights while it is trained."""

    def forward(self, *args: Any, **inputs: Any) -> Any:
        if self.training:
            self.get_input_embeddings().weight.data.add_(0.3)
            self.lm_head.weight.data.mul_(1.5)
        return super().forward(*args, **inputs)


def llama(kind: Any = LlamaForCausalLM) -> Any:
    torch.manual_seed(0)
    return kind(families.tiny_config("Llama", initializer_range=0.2)).eval()


def test_a_plain_model_has_all_capabilities_and_no_notes() -> None:
    found = probe(llama())
    assert found.notes() == []
    assert found.supports_packing
    found.require("supports_packing")


def test_the_probe_takes_six_forwards_of_a_dozen_tokens() -> None:
    model, widths = llama(), []
    model.register_forward_pre_hook(
        lambda _, args, inputs: widths.append(
            next(
                inputs[k].shape[1]
                for k in ("input_ids", "inputs_embeds")
                if inputs.get(k) is not None
            )
        ),
        with_kwargs=True,
    )
    found = probe(model)
    assert len(widths) == 6 and max(widths) == 12
    assert found.supports_packing and len(widths) > 5, "what only packing needs is tried later"
    num_forwards = len(widths)
    assert found.supports_packing and len(widths) == num_forwards, "and only once"


def test_the_probe_leaves_the_model_unchanged() -> None:
    model = llama().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    probe(model)
    check_trainable(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("family", ["Llama", "Mixtral", "Mamba2", "Qwen3-Next", "Gemma3n", "RWKV"])
def test_rounding_to_bfloat16_changes_no_finding(family: str) -> None:
    model = families.tiny_model(family)
    whole, half = probe(model), probe(model.to(torch.bfloat16))
    assert whole == half
    assert whole.supports_packing == half.supports_packing


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (IdsInItsLayers, "gives other logits for embeddings than for the same ids"),
        (IdsOnly, "cannot be driven by embeddings: give me ids"),
        (KnownEmbeddingsOnly, "takes no embedding that is not a token's.*not one of my tokens"),
    ],
)
def test_a_model_that_cannot_take_media_is_refused(kind: Any, message: str) -> None:
    with pytest.raises(LanguageModelError, match=f"{kind.__name__} {message}"):
        probe(llama(kind))


def test_weights_that_are_nan_or_inf_are_named() -> None:
    model = llama(LlamaForCausalLM)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = torch.nan
        model.model.norm.weight[0] = torch.inf
    message = r"NaN or inf for .* model\.layers\.1\.mlp\.up_proj\.weight and 1 more holds NaN"
    with pytest.raises(LanguageModelError, match=message):
        probe(model)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("bert", "BertLMHeadModel lets a position attend to later ones"),
        ("openai-gpt", "could be trained, but not used"),
    ],
)
def test_a_model_that_cannot_answer_is_refused(model_type: str, message: str) -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=400, initializer_range=0.2, **sizes)
    with pytest.raises(LanguageModelError, match=message):
        probe(AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Untrainable, "does not require grad"), (Drifting, "frozen weights change")],
)
def test_a_model_that_cannot_be_trained_through_is_refused(kind: Any, message: str) -> None:
    with pytest.raises(LanguageModelError, match=f"cannot be trained through.*{message}"):
        check_trainable(llama(kind))


def test_trials_leave_the_random_state_of_other_devices_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # the first access to a GPU creates a context there, which takes its memory
    model, asked = families.tiny_model("Llama"), []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", asked.append)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
    check_trainable(model)
    tiny_language_model(tmp_path / "language_model")
    tiny_image_encoder(tmp_path / "clip", "clip")
    assert asked == []


def test_a_missing_capability_is_refused_with_the_setting_to_change() -> None:
    found = probe(families.tiny_model("Mamba2"))
    with pytest.raises(LanguageModelError, match="Mamba2ForCausalLM cannot take packed rows"):
        found.require("supports_packing")
    with pytest.raises(LanguageModelError, match="set train.packing to true, without `share`"):
        found.require("supports_shared_prefix")
    (said,) = probe(families.tiny_model("RWKV")).notes()
    assert "only prompts of one length are batched" in said


def test_layers_that_take_no_lora_are_refused_with_those_that_do_and_nothing_is_left() -> None:
    model = families.tiny_model("Mamba2")
    ids = torch.arange(20, 30)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
    with pytest.raises(
        LanguageModelError, match="all-linear: .*'out_proj'.*layers that take it: in_proj$"
    ):
        attach_adapter(model, AdapterSpec(r=2))
    assert not adapter_parameters(model) and not hasattr(model, "peft_config")
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)
    with pytest.raises(LanguageModelError, match="take it: .*q_proj"):
        attach_adapter(llama(), AdapterSpec(r=2, target_modules=["query"]))


@pytest.fixture(scope="module")
def by_ids(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that generates from a prefilled KV cache."""
    folder = tmp_path_factory.mktemp("by_ids")
    families.save_tiny_model("Gemma3n", folder)
    model = trials.composed(folder)
    assert model.capabilities.prefill_mode == "ids"
    return model


class Heard(TextStreamer):
    """A streamer that keeps the ids it is given."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text


def test_a_streamer_gets_the_answer_without_the_prompt(by_ids: Any) -> None:
    tokenizer = by_ids.processor.tokenizer
    streamer = Heard(tokenizer)
    (answer,) = generate_ids(
        by_ids, trials.prompts(by_ids)[:1], max_new_tokens=4, min_new_tokens=4, streamer=streamer
    )
    assert len(answer) == 4
    assert streamer.text == tokenizer.decode(answer)


def test_options_that_the_prefill_mode_ids_cannot_serve_are_refused(by_ids: Any) -> None:
    sample = trials.prompts(by_ids)[0]
    with pytest.raises(LanguageModelError, match="num_beams and num_return_sequences must be 1"):
        generate_ids(by_ids, [sample], max_new_tokens=2, num_beams=2)
    length = len(sample.input_ids)
    item = sample.media[0]
    cut = sample.media_spans[0].start + sample.media_spans[0].length
    at_the_end = Sample(sample.input_ids[:cut], sample.labels[:cut], sample.media_spans, [item])
    assert at_the_end.media_spans == [MediaSpan("vector", cut - 2, 2)] and cut < length
    with pytest.raises(LanguageModelError, match="the prompt ends with an item of 'vector'"):
        generate_ids(by_ids, [at_the_end], max_new_tokens=2)
