"""modalities/video.py and video_clips.py: frames or clips, as the encoders themselves see them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from multi_token.data.feature_cache.cache import FeatureCache
from multi_token.errors import MediaError, MultiTokenError, RecipeError
from multi_token.media.fetch import Fetch
from multi_token.modalities.image import ImageModality
from multi_token.modalities.video import VideoModality
from multi_token.testing import tiny_image_encoder
from multi_token.testing.encoders import tiny_video_encoder
from multi_token.testing.files import noise_frames, write_video
from multi_token.types import Media

VIDEO_KINDS = ["xclip", "videomae", "timesformer", "vivit", "vjepa2"]
IMAGE_KINDS = ["clip", "siglip2", "dinov2_with_registers", "efficientnet"]
CLIP_CASES = [
    ("xclip", "pooled", 1),
    ("videomae", "patches", 64),  # 8 frames in tubes of 2, 16 patches each
    ("videomae", "mean", 1),
    ("timesformer", "patches", 128),
    ("timesformer", "all", 129),
    ("timesformer", "cls", 1),
    ("vivit", "patches", 64),
    ("vivit", "pooled", 1),
    ("vjepa2", "patches", 64),
    ("vjepa2", "mean", 1),
]
FRAME_CASES = [
    ("clip", "pooled"),
    ("clip", "patches"),
    ("clip", "all"),
    ("siglip2", "mean"),
    ("siglip2", "patches"),
    ("dinov2_with_registers", "cls"),
    ("efficientnet", "patches"),
]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("encoders")
    made = {kind: tiny_video_encoder(folder / kind, kind) for kind in VIDEO_KINDS}
    return made | {kind: tiny_image_encoder(folder / kind, kind) for kind in IMAGE_KINDS}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """2.4 s, and 0.9 s of another shape."""
    folder = tmp_path_factory.mktemp("videos")
    long = write_video(folder / "long.mp4", noise_frames(24))
    short = noise_frames(9, height=64, width=32, seed=1)
    return [long, write_video(folder / "short.webm", short, codec="libvpx-vp9")]


def prepared(modality: VideoModality, sources: list[Any]) -> list[Any]:
    return [modality.prepare(modality.load(source, Fetch())) for source in sources]


@torch.no_grad()
def encoded(modality: VideoModality, items: list[Any], encoder: Any = None) -> list[Tensor]:
    """Features of each item, all in one batch, padding taken off."""
    encoder = encoder or modality.build_encoder()
    features = encoder(**modality.collate(items))
    assert features.mask is not None and features.newlines is None
    return [values[mask] for values, mask in zip(features.values, features.mask, strict=True)]


@pytest.mark.parametrize(
    ("kind", "read_as", "features"),
    [(k, "clip", f) for k, f, _ in CLIP_CASES] + [(k, "frames", f) for k, f in FRAME_CASES],
)
def test_a_batch_equals_one_by_one_with_different_numbers_of_frames(
    encoders: dict[str, str], videos: list[str], kind: str, read_as: Any, features: Any
) -> None:
    fields: dict[str, Any] = {"read_as": read_as, "features": features, "fps": 10.0}
    modality = VideoModality(encoder=encoders[kind], micro_batch=3, **fields)
    encoder = modality.build_encoder()
    items = prepared(modality, videos)
    assert items[0].num_features > items[1].num_features
    for item, values in zip(items, encoded(modality, items, encoder), strict=True):
        assert values.shape == (item.num_features, encoder.dim)
        (alone,) = encoded(modality, [item], encoder)
        torch.testing.assert_close(values, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "features", "num_features"), CLIP_CASES)
def test_a_clip_has_the_features_that_transformers_gives(
    encoders: dict[str, str], videos: list[str], kind: str, features: Any, num_features: int
) -> None:
    from transformers import AutoImageProcessor, AutoModel

    modality = VideoModality(encoder=encoders[kind], read_as="clip", features=features)
    (item,) = prepared(modality, videos[:1])
    (ours,) = encoded(modality, [item])
    frames = modality.load(videos[0], Fetch())
    pixels = AutoImageProcessor.from_pretrained(encoders[kind])(frames, return_tensors="pt")
    model: Any = AutoModel.from_pretrained(encoders[kind]).eval()
    with torch.no_grad():
        if kind == "xclip":
            theirs = model.get_video_features(pixels["pixel_values"]).pooler_output[:, None]
        elif kind == "vjepa2":
            theirs = model(pixel_values_videos=pixels["pixel_values"]).last_hidden_state
        else:
            output = model(pixels["pixel_values"])
            theirs = output.last_hidden_state
            if features == "pooled":
                theirs = output.pooler_output[:, None]
    patches = theirs[:, 1:] if kind in ("timesformer", "vivit") else theirs
    wanted = {"patches": patches, "mean": patches.mean(1, keepdim=True), "cls": theirs[:, :1]}
    torch.testing.assert_close(ours, wanted.get(features, theirs)[0], rtol=1e-5, atol=1e-6)
    assert len(ours) == item.num_features == num_features


@pytest.mark.parametrize(("kind", "features"), FRAME_CASES)
def test_frames_have_the_features_that_they_have_as_images(
    encoders: dict[str, str], videos: list[str], kind: str, features: Any
) -> None:
    modality = VideoModality(encoder=encoders[kind], num_frames=3, features=features)
    (ours,) = encoded(modality, prepared(modality, videos[:1]))
    image = ImageModality(encoder=encoders[kind], features=features)
    items = [image.prepare(frame) for frame in modality.load(videos[0], Fetch())]
    with torch.no_grad():
        output = image.build_encoder()(**image.collate(items))
    mask = torch.ones(output.values.shape[:2]).bool() if output.mask is None else output.mask
    torch.testing.assert_close(ours, output.values[mask], rtol=1e-5, atol=1e-6)
    assert len(items) == 3


def test_a_pooled_frame_of_clip_is_what_transformers_pools(
    encoders: dict[str, str], videos: list[str]
) -> None:
    from transformers import AutoModel

    modality = VideoModality(encoder=encoders["clip"])
    (item,) = prepared(modality, videos[:1])
    with torch.no_grad():
        tower = AutoModel.from_pretrained(encoders["clip"]).vision_model.eval()
        theirs = tower(item.inputs["pixel_values"]).pooler_output
    (ours,) = encoded(modality, [item])
    torch.testing.assert_close(ours, theirs)


def test_a_hidden_state_of_a_clip_can_be_taken(encoders: dict[str, str], videos: list[str]) -> None:
    from transformers import AutoModel

    fields: dict[str, Any] = {"read_as": "clip", "features": "patches"}
    for kind in ("videomae", "vjepa2"):
        modality = VideoModality(encoder=encoders[kind], layer=(-2, 1), **fields)
        (item,) = prepared(modality, videos[:1])
        with torch.no_grad():
            model = AutoModel.from_pretrained(encoders[kind]).eval()
            states = model(item.inputs["pixel_values"], output_hidden_states=True).hidden_states
        (ours,) = encoded(modality, [item])
        torch.testing.assert_close(ours, torch.cat([states[-2], states[1]], -1)[0])


def test_frames_a_second_become_clips_the_last_filled_with_its_last_frame(
    encoders: dict[str, str],
) -> None:
    frames = noise_frames(12)
    modality = VideoModality(encoder=encoders["xclip"], read_as="clip", fps=10.0)
    items = prepared(modality, [{"array": frames, "fps": 10}, frames[:8]][:1])
    filled = np.concatenate([frames[8:], frames[[11] * 4]])
    by_hand = VideoModality(encoder=encoders["xclip"], read_as="clip")
    clips = [encoded(by_hand, prepared(by_hand, [clip]))[0] for clip in (frames[:8], filled)]
    assert items[0].num_features == 2
    torch.testing.assert_close(encoded(modality, items)[0], torch.cat(clips))


def test_the_tower_keeps_only_what_makes_features(encoders: dict[str, str]) -> None:
    def parts(kind: str, features: Any) -> tuple[set[str], int]:
        modality = VideoModality(encoder=encoders[kind], read_as="clip", features=features)
        encoder = modality.build_encoder()
        names = {name for name, _ in encoder.parts.tower.named_children()}
        return names, len(encoder.layers())

    # the text half has 5 layers, the predictor 4, the encoders 3
    assert parts("xclip", "pooled") == ({"vision_model", "visual_projection", "mit"}, 3)
    assert parts("vjepa2", "mean") == ({"encoder"}, 3)


def test_every_form_of_the_same_frames_is_read_alike(
    encoders: dict[str, str], videos: list[str], tmp_path: Path
) -> None:
    path = Path(write_video(tmp_path / "exact.gif", noise_frames(8) // 255 * 255, codec="gif"))
    modality = VideoModality(encoder=encoders["clip"], num_frames=4)
    frames = [
        np.asarray(frame)
        for frame in VideoModality(encoder=encoders["clip"]).load(str(path), Fetch())
    ]
    images = [Image.fromarray(frame) for frame in frames]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    sources: list[Any] = [
        str(path),
        path,
        path.read_bytes(),
        {"path": str(path)},
        {"bytes": path.read_bytes(), "path": None, "start": 0},
        np.stack(frames),
        torch.from_numpy(np.stack(frames)),
        {"array": np.stack(frames)},
        images,
        [str(tmp_path / f"{number}.png") for number in range(8)],
        ["1.png", "3.png", "5.png", "7.png"],
    ]
    first, *others = [modality.load(source, Fetch(root=str(tmp_path))) for source in sources]
    assert len(first) == 4
    for taken in others:
        assert [f.tobytes() for f in taken] == [f.tobytes() for f in first]


def test_start_and_end_choose_a_part_of_a_file_and_of_frames_with_times(
    encoders: dict[str, str], videos: list[str]
) -> None:
    modality = VideoModality(encoder=encoders["clip"], num_frames=2)
    part = modality.load({"path": videos[0], "start": 1.0, "end": 1.4}, Fetch())
    every = VideoModality(encoder=encoders["clip"], num_frames=24).load(videos[0], Fetch())
    assert [f.tobytes() for f in part] == [every[11].tobytes(), every[13].tobytes()]
    frames = noise_frames(24)
    taken = modality.load({"array": frames, "fps": 10, "start": 1.0, "end": 1.4}, Fetch())
    assert [np.asarray(f).tolist() for f in taken] == [frames[11].tolist(), frames[13].tolist()]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (np.zeros((4, 8, 8, 3), np.float32), "got float32 [4, 8, 8, 3]"),
        (np.zeros((4, 3, 8, 8), np.uint8), "got uint8 [4, 3, 8, 8]"),
        (np.zeros((8, 8, 3), np.uint8), "got uint8 [8, 8, 3]"),
        (np.zeros((0, 8, 8, 3), np.uint8), "is empty; give at least one frame"),
        (np.zeros((1, 200, 200, 3), np.uint8), "200 x 200 pixels, and the limit is 10,000"),
        ([], "is empty"),
        ([0.5, 0.25], "expected images or their paths in the list of frames"),
        ([Image.new("RGB", (200, 200))], "200 x 200 = 40,000 pixels"),
        ({"start": 1}, "expected one of `path`, `bytes` and `array`"),
        ({"path": "a.mp4", "stop": 1}, "got 'path', 'stop'"),
        ({"path": "a.mp4", "start": "1"}, "expected seconds as a number in `start`"),
        ({"path": "a.mp4", "end": float("nan")}, "in `end` of a video, got nan"),
        ({"path": "a.mp4", "fps": 5}, "the file has its own"),
        ({"array": np.zeros((4, 8, 8, 3), np.uint8), "fps": 0}, "expected frames a second"),
        ({"array": np.zeros((4, 8, 8, 3), np.uint8), "start": 1}, "has no times"),
        (b"no video", "is not a video"),
    ],
)
def test_a_source_that_is_no_video_is_named(
    encoders: dict[str, str], source: Any, reason: str
) -> None:
    modality = VideoModality(encoder=encoders["clip"], max_pixels=10_000)
    with pytest.raises(MediaError) as caught:
        modality.load(source, Fetch())
    assert caught.value.kind == "undecodable"
    assert reason in str(caught.value)


def test_a_file_that_is_not_there_is_missing(encoders: dict[str, str]) -> None:
    modality = VideoModality(encoder=encoders["clip"])
    for source in ("nowhere.mp4", {"path": "nowhere.mp4", "start": 1}, ["nowhere.png"]):
        with pytest.raises(MediaError, match="no file at") as caught:
            modality.load(source, Fetch())
        assert caught.value.kind == "missing_file"


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("xclip", {}, "takes clips of 8 frames, not single ones; set `read_as: clip`"),
        ("vjepa2", {}, "takes clips of 8 frames, not single ones"),
        ("clip", {"read_as": "clip"}, "takes single images; set `read_as: frames`"),
        ("videomae", {"read_as": "clip", "num_frames": 4}, "the recipe has 4; set `num_frames: 8`"),
        ("xclip", {"read_as": "clip", "features": "patches"}, "gives one embedding per clip"),
        ("xclip", {"read_as": "clip", "layer": -2}, "remove `layer`"),
    ],
)
def test_an_encoder_that_cannot_do_it_says_what_to_set(
    encoders: dict[str, str], kind: str, fields: dict[str, Any], reason: str
) -> None:
    modality = VideoModality(encoder=encoders[kind], **fields)
    with pytest.raises(RecipeError) as caught:
        modality.build_encoder()
    assert reason in str(caught.value)
    if "features" not in fields and "layer" not in fields:
        with pytest.raises(RecipeError):
            modality.prepare([Image.new("RGB", (40, 40))] * 4)


def test_an_encoder_without_a_pooled_vector_says_so(encoders: dict[str, str]) -> None:
    with pytest.raises(MultiTokenError, match="VideoMAEModel gives no pooled output; use"):
        VideoModality(encoder=encoders["videomae"], read_as="clip").build_encoder()


def test_an_encoder_with_rotary_positions_takes_any_number_of_frames(
    encoders: dict[str, str], videos: list[str]
) -> None:
    fields: dict[str, Any] = {"read_as": "clip", "features": "patches", "num_frames": 4}
    modality = VideoModality(encoder=encoders["vjepa2"], **fields)
    (item,) = prepared(modality, videos[:1])
    assert len(encoded(modality, [item])[0]) == item.num_features == 32


def test_a_video_processor_asks_for_torchvision(tmp_path: Path) -> None:
    from transformers.utils import is_torchvision_available

    encoder = Path(tiny_video_encoder(tmp_path / "encoder", "vjepa2"))
    (encoder / "preprocessor_config.json").unlink()
    fields = {"video_processor_type": "VJEPA2VideoProcessor", "size": {"shortest_edge": 36}}
    fields |= {"crop_size": {"height": 32, "width": 32}, "do_sample_frames": False}
    (encoder / "video_preprocessor_config.json").write_text(json.dumps(fields))
    modality = VideoModality(encoder=str(encoder), read_as="clip", features="mean")
    frames = [Image.fromarray(frame) for frame in noise_frames(8)]
    if is_torchvision_available():
        assert modality.prepare(frames).inputs["pixel_values"].shape == (1, 8, 3, 32, 32)
    else:
        with pytest.raises(MultiTokenError, match="a video processor needs torchvision"):
            modality.prepare(frames)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_frames": 200}, "is over `max_frames`"),
        ({"projector": {"type": "mlp", "line_break": True}}, "`line_break` in the projector"),
        ({"fps": 0}, "greater than 0"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        VideoModality.model_validate({"encoder": "some/encoder", **fields})


def test_constructing_and_pickling_load_nothing(tmp_path: Path) -> None:
    modality = VideoModality(encoder=str(tmp_path / "not there yet"), fps=2.0, layer=(-2, 1))
    assert pickle.loads(pickle.dumps(modality)) == modality  # noqa: S301
    assert VideoModality.model_validate(modality.model_dump(mode="json")) == modality


def test_features_are_kept_for_the_part_that_was_read(
    encoders: dict[str, str], videos: list[str]
) -> None:
    modality = VideoModality(encoder=encoders["clip"], num_frames=2)
    red, blue = (Image.new("RGB", size, "red") for size in ((40, 40), (50, 40)))
    part = {"path": videos[0], "start": 0, "end": 1}
    timed = {"array": [red, blue], "fps": 1}
    sources = [videos[0], part, {**part, "end": 2}, [red, blue], [blue, red], timed]
    cache = FeatureCache()
    items = [(Media("video", source), Fetch()) for source in [*sources, dict(part), [red, blue]]]
    encoder = modality.build_encoder()
    assert cache.fill(items, {"video": modality}, {"video": encoder}) == len(sources)
    for media, fetch in items:
        found = cache.find(media, modality, fetch)
        assert found is not None and found.num_features == 2
