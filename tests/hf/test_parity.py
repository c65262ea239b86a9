"""`AutoProcessor` and `generate(**inputs)` give the ids, places and texts of `multi-token ask`."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from multi_token.data.formats import to_conversation
from multi_token.errors import MultiTokenError
from multi_token.generate import generate_ids
from multi_token.hf.processor import ChatProcessor, RowCollator
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.processor import processor_of
from multi_token.recipe.model import ModelSpec
from multi_token.registry import register_modality, resolve
from tests.conftest import Pulse

BUILT_IN = ("image", "speech", "sound", "video", "document", "joint", "timeseries", "vector")
QUESTIONS = ("What is it?", "Say in many words what you see here, and why you think so.")


@pytest.fixture(scope="module")
def sources() -> dict[str, list[Any]]:
    """Modality -> two items of different length; filled by `run`."""
    return {"pulse": [[1.0, 0, 0, 0, 0], [0.0, 0, 1, 0, 1]]}


@pytest.fixture(scope="module")
def run(parts: Path, sources: dict[str, list[Any]], tmp_path_factory: Any) -> str:
    """An untrained run with every built-in modality and a plug-in."""
    register_modality("pulse", Pulse)
    fields: dict[str, Any] = {"pulse": {"type": "pulse", "projector": {"type": "linear"}}}
    for name in BUILT_IN:
        example = resolve("modality", name).example(tmp_path_factory.mktemp(name))
        assert example is not None
        fields[name], items = {"type": name, **example[0]}, example[1]
        sources[name] = items[:2]
    spec = ModelSpec.model_validate(
        {"language_model": str(parts / "language_model"), "modalities": fields}
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("every")
    MultiTokenForConditionalGeneration.from_spec(spec).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def loaded(run: str) -> tuple[Any, Any, Any]:
    """(processor, model, model of the base class), by the snippet of docs/hugging-face.md."""
    import_module("multi_token.hf")
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    processor = AutoProcessor.from_pretrained(run)
    model = AutoModelForMultimodalLM.from_pretrained(run, dtype="auto", device_map="auto")
    return processor, model, MultiTokenForConditionalGeneration.from_pretrained(run)


def messages(name: str, source: Any, question: str) -> list[dict[str, Any]]:
    item = [{"type": name, name: source}] if name else []
    return [{"role": "user", "content": [*item, {"type": "text", "text": question}]}]


def inputs_of(processor: Any, conversations: Any) -> Any:
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@pytest.mark.parametrize("name", [*BUILT_IN, "pulse"])
def test_ids_places_and_texts_are_those_of_ask(
    name: str, loaded: tuple[Any, Any, Any], sources: dict[str, list[Any]]
) -> None:
    processor, model, base = loaded
    single = messages(name, sources[name][0], QUESTIONS[0])
    # prompts of three lengths, and one without media
    several = [single, messages(name, sources[name][1], QUESTIONS[1]), messages("", None, "Why?")]
    for batch in (single, several):
        conversations = batch if batch is several else [batch]
        rows = [{"messages": one} for one in conversations]
        inputs = inputs_of(processor, batch).to(model.device)
        ids = model.generate(**inputs, max_new_tokens=8)
        new = ids[:, inputs["input_ids"].shape[1] :]
        run = base.require_processor()
        samples = [run(base_conversation(base, row), prompt_only=True) for row in rows]
        for i, sample in enumerate(samples):
            real = inputs["attention_mask"][i].bool()
            assert inputs["input_ids"][i][real].tolist() == sample.input_ids.tolist()
            assert real[-len(sample.input_ids) :].all(), "padded on the left"
            types = inputs["mm_token_type_ids"][i][real]
            number = 1 + list(base.modalities).index(name)
            spans = [(types == number).nonzero().flatten().tolist()]
            assert spans == [
                [p for s in sample.media_spans for p in range(s.start, s.start + s.length)]
            ]
        assert torch.equal(ids[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
        expected = generate_ids(base, samples, max_new_tokens=8)
        assert new.tolist() == [one.tolist() for one in expected]
        assert processor.answers(ids, inputs) == base.generate(rows, max_new_tokens=8)
        texts = processor.batch_decode(new, skip_special_tokens=True)
        assert [text.strip() for text in texts] == processor.answers(ids, inputs)


def base_conversation(base: Any, row: dict[str, Any]) -> Any:
    from multi_token.data.formats import to_conversation

    return to_conversation(row, list(base.modalities), row_id="row")


def test_all_modalities_in_one_conversation(
    loaded: tuple[Any, Any, Any], sources: dict[str, list[Any]]
) -> None:
    processor, model, base = loaded
    parts = [{"type": name, name: items[0]} for name, items in sources.items()]
    content = [*parts, {"type": "text", "text": "What are these?"}]
    conversation = [{"role": "user", "content": content}]
    inputs = inputs_of(processor, conversation)
    ids = model.generate(**inputs, max_new_tokens=8)
    expected = base.generate([{"messages": conversation}], max_new_tokens=8)
    assert processor.answers(ids, inputs) == expected
    # media tensors in half precision are for encoders that are; positions stay integers
    half = inputs.to(torch.bfloat16)
    assert half["image.pixel_values"].dtype == torch.bfloat16
    assert model.generate(**half, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_a_rendered_text_with_its_items_gives_the_same_inputs(
    loaded: tuple[Any, Any, Any], sources: dict[str, list[Any]]
) -> None:
    processor = loaded[0]
    several = [messages("image", sources["image"][0], "What?"), messages("", None, "Why so?")]
    text = processor.apply_chat_template(several, add_generation_prompt=True)
    assert text[0].count("<image>") == 1
    found = processor(text=text, images=[[sources["image"][0]], []])
    expected = inputs_of(processor, several)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    pulse = messages("pulse", sources["pulse"][0], "What?")
    text = processor.apply_chat_template(pulse, add_generation_prompt=True)
    found = processor(text=text, pulse=[sources["pulse"][0]])
    assert torch.equal(found["pulse.values"], inputs_of(processor, pulse)["pulse.values"])


def test_parts_and_columns_by_kind_find_an_instance_of_another_name(
    parts: Path, tmp_path: Path
) -> None:
    image, _ = resolve("modality", "image").example(tmp_path)
    spec = ModelSpec.model_validate(
        {
            "language_model": str(parts / "language_model"),
            "modalities": {"photo": {"type": "image", **image}},
        }
    )
    run = processor_of(spec)
    processor = ChatProcessor(run, {})
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    item = {"type": "image", "url": str(tmp_path / "a.png")}
    question = {"role": "user", "content": [item, {"type": "text", "text": "What?"}]}
    row = {"messages": [question, {"role": "assistant", "content": "Red."}]}
    expected = run(to_conversation(row, run.modalities, row_id="row"))
    collated = RowCollator(processor)([row])
    assert collated["input_ids"].tolist() == [expected.input_ids.tolist()]
    (prompt,) = processor.prompts([[question]])
    text = processor.apply_chat_template([question], add_generation_prompt=True)
    assert "<photo>" in text
    found = processor(text=text, images=item["url"])
    assert found["input_ids"].tolist() == [prompt.input_ids.tolist()]


def test_letters_of_a_slot_in_a_message_stay_text(loaded: tuple[Any, Any, Any]) -> None:
    processor = loaded[0]
    inputs = inputs_of(processor, [{"role": "user", "content": "Is <image> a tag?"}])
    assert inputs["mm_token_type_ids"].sum() == 0
    assert "Is <image> a tag?" in processor.batch_decode(inputs["input_ids"])[0]


def test_an_answer_can_be_continued_and_its_tokens_are_marked(
    loaded: tuple[Any, Any, Any],
) -> None:
    processor = loaded[0]
    conversation = [*messages("", None, "Which?"), {"role": "assistant", "content": "The red"}]
    whole = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = whole["assistant_masks"].bool()
    assert processor.batch_decode(whole["input_ids"][mask][None]) == ["The red<|im_end|>"]
    begun = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, continue_final_message=True
    )
    assert processor.batch_decode(begun["input_ids"])[0].endswith("assistant\nThe red")


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 2},
        {"repetition_penalty": 1.5},
        {"stop_strings": ["nd"]},
    ],
    ids=lambda options: next(iter(options)),
)
# the language model is given embeddings, so a penalty is on new ids alone
@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")
def test_options_of_generate_do_what_they_do_for_the_language_model(
    options: dict[str, Any], loaded: tuple[Any, Any, Any], sources: dict[str, list[Any]]
) -> None:
    processor, model, base = loaded
    inputs = inputs_of(processor, messages("image", sources["image"][0], "What is it?"))
    if "stop_strings" in options:
        options = {**options, "tokenizer": processor.tokenizer}
    media: Any = {
        "image": {
            "inputs": {"pixel_values": inputs["image.pixel_values"]},
            "positions": inputs["mm_token_type_ids"].flatten().nonzero().flatten(),
        }
    }
    common = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": [4], **options}
    torch.manual_seed(3)
    expected = base.language_model.generate(
        inputs_embeds=base.embed(inputs["input_ids"], media),
        attention_mask=inputs["attention_mask"],
        **{"do_sample": False, **common},
    )
    torch.manual_seed(3)
    found = model.generate(**inputs, **common)
    copies = options.get("num_return_sequences", 1)
    assert found.shape[0] == copies
    assert found[:, inputs["input_ids"].shape[1] :].tolist() == expected.tolist()


def test_configs_streamers_and_processors_see_what_they_see_in_transformers(
    loaded: tuple[Any, Any, Any], sources: dict[str, list[Any]], capsys: Any
) -> None:
    from transformers import GenerationConfig, TextStreamer

    processor, model, _ = loaded
    inputs = inputs_of(processor, messages("image", sources["image"][0], "What is it?"))
    prompt = inputs["input_ids"].shape[1]
    plain = model.generate(**inputs, max_new_tokens=5)
    config = GenerationConfig(max_new_tokens=5, return_dict_in_generate=True, output_scores=True)
    found = model.generate(**inputs, generation_config=config)
    assert torch.equal(found.sequences, plain) and len(found.scores) == plain.shape[1] - prompt
    capsys.readouterr()
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=5, streamer=streamer)
    assert capsys.readouterr().out.strip() == processor.answers(plain, inputs)[0]
    seen: list[list[int]] = []

    def note(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(ids[0].tolist())
        return scores

    def stop(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        return torch.tensor([ids.shape[1] >= prompt + 2] * len(ids))

    stopped = model.generate(
        **inputs, max_new_tokens=5, logits_processor=[note], stopping_criteria=[stop]
    )
    assert torch.equal(stopped, plain[:, : prompt + 2])
    assert seen == [plain[0, :prompt].tolist(), plain[0, : prompt + 1].tolist()]
    assert model.generation_config.do_sample is False


def test_flat_inputs_that_do_not_belong_together_are_refused(
    loaded: tuple[Any, Any, Any], sources: dict[str, list[Any]]
) -> None:
    processor, model, _ = loaded
    inputs = inputs_of(processor, messages("image", sources["image"][0], "What?"))
    for left_out, sentence in (
        ("image.pixel_values", "positions of image and no tensors"),
        ("mm_token_type_ids", "image.pixel_values and mm_token_type_ids belong together"),
    ):
        fewer = {key: value for key, value in inputs.items() if key != left_out}
        with pytest.raises(MultiTokenError, match=sentence):
            model.generate(**fewer)
    with pytest.raises(MultiTokenError, match="has the value 13, but the model has 9 modalities"):
        model.generate(**{**inputs, "mm_token_type_ids": inputs["mm_token_type_ids"] + 11})
    with pytest.raises(MultiTokenError, match="got no input_ids"):
        model.generate()
    with pytest.raises(MultiTokenError, match="takes no tools"):
        processor.apply_chat_template(messages("", None, "Why?"), tools=[{}])
    with pytest.raises(MultiTokenError, match="add_generation_prompt=True"):
        processor.apply_chat_template(messages("", None, "Why?"), tokenize=True)


def test_labels_give_a_loss_as_any_model_of_transformers(
    loaded: tuple[Any, Any, Any], sources: dict[str, list[Any]]
) -> None:
    processor, model, base = loaded
    answer = {"role": "assistant", "content": "red"}
    conversation = [*messages("image", sources["image"][0], "What?"), answer]
    inputs = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = inputs.pop("assistant_masks").bool()
    labels = inputs["input_ids"].masked_fill(~mask, -100)
    with torch.no_grad():
        output = model(**inputs, labels=labels)
    from multi_token.hf import RowCollator

    batch = RowCollator(processor)([{"messages": conversation}])
    with torch.no_grad():
        expected = base(**batch)
    torch.testing.assert_close(output.loss, expected.loss)
    assert output.logits.shape[:2] == labels.shape


def test_importing_the_package_registers_nothing() -> None:
    code = (
        "import multi_token, multi_token.model\n"
        "from transformers import AutoConfig\n"
        "from transformers.models.auto.configuration_auto import CONFIG_MAPPING\n"
        "assert 'multi_token' not in CONFIG_MAPPING\n"
        "import multi_token.hf\n"
        "assert 'multi_token' in CONFIG_MAPPING\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
