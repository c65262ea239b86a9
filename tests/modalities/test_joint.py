"""modalities/joint.py: images, sounds, videos and texts in one space, mixed in one batch.

The oracle is what get_image_features and its like return for the same inputs.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from torch.nn.functional import normalize

from multi_token.errors import MediaError, RecipeError
from multi_token.media.fetch import Fetch
from multi_token.modalities.joint import JointModality, methods
from multi_token.testing import tiny_image_encoder
from multi_token.testing.encoders import tiny_clap, tiny_joint_clip, tiny_video_encoder
from multi_token.testing.examples import joint_example
from multi_token.testing.files import noise_frames, tone, write_tone, write_video

TEXTS = ["a cat", "a red square and a blue circle", "dog"]


def word_tokenizer(folder: str, *, num_tokens: int = 12, **fields: Any) -> None:
    """A tokenizer of a few words beside an encoder."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<s>", "<pad>", "</s>", "<unk>", *" ".join(TEXTS).split()]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        model_max_length=num_tokens,
        **fields,
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: Any) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("encoders")
    found = {
        "clip": tiny_joint_clip(folder / "clip"),
        "siglip": tiny_image_encoder(folder / "siglip", "siglip"),
        "siglip2": tiny_image_encoder(folder / "siglip2", "siglip2"),
        "clap": tiny_clap(folder / "clap"),
        "fused": tiny_clap(folder / "fused", fused=True),
        "xclip": tiny_video_encoder(folder / "xclip", "xclip", num_frames=4),
    }
    for name in ("siglip", "siglip2"):
        word_tokenizer(found[name], num_tokens=64, model_input_names=["input_ids"])
    for name in ("clap", "fused", "xclip"):
        word_tokenizer(found[name])
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: Any) -> dict[str, str]:
    """One file of each kind, whose names do not say which."""
    folder = tmp_path_factory.mktemp("files")
    Image.effect_noise((50, 30), 90).convert("RGB").save(folder / "a", "PNG")
    write_tone(folder / "b", 0.6)
    write_video(folder / "clip.webm", noise_frames(12), codec="libvpx-vp9")
    (folder / "clip.webm").rename(folder / "c")
    (folder / "d").write_text(TEXTS[1], encoding="utf-8")
    kinds = {"image": "a", "audio": "b", "video": "c", "text": "d"}
    return {kind: str(folder / name) for kind, name in kinds.items()}


def sources(kind: str, files: dict[str, str]) -> list[Any]:
    """Items of the kind and texts, mixed, of several sizes."""
    more: dict[str, list[Any]] = {
        "image": [Image.new("RGB", (20, 64), "red"), {"image": files["image"]}],
        "audio": [{"array": tone(0.9, 48_000, hertz=300.0), "sampling_rate": 48_000}],
        "video": [{"video": Path(files["video"]).read_bytes()}],
    }
    texts = [{"text": text} for text in TEXTS]
    return [texts[0], files[kind], *texts[1:], *more[kind], files["text"]]


KIND = {"clip": "image", "siglip": "image", "siglip2": "image", "xclip": "video"}
KIND |= {"clap": "audio", "fused": "audio"}


def embed(encoder: Any, modality: JointModality, items: list[Any]) -> torch.Tensor:
    with torch.no_grad():
        features = encoder(**modality.collate(items))
    assert features.mask is None
    return features.values


@pytest.mark.parametrize("name", KIND)
def test_a_batch_of_mixed_kinds_equals_one_by_one(
    encoders: dict[str, str], files: dict[str, str], name: str
) -> None:
    modality = JointModality(encoder=encoders[name], micro_batch=2)
    encoder = modality.build_encoder()
    given = sources(KIND[name], files)
    items = [modality.prepare(modality.load(source, Fetch())) for source in given]
    assert {item.num_features for item in items} == {1}
    together = embed(encoder, modality, items)
    assert together.shape == (len(items), 1, encoder.dim)
    for row, item in enumerate(items):
        alone = embed(encoder, modality, [item])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
        assert torch.equal(alone, embed(encoder, modality, [item]))
    assert len(torch.unique(together.round(decimals=3), dim=0)) >= 4  # and not all alike
    backwards = embed(encoder, modality, items[::-1])
    torch.testing.assert_close(backwards.flip(0), together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(len(items), 1))


