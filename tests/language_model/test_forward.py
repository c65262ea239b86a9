"""forward.py: every mode of prefill and padding gives the same numbers."""

from __future__ import annotations

from copy import deepcopy
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multi_token.errors import LanguageModelError
from multi_token.language_model.forward import (
    GREEDY,
    ScaledEmbedding,
    accepts_position_ids,
    base_language_model,
    filter_flash_attention_kwargs,
    generate_from_embeds,
    max_batched_length,
    per_layer_inputs,
)


@pytest.fixture(scope="module")
def llama(families: ModuleType) -> Any:
    return families.tiny_model("Llama", vocab_size=40)


def test_a_scaled_embedding_is_the_same_weights_multiplied() -> None:
    embedding = nn.Embedding(5, 3)
    scaled = ScaledEmbedding(embedding, 4.0)
    assert torch.equal(scaled(torch.tensor([[1, 2]])), embedding.weight[None, 1:3] * 4)
    assert scaled.weight is embedding.weight
    assert list(scaled.parameters()) == []


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        (PLAIN, None),
        (DYNAMIC, 256),
        ({**DYNAMIC, "original_max_position_embeddings": 64}, 64),
        ({**DYNAMIC, "original_max_position_embeddings": 512}, 512),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}, None),
    ],
)
def test_the_maximum_batched_length_is_the_one_before_scaling(
    llama: Any, rope: dict[str, Any], length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.config, "rope_parameters", rope)
    assert max_batched_length(llama) == length


def test_the_shortest_length_of_several_layer_types_counts(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {
        "sliding_attention": PLAIN,
        "full_attention": {**DYNAMIC, "original_max_position_embeddings": 128},
        "other": {**DYNAMIC, "rope_type": "longrope", "original_max_position_embeddings": 64},
    }
    monkeypatch.setattr(llama.config, "rope_parameters", kinds)
    assert max_batched_length(llama) == 64


def test_a_model_without_rotary_positions_is_exact_at_any_length(families: ModuleType) -> None:
    assert max_batched_length(families.tiny_model("GPT-2")) is None


def test_only_models_whose_layers_look_ids_up_get_per_layer_inputs(
    families: ModuleType, llama: Any
) -> None:
    ids = torch.tensor([[3, 4, 5]])
    assert per_layer_inputs(llama, ids) == {}
    looks_up = families.tiny_model("Gemma3n", vocab_size=40)
    (found,) = per_layer_inputs(looks_up, ids).values()
    with torch.no_grad():
        given = looks_up(
            inputs_embeds=looks_up.get_input_embeddings()(ids), per_layer_inputs=found
        ).logits
        torch.testing.assert_close(given, looks_up(input_ids=ids).logits)


def test_positions_and_segments_are_passed_to_models_that_take_them(
    families: ModuleType, llama: Any
) -> None:
    class Alone(nn.Module):
        def forward(self, input_ids: Tensor, cu_seq_lens: Tensor | None = None) -> None: ...

    packed = {"input_ids": 1, "cu_seq_lens_q": 2, "max_length_k": 3}
    assert filter_flash_attention_kwargs(llama, packed) == packed
    assert filter_flash_attention_kwargs(Alone(), packed) == {"input_ids": 1}
    assert accepts_position_ids(llama) and not accepts_position_ids(Alone())


def test_the_base_language_model_is_found_inside_an_adapter(llama: Any) -> None:
    from peft import LoraConfig, get_peft_model

    inner = deepcopy(llama)
    adapted = get_peft_model(inner, LoraConfig(target_modules=["q_proj"]))
    assert base_language_model(adapted) is inner
    assert base_language_model(inner) is inner
    assert accepts_position_ids(adapted)


IDS = torch.tensor([[0, 3, 4, 5], [6, 7, 8, 9]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])


def continued(
    model: Any, start: Any, ids: Tensor = IDS, mask: Tensor = MASK, **options: Any
) -> Any:
    embeds = model.get_input_embeddings()(ids).detach().clone()
    media = torch.randn(embeds[:, :-1].shape, generator=torch.Generator().manual_seed(2))
    embeds[:, :-1] += embeds.std() * media  # all but the last position are no token's
    return generate_from_embeds(
        model,
        inputs_embeds=embeds,
        input_ids=ids,
        attention_mask=mask,
        prefill_mode=start,
        **{"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **options},
    )


@pytest.mark.parametrize("length", [4, 1])
def test_the_prefill_modes_ids_and_embeds_generate_the_same(llama: Any, length: int) -> None:
    ids, mask = IDS[:, -length:], MASK[:, -length:]
    expected = continued(llama, "embeds", ids, mask)
    assert expected.shape == (2, 6)
    assert torch.equal(continued(llama, "ids", ids, mask), expected)
    options = {"return_dict_in_generate": True, "output_logits": True}
    by_ids, by_embeds = (continued(llama, m, ids, mask, **options) for m in ("ids", "embeds"))
    assert torch.equal(by_ids.sequences, expected)
    torch.testing.assert_close(torch.stack(by_ids.logits), torch.stack(by_embeds.logits))


def test_a_prefilled_kv_cache_is_refused_for_several_answers(llama: Any) -> None:
    for option in ("num_beams", "num_return_sequences"):
        with pytest.raises(LanguageModelError, match="must be 1"):
            continued(llama, "ids", **{option: 2})
    one = continued(llama, "ids", num_beams=1, num_return_sequences=1)
    assert torch.equal(one, continued(llama, "ids"))


def test_greedy_options_override_the_models_own_generation_config(llama: Any) -> None:
    model = deepcopy(llama)
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    model.generation_config.update(do_sample=True, temperature=9.0, num_return_sequences=3)
    found = model.generate(IDS, max_new_tokens=4, eos_token_id=None, **GREEDY)
    assert torch.equal(found, expected)


class Heard:
    """A streamer that keeps the ids it is given."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.is_over = False

    def put(self, ids: Tensor) -> None:
        self.pieces.append(ids.flatten().tolist())

    def end(self) -> None:
        self.is_over = True


@pytest.mark.parametrize("start", ["embeds", "ids"])
def test_a_streamer_gets_the_new_ids_and_no_prompt(llama: Any, start: Any) -> None:
    heard = Heard()
    answer = continued(llama, start, IDS[1:], MASK[1:], streamer=heard)
    assert heard.pieces == [[], *([i] for i in answer[0].tolist())]
    assert heard.is_over
