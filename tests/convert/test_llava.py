"""convert/llava.py, llava_own.py: LLaVA's folders become runs, whole or not at all."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from multi_token import MultiTokenForConditionalGeneration
from multi_token.convert.llava import import_llava, is_llava
from multi_token.convert.tensors import read_json
from multi_token.errors import CheckpointError, ConvertError, RowError
from multi_token.generate import collate_prompts, single_question
from multi_token.testing import tiny_image_encoder, tiny_llava
from multi_token.types import Media, Message, Text

OWN: dict[str, Any] = {
    "model_type": "llava_llama",
    "mm_vision_select_layer": -2,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": False,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: Any) -> Path:
    return Path(tiny_llava(tmp_path_factory.mktemp("llava") / "source"))


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


def perceptron(num_layers: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(32, 32)]
    for _ in range(num_layers - 1):
        layers += [nn.GELU(), nn.Linear(32, 32)]
    return nn.Sequential(*layers)


def own_folder(folder: Path, parts: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    """A folder as LLaVA's own training of the projector leaves it."""
    folder.mkdir(exist_ok=True)
    config = {**OWN, "mm_vision_tower": str(parts / "clip"), **fields}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "mm_projector.bin")
    return folder


def named(network: nn.Module, prefix: str = "model.mm_projector.") -> dict[str, Tensor]:
    return {prefix + key: value.half() for key, value in network.state_dict().items()}


def import_own(folder: Path, parts: Path, out: Path) -> MultiTokenForConditionalGeneration:
    import_llava(folder, out, language_model=str(parts / "language_model"))
    return MultiTokenForConditionalGeneration.from_pretrained(out)


def noise() -> Image.Image:
    return Image.effect_noise((50, 30), 90).convert("RGB")


def test_llava_is_recognized_by_its_files_and_not_by_its_name(
    source: Path, parts: Path, tmp_path: Path
) -> None:
    assert is_llava(
        read_json(Path(shutil.copytree(source, tmp_path / "something")) / "config.json")
    )
    assert is_llava(read_json(own_folder(tmp_path / "own", parts, {}) / "config.json"))
    shutil.copytree(parts / "language_model", tmp_path / "llava")
    (tmp_path / "llava-v1.5").mkdir()
    assert not is_llava(read_json(tmp_path / "llava" / "config.json"))
    assert not is_llava(read_json(tmp_path / "llava-v1.5" / "config.json"))


@pytest.mark.parametrize(("kind", "num_layers"), [("mlp2x_gelu", 2), ("mlp3x_gelu", 3)])
def test_llavas_own_projector_makes_the_tokens_that_llava_makes(
    parts: Path, tmp_path: Path, kind: str, num_layers: int
) -> None:
    from transformers import AutoModel, LlavaImageProcessorPil

    network = perceptron(num_layers).half().float()
    folder = own_folder(
        tmp_path / "own",
        parts,
        named(network),
        mm_projector_type=kind,
        image_aspect_ratio="pad",
    )
    model = import_own(folder, parts, tmp_path / "run")
    processor, item = model.processor, Media("image", noise())
    assert processor is not None
    with torch.no_grad():
        ours = model.projectors["image"](
            model.encode("image", model.modalities["image"].collate([processor.prepare(item)]))
        )
        pixels = LlavaImageProcessorPil(
            do_pad=True, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )(images=[item.source], return_tensors="pt")["pixel_values"]
        tower = AutoModel.from_pretrained(parts / "clip").vision_model.eval()
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(ours, network(hidden[0, 1:]), rtol=1e-5, atol=1e-5)
    assert str(parts / "language_model") in (tmp_path / "run" / "config.json").read_text()


def test_llavas_own_linear_projector_and_anyres_with_its_newline(
    parts: Path, tmp_path: Path
) -> None:
    linear, newline = nn.Linear(32, 32).half().float(), torch.randn(32).half().float()
    folder = own_folder(
        tmp_path / "own",
        parts,
        {**named(linear), "model.image_newline": newline.half()},
        mm_projector_type="linear",
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints="[(64, 32), (32, 96)]",  # width, height
    )
    model = import_own(folder, parts, tmp_path / "run")
    assert model.modalities["image"].tile_grids == ((1, 2), (3, 1))  # type: ignore[attr-defined]
    projector = model.projector("image")
    assert torch.equal(projector.network.weight, linear.weight)  # type: ignore[arg-type]
    assert torch.equal(projector.line_break, newline)  # type: ignore[arg-type]