@pytest.mark.parametrize("name", KIND)
def test_embeddings_are_those_of_the_model_itself(
    encoders: dict[str, str], files: dict[str, str], name: str
) -> None:
    model: Any = hf.AutoModel.from_pretrained(encoders[name]).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(encoders[name])
    kind = KIND[name]
    modality = JointModality(encoder=encoders[name], normalize=False)
    raw = modality.load(files[kind], Fetch())
    assert raw[0] == kind
    with torch.no_grad():
        if kind == "image":
            inputs = hf.AutoImageProcessor.from_pretrained(encoders[name])(
                images=[Image.open(files["image"])], return_tensors="pt"
            )
            theirs = model.get_image_features(**inputs).pooler_output
        elif kind == "video":
            inputs = hf.AutoImageProcessor.from_pretrained(encoders[name])(
                list(raw[1]), return_tensors="pt"
            )
            assert inputs["pixel_values"].shape[:2] == (1, 4)
            theirs = model.get_video_features(**inputs).pooler_output
        else:
            extractor = hf.AutoFeatureExtractor.from_pretrained(encoders[name])
            inputs = extractor(raw[1], sampling_rate=48_000, return_tensors="pt")
            inputs["is_longer"] = torch.zeros(1, 1, dtype=torch.bool)
            theirs = model.get_audio_features(**inputs).pooler_output
        padding = "max_length" if name.startswith("siglip") else False
        text = tokenizer(TEXTS[1], padding=padding, return_tensors="pt")
        assert ("attention_mask" in text) == (padding is False)
        text.pop("token_type_ids", None)
        theirs_text = model.get_text_features(**text).pooler_output
    items = [modality.prepare(i) for i in (raw, modality.load({"text": TEXTS[1]}, Fetch()))]
    ours = embed(modality.build_encoder(), modality, items)[:, 0]
    torch.testing.assert_close(ours, torch.cat([theirs, theirs_text]), rtol=1e-4, atol=1e-5)
    normalized = JointModality(encoder=encoders[name])
    torch.testing.assert_close(
        embed(normalized.build_encoder(), normalized, items)[:, 0],
        normalize(torch.cat([theirs, theirs_text]), dim=-1),
        rtol=1e-4,
        atol=1e-5,
    )


def test_all_items_of_a_kind_go_through_their_tower_in_one_call(
    encoders: dict[str, str], files: dict[str, str]
) -> None:
    modality = JointModality(encoder=encoders["clip"])
    given = sources("image", files)
    items = [modality.prepare(modality.load(source, Fetch())) for source in given]
    batch = modality.collate(items)
    groups = {key.partition(".")[0] for key in batch}
    assert len(groups) == 2
    index = torch.cat([batch[f"{group}.index"] for group in sorted(groups)])
    assert sorted(index.tolist()) == list(range(len(items)))
    encoder = modality.build_encoder()
    calls: list[int] = []
    for tower in (encoder.model.vision_model, encoder.model.text_model):
        tower.register_forward_hook(lambda *_: calls.append(1))
    embed(encoder, modality, items)
    assert len(calls) == 2


def test_the_kind_is_that_of_the_bytes_or_the_one_that_is_named(
    encoders: dict[str, str], files: dict[str, str]
) -> None:
    clip = JointModality(encoder=encoders["clip"])
    path = Path(files["text"])
    for source in (
        str(path),
        path.read_bytes(),
        {"text": TEXTS[1]},
        {"path": str(path), "text": None},
    ):
        assert clip.load(source, Fetch()) == ("text", TEXTS[1])
    assert clip.load("data:text/plain,a%20cat", Fetch()) == ("text", "a cat")
    for source in (files["image"], {"image": files["image"]}, Path(files["image"]).read_bytes()):
        kind, image = clip.load(source, Fetch())
        assert kind == "image" and image.size == (50, 30)
    clap = JointModality(encoder=encoders["clap"])
    for source in (files["audio"], {"audio": {"path": files["audio"]}}):
        kind, waveform = clap.load(source, Fetch())
        assert kind == "audio" and len(waveform) == pytest.approx(0.6 * 48_000, abs=2)
    span = clap.load({"audio": {"path": files["audio"], "start": 0.1, "end": 0.3}}, Fetch())[1]
    assert len(span) == pytest.approx(0.2 * 48_000, abs=2)


@pytest.mark.parametrize(
    ("name", "kind", "has"),
    [
        ("clip", "audio", "text and image"),
        ("clip", "video", "text and image"),
        ("clap", "image", "text and audio"),
        ("xclip", "image", "text and video"),
    ],
)
def test_a_kind_without_a_tower_is_refused_with_what_there_is(
    encoders: dict[str, str], files: dict[str, str], name: str, kind: str, has: str
) -> None:
    modality = JointModality(encoder=encoders[name])
    sentence = f"{files[kind]} is of the kind {kind}, but .*/{name} reads {has} only"
    with pytest.raises(MediaError, match=sentence) as caught:
        modality.load(files[kind], Fetch())
    assert caught.value.kind == "undecodable"


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ({"text": " \n"}, "the text has no letters"),
        ({"text": "a" * 101}, "has 101 letters, and the limit is 100"),
        ({"text": b"\xff\xfe"}, "the text is not UTF-8"),
        ({"text": "a", "image": "b"}, "got the keys text, image"),
        ({"drawing": "b"}, "got the keys drawing"),
        ({"text": None, "path": None}, "got an object without a key"),
        (b"", "the item is empty"),
        (b"\x00\x01\x02", "is not an image, audio, video or UTF-8 text"),
        (b"%PDF-1.7", "it begins like a PDF document"),
        (b"\x89PNG\r\n\x1a\n and no more", "truncated or damaged"),
        ({"image": "a cat"}, "no file at"),
        (Image.new("RGB", (11, 10)), "110 pixels, and the limit is 100"),
    ],
)
def test_a_bad_item_is_refused_with_a_sentence(
    encoders: dict[str, str], source: Any, sentence: str
) -> None:
    modality = JointModality(encoder=encoders["clip"], max_letters=100, max_pixels=100)
    with pytest.raises(MediaError, match=sentence):
        modality.load(source, Fetch())


