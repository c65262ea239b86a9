"""Facts of the built-in modalities are the numbers that their decoders used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from multi_token import registry
from multi_token.errors import MediaError, RecipeError
from multi_token.media.fetch import Fetch
from multi_token.modalities.base import Modality
from multi_token.modalities.document import DocumentModality
from multi_token.modalities.image import ImageModality
from multi_token.modalities.speech import SpeechModality
from multi_token.modalities.timeseries import TimeseriesModality
from multi_token.modalities.video import VideoModality
from multi_token.recipe.recipe import parse_recipe
from multi_token.testing.encoders import tiny_sentence_encoder, tiny_video_encoder, tiny_whisper
from multi_token.testing.files import noise_frames, write_pdf, write_tone, write_video

LINEAR = {"type": "linear"}


def written(modality: Modality, source: Any) -> list[str]:
    prepared = modality.prepare(modality.load(source, Fetch()))
    return [run.text for run in modality.runs(prepared)]


def test_each_frame_has_the_time_at_which_a_player_shows_it(parts: Path, tmp_path: Path) -> None:
    path = write_video(tmp_path / "shown.mp4", noise_frames(30), fps=10)
    fields = {"encoder": str(parts / "clip"), "projector": LINEAR, "facts": "{time:.2f}s "}
    # of three seconds at 10 frames a second, the middles of thirds: 0.5, 1.5 and 2.5
    video = VideoModality(**fields, num_frames=3)
    assert written(video, path) == ["0.50s ", "1.50s ", "2.50s "]
    # a part has the times of the file, and not its own
    part = {"path": path, "start": 1.0, "end": 3.0}
    assert written(VideoModality(**fields, num_frames=2), part) == ["1.50s ", "2.50s "]
    # a frame is shown until the next one: the time of the frame, not the one that was asked for
    assert written(VideoModality(**fields, fps=4), {"path": path, "end": 1.0}) == [
        *("0.10s ", "0.30s ", "0.60s ", "0.80s ")
    ]
    dark = [str(tmp_path / "0.png")] * 4
    Image.new("RGB", (32, 32)).save(dark[0])
    assert written(video, {"array": dark, "fps": 0.5}) == ["0.00s ", "4.00s ", "6.00s "]
    with pytest.raises(MediaError, match=r"writes \{time\}, which this item does not have"):
        written(video, dark)


def test_a_clip_has_the_time_of_its_first_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "shown.mp4", noise_frames(40), fps=10)
    encoder = tiny_video_encoder(tmp_path / "videomae", "videomae", num_frames=8)
    fields = {"read_as": "clip", "features": "mean", "fps": 4, "projector": LINEAR}
    clips = VideoModality(encoder=encoder, **fields, facts="clip {frame} from {time:.1f}s: ")
    assert written(clips, path) == ["clip 1 from 0.1s: ", "clip 2 from 2.1s: "]
    patches = clips.model_copy(update={"features": "patches"})
    prepared = patches.prepare(patches.load(path, Fetch()))
    first, second = patches.runs(prepared)
    assert first.num_tokens == second.num_tokens == prepared.num_features // 2 > 1


def test_sizes_lengths_and_pages(parts: Path, tmp_path: Path) -> None:
    wide = Image.new("RGB", (60, 30))
    exif = wide.getexif()
    exif[0x0112] = 6  # a camera that was held upright
    wide.save(tmp_path / "turned.jpg", exif=exif)
    image = ImageModality(encoder=str(parts / "clip"), facts="{width}x{height} ")
    assert written(image, str(tmp_path / "turned.jpg")) == ["30x60 "]
    assert written(
        image.model_copy(update={"pad_to_square": True}), Image.new("RGB", (60, 30))
    ) == ["60x30 "]
    whisper = tiny_whisper(tmp_path / "whisper")
    speech = SpeechModality.model_validate({"encoder": whisper, "facts": "{seconds:.1f}s "})
    tone = write_tone(tmp_path / "tone.wav", 0.4, 44_100)
    assert written(speech, tone) == ["0.4s "]
    assert written(speech, {"path": tone, "start": 0.1, "end": 0.3}) == ["0.2s "]
    document = DocumentModality(
        encoder=tiny_sentence_encoder(tmp_path / "sentences"), facts="{pages} p. "
    )
    assert written(document, write_pdf(tmp_path / "book.pdf", ["One.", "Two."])) == ["2 p. "]
    with pytest.raises(MediaError, match=r"writes \{pages\}"):
        written(document, {"text": "One."})
    letters = document.model_copy(update={"facts": "{characters} letters: "})
    assert written(letters, {"text": "One."}) == ["4 letters: "]


def test_a_series_has_the_numbers_of_each_channel_before_it_is_normalized(tmp_path: Path) -> None:
    table = tmp_path / "ecg.csv"
    table.write_text("I,II\n" + "".join(f"{5 + (-1) ** i},{i}\n" for i in range(20)))
    facts = "mean {mean:.3g}, sd {sd:.3g}, {rate:g} Hz, channel {name}: "
    series = TimeseriesModality(channels=2, rate=50, facts=facts)
    expected = "mean 5, sd 1, 50 Hz, channel I: mean 9.5, sd 5.77, 50 Hz, channel II: "
    assert written(series, str(table)) == [expected]
    # two files with the same numbers and other names share no cached facts
    renamed = tmp_path / "renamed.csv"
    renamed.write_text(table.read_text().replace("II", "V1"))
    assert "channel V1: " in written(series, str(renamed))[0]
    contents = [series.content(str(path), Fetch()) for path in (table, renamed)]
    assert contents[0] != contents[1]
    nameless = {"array": np.zeros((10, 2)).tolist(), "sampling_rate": 25}
    with pytest.raises(MediaError, match=r"writes \{name\}"):
        written(series, nameless)
    seconds = TimeseriesModality(channels=2, facts="{seconds:.1f}s {channel} ")
    assert written(seconds, nameless) == ["0.4s 1 0.4s 2 "]


@pytest.mark.parametrize("name", sorted(registry._BUILT_INS["modality"]))
def test_an_unknown_fact_is_refused_with_the_known_ones_when_a_recipe_is_read(
    name: str, recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    fields = recipe_fields(tmp_path)
    needed = {"vector": {"dim": 2}, "timeseries": {"channels": 1}}
    own = needed.get(name, {"encoder": str(tmp_path)})
    fields["model"]["modalities"] = {"x": {"type": name, "facts": "{nothing} ", **own}}
    names = registry.resolve("modality", name).fact_names
    sentence = f"known: {', '.join(names)}" if names else "this type has none; remove it"
    with pytest.raises(RecipeError, match=sentence):
        parse_recipe(yaml.safe_dump(fields))