def lora_folder(folder: Path, parts: Path, **fields: Any) -> tuple[Path, Any, nn.Module]:
    """A folder as LLaVA's own LoRA training leaves it, with the model that it was made of."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(parts / "language_model")
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    network = perceptron(2).half().float()
    own_folder(folder, parts, {}, **fields)
    (folder / "mm_projector.bin").unlink()
    adapted.peft_config["default"].save_pretrained(str(folder))
    torch.save(get_peft_model_state_dict(adapted), folder / "adapter_model.bin")
    beside = named(network, "base_model.model.model.mm_projector.")
    torch.save(beside, folder / "non_lora_trainables.bin")
    return folder, adapted.eval(), network


def test_llavas_own_lora_changes_the_logits_as_it_did_there(parts: Path, tmp_path: Path) -> None:
    folder, adapted, network = lora_folder(tmp_path / "lora", parts)
    model = import_own(folder, parts, tmp_path / "run")
    assert model.processor is not None
    batch = collate_prompts(
        model.processor, [single_question("What is this?", [Media("image", noise())])]
    )
    media = batch["media"]["image"]
    with torch.no_grad():
        ours = model(input_ids=batch["input_ids"], media=batch["media"]).logits
        embeds = adapted.get_input_embeddings()(batch["input_ids"])
        features = model.encode("image", media["inputs"]).values
        embeds[0, media["positions"]] = network(features[0])
        theirs = adapted(inputs_embeds=embeds).logits
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        with adapted.disable_adapter():
            assert not torch.allclose(ours, adapted(inputs_embeds=embeds).logits, atol=1e-2)


def test_a_base_without_a_chat_template_gets_the_one_that_llava_learned_with(
    parts: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(parts / "language_model", tmp_path / "vicuna")
    (base / "chat_template.jinja").unlink()
    folder = own_folder(tmp_path / "own", parts, named(perceptron(2)))
    import_llava(folder, tmp_path / "run", language_model=str(base))
    model = MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert model.processor is not None
    ids = model.processor(single_question("What is this?"), prompt_only=True).input_ids
    text = model.processor.tokenizer.decode(ids)
    assert text.startswith("<s>A chat between a curious user and an artificial intelligence")
    assert text.endswith("polite answers to the user's questions. USER: What is this? ASSISTANT:")


# as llava-hf/llava-1.5-7b-hf publishes it: no token closes an answer
PUBLISHED = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def test_the_published_template_of_llava_1_5_asks_as_its_processor_and_says_why_it_cannot_teach(
    copy: Path, tmp_path: Path
) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(copy)
    processor.chat_template = PUBLISHED
    processor.save_pretrained(copy)
    import_llava(copy, tmp_path / "run")
    model = MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert model.processor is not None
    image = noise()
    question = single_question("What is this?", [Media("image", image)])
    turn = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}],
    }
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    theirs = processor(images=[image], text=text, return_tensors="pt")["input_ids"][0]
    batch = collate_prompts(model.processor, [question])
    ids = batch["input_ids"].view(-1).clone()
    ids[batch["media"]["image"]["positions"]] = processor.image_token_id
    assert ids.tolist() == theirs.tolist()
    assert len(model.generate([question], max_new_tokens=2)) == 1
    taught = replace(
        question, messages=(*question.messages, Message("assistant", (Text("A cat."),)))
    )
    with pytest.raises(RowError, match="writes {{ eos_token }} after each answer"):
        model.processor(taught)


class CodeInPickle:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (Path("ran.txt"), "code of a pickle has run")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model.embed_tokens.weight": torch.zeros(3, 2)}, r"embed_tokens.weight \(3, 2\)"),
        ({"model.mm_projector.4.weight": torch.zeros(2, 2)}, "has unknown network.4.weight"),
        ({"model.mm_projector.2.weight": torch.zeros(2, 2)}, r"\(2, 2\) instead of \(32, 32\)"),
        ({"model.mm_projector.2.bias": None}, "lacks network.2.bias"),
        ({"model.image_newline": torch.zeros(32)}, "has an image_newline"),
        ({"model.code": CodeInPickle()}, "nothing in it was run"),
        ({"mm_projector_type": "cabstractor"}, "`mm_projector_type` 'cabstractor'"),
        ({"mm_use_im_start_end": True}, "`mm_use_im_start_end`"),
        ({"image_aspect_ratio": "anyres_max_9"}, "`image_aspect_ratio` 'anyres_max_9'"),
        ({"mm_vision_tower": "no/such/tower"}, "cannot become a run.*--encoder"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "says",
)
def test_what_cannot_be_mapped_is_named_and_nothing_is_written(
    parts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    tensors: dict[str, Any] = named(perceptron(2))
    tensors |= {key: value for key, value in change.items() if key.startswith("model.")}
    fields = {key: value for key, value in change.items() if not key.startswith("model.")}
    folder = own_folder(
        tmp_path / "own", parts, {k: v for k, v in tensors.items() if v is not None}, **fields
    )
    with pytest.raises((ConvertError, CheckpointError), match=reason):
        import_own(folder, parts, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_an_adapter_that_does_not_fit_its_base_is_named_tensor_by_tensor(
    parts: Path, tmp_path: Path
) -> None:
    folder, _, _ = lora_folder(tmp_path / "lora", parts)
    tensors = torch.load(folder / "adapter_model.bin", weights_only=True)
    gone = sorted(tensors)[0]
    del tensors[gone]
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=f"lacks {gone}"):
        import_own(folder, parts, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_whole_model_in_llavas_own_form_is_refused_with_what_converts_it(
    parts: Path, tmp_path: Path
) -> None:
    folder = own_folder(tmp_path / "own", parts, {})
    (folder / "mm_projector.bin").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConvertError, match=r"convert_llava_weights_to_hf\.py"):
        import_own(folder, parts, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("lack", "it lacks model.multi_modal_projector.linear_2.weight"),
        ("unknown", "it has unknown.weight, which has no place"),
        ("shape", r"linear_1.bias of shape \(3,\) instead of \(32,\)"),
        ("cut off", "cannot be read as Llava"),
    ],
)
def test_a_broken_folder_of_transformers_is_refused_and_nothing_is_written(
    copy: Path, tmp_path: Path, change: str, reason: str
) -> None:
    path = copy / "model.safetensors"
    tensors = load_file(path)
    (first,) = [name for name in tensors if name.endswith("linear_1.bias")]
    if change == "lack":
        del tensors[first.replace("linear_1.bias", "linear_2.weight")]
    elif change == "shape":
        tensors[first] = torch.zeros(3)
    elif change == "unknown":
        tensors["unknown.weight"] = torch.zeros(2)
    save_file(tensors, path, {"format": "pt"})
    if change == "cut off":
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConvertError, match=reason):
        import_llava(copy, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_settings_that_a_recipe_cannot_say_are_refused(tmp_path: Path) -> None:
    from transformers import SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
    )
    tiny_llava(tmp_path / "siglip", vision=vision)
    with pytest.raises(ConvertError, match="0 tokens before its patches: a patch would be lost"):
        import_llava(tmp_path / "siglip", tmp_path / "run")
    tiny_llava(tmp_path / "full", vision=vision, vision_feature_select_strategy="full")
    import_llava(tmp_path / "full", tmp_path / "run")
    model = MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert model.modalities["image"].features == "patches"  # type: ignore[attr-defined]


def test_an_imported_run_may_be_moved(source: Path, tmp_path: Path) -> None:
    import_llava(source, tmp_path / "run")
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere")
    texts = [path.read_text() for path in moved.rglob("*.json") if path.name != "tokenizer.json"]
    assert texts and not any(str(tmp_path) in text for text in texts)
    model = MultiTokenForConditionalGeneration.from_pretrained(moved)
    rows = [{"images": [noise()], "messages": [{"role": "user", "content": "<image>\nWhat?"}]}]
    assert len(model.generate(rows, max_new_tokens=2)) == 1


def test_a_folder_that_is_there_is_not_written_into(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConvertError, match="is there already"):
        import_llava(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_other_folders_are_refused(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="is not LLaVA"):
        import_llava(parts / "language_model", tmp_path / "run")
    tiny_image_encoder(tmp_path / "tower")
    with pytest.raises(ConvertError, match="is not LLaVA"):
        import_llava(tmp_path / "tower", tmp_path / "run")