def test_what_is_longer_than_the_encoder_takes_is_refused_and_not_cut(
    encoders: dict[str, str], files: dict[str, str]
) -> None:
    clip = JointModality(encoder=encoders["clip"])
    with pytest.raises(MediaError, match="a text of 42 tokens .* reads 32; shorten it"):
        clip.prepare(("text", "a" * 40))
    clap = JointModality(encoder=encoders["clap"])
    long = {"array": np.tile(tone(0.5), 3), "sampling_rate": 16_000}
    with pytest.raises(MediaError, match="1.5"):  # CLAP's own choice of a second is random
        clap.load(long, Fetch())
    video = JointModality(encoder=encoders["xclip"], max_seconds=0.5)
    with pytest.raises(MediaError, match="0.5"):
        video.load(files["video"], Fetch())
    with pytest.raises(MediaError, match="silence"):
        clap.load({"array": np.zeros(8000), "sampling_rate": 16_000}, Fetch())


def test_an_encoder_without_a_joint_space_is_refused(tmp_path: Path) -> None:
    dino = tiny_image_encoder(tmp_path, "dinov2")
    with pytest.raises(RecipeError, match="has a Dinov2Config, and no tower of a joint space"):
        JointModality(encoder=dino).build_encoder()


def test_pe_av_has_texts_and_sounds(tmp_path: Path) -> None:
    hf.PeAudioVideoConfig().save_pretrained(tmp_path)
    assert methods(str(tmp_path), None) == {
        "text": "get_text_audio_video_embeds",
        "audio": "get_audio_embeds",
    }


def test_sounds_of_different_lengths_are_not_padded_for_an_encoder_of_waveforms(
    tmp_path: Path,
) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 4}
    codec = {"encoder_hidden_size": 8, "downsampling_ratios": [2, 4], "decoder_hidden_size": 16}
    codec |= {"upsampling_ratios": [4, 2], "hop_length": 8, "codebook_size": 8, "codebook_dim": 4}
    special = {f"{name}_token_id": 1 for name in ("pad", "bos", "eos", "cls", "sep")}
    config = hf.PeAudioConfig(
        text_config={"vocab_size": 16, **small, **special},  # type: ignore[arg-type]
        audio_config={"dac_config": codec, "num_key_value_heads": 4, "head_dim": 8, **small},  # type: ignore[arg-type]
    )
    torch.manual_seed(0)
    model = hf.PeAudioModel(config).eval()
    model.save_pretrained(tmp_path)
    extractor = hf.PeAudioFeatureExtractor(sampling_rate=16_000, hop_length=8)
    extractor.save_pretrained(tmp_path)
    modality = JointModality(encoder=str(tmp_path), normalize=False)
    waveforms = [tone(seconds) for seconds in (0.05, 0.0627, 0.05)]
    items = [modality.prepare(("audio", waveform)) for waveform in waveforms]
    ours = embed(modality.build_encoder(), modality, items)[:, 0]
    for row, waveform in enumerate(waveforms):
        inputs = extractor(waveform, sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            theirs = model.get_audio_embeds(**inputs)
        torch.testing.assert_close(ours[row : row + 1], theirs, rtol=1e-4, atol=1e-5)


def test_fields_come_back_from_json_and_pickling_loads_nothing(tmp_path: Path) -> None:
    modality = JointModality(encoder=str(tmp_path / "not there"), normalize=False)
    assert JointModality.model_validate(modality.model_dump(mode="json")) == modality
    assert pickle.loads(pickle.dumps(modality)) == modality  # noqa: S301


def test_equal_items_have_equal_content_and_others_have_not(
    encoders: dict[str, str], files: dict[str, str]
) -> None:
    modality, path = JointModality(encoder=encoders["clip"]), files["text"]
    same = [modality.content(source, Fetch()) for source in (path, Path(path).read_bytes())]
    assert same[0] == same[1]
    texts = [{"text": "a"}, {"text": "b"}, {"text": path}, {"text": b"a"}, {"image": path}, path]
    assert len({modality.content(source, Fetch()) for source in texts}) == len(texts)


def test_the_example_of_the_kit_is_read(tmp_path: Path) -> None:
    fields, given = joint_example(tmp_path)
    modality = JointModality.model_validate(fields)
    kinds = [modality.load(source, Fetch())[0] for source in given]
    assert kinds == ["image", "text", "image", "text"]
