"""modalities/timeseries.py: patches of any series, by an encoder that learns or one that is whole.

The oracle is what the models of transformers return for the same windows.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from multi_token.errors import MediaError, RecipeError
from multi_token.media.fetch import Fetch
from multi_token.modalities.timeseries import TimeseriesModality, normalized, positions
from multi_token.registry import validate_fields
from multi_token.testing.encoders import tiny_patchtst
from multi_token.testing.examples import timeseries_example

SCRATCH = TimeseriesModality(channels=2, patch_length=4, hidden_size=16, num_layers=2)
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 4}


def noise(num_steps: int, channels: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(3.0, 2.0, size=(num_steps, channels))


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def prepared(modality: TimeseriesModality, source: Any) -> Any:
    return modality.prepare(modality.load(source, Fetch()))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: Any) -> dict[str, str]:
    """One of every family of transformers that reads patches."""
    folder = tmp_path_factory.mktemp("encoders")
    mixer = hf.PatchTSMixerConfig(
        num_input_channels=2, context_length=32, patch_length=8, patch_stride=8, d_model=16
    )
    timesfm = {**SMALL, "patch_length": 8, "context_length": 32, "intermediate_size": 32}
    torch.manual_seed(0)
    models: dict[str, Any] = {
        "mixer": hf.PatchTSMixerModel(mixer),
        "timesfm": hf.TimesFmModel(hf.TimesFmConfig(**timesfm)),
        "timesfm2_5": hf.TimesFm2_5Model(
            hf.TimesFm2_5Config(**timesfm, num_key_value_heads=4)  # type: ignore[arg-type]
        ),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in models} | {
        "patchtst": tiny_patchtst(folder / "patchtst"),
        "overlapping": tiny_patchtst(
            folder / "overlapping", patch_length=12, patch_stride=5, use_cls_token=True
        ),
        "one_channel": tiny_patchtst(folder / "one_channel", channels=1),
        "masking": tiny_patchtst(folder / "masking", do_mask_input=True),
    }


FAMILIES = ["patchtst", "overlapping", "one_channel", "masking", "mixer", "timesfm", "timesfm2_5"]
CASES = [{}, *({"encoder": family, "merge_channels": "join"} for family in FAMILIES)]
CASES.append({"encoder": "timesfm", "merge_channels": "mean"})


@pytest.mark.parametrize("fields", CASES, ids=lambda fields: "-".join(fields.values()) or "scratch")
def test_a_batch_of_several_lengths_equals_one_by_one_with_the_promised_features(
    encoders: dict[str, str], fields: dict[str, Any]
) -> None:
    modality = SCRATCH
    if fields:
        fields = {**fields, "encoder": encoders[fields["encoder"]]}
        modality = TimeseriesModality(channels=2, micro_batch=2, **fields)
    encoder = modality.build_encoder()
    assert not encoder.training
    items = [prepared(modality, noise(n, seed=n)) for n in (1, 5, 31, 32, 33, 64, 77)]
    assert len({item.num_features for item in items}) > 3
    with torch.no_grad():
        together = encoder(**modality.collate(items))
        assert together.mask is not None
        assert not together.values[~together.mask].isnan().any()
        for row, item in enumerate(items):
            alone = encoder(**modality.collate([item]))
            values = together.values[row][together.mask[row]]
            assert values.shape == (item.num_features, encoder.dim) == alone.values[0].shape
            torch.testing.assert_close(values, alone.values[0], rtol=1e-4, atol=1e-5)
            again = encoder(**modality.collate([item]))
            assert torch.equal(alone.values, again.values)


def test_a_learning_encoder_gives_the_same_with_gradients_and_says_that_it_learns() -> None:
    encoder = SCRATCH.build_encoder()
    assert not type(encoder).pretrained and len(encoder.layers()) == 2
    inputs = SCRATCH.collate([prepared(SCRATCH, noise(n)) for n in (3, 40)])
    with torch.no_grad():
        frozen = encoder(**inputs)
    learning = encoder.train()(**inputs)
    assert frozen.mask is not None
    torch.testing.assert_close(
        learning.values[frozen.mask], frozen.values[frozen.mask], rtol=1e-4, atol=1e-5
    )
    learning.values[frozen.mask].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_features_of_a_learning_encoder_know_their_place_and_their_level() -> None:
    encoder = SCRATCH.build_encoder()
    repeating = np.tile(noise(4), (3, 1))
    loud = 100 * repeating
    with torch.no_grad():
        values, louder = encoder(
            **SCRATCH.collate([prepared(SCRATCH, x) for x in (repeating, loud)])
        ).values
    assert (values[0] - values[1]).abs().max() > 0.05  # equal patches at different places
    assert (values - louder).abs().max() > 0.05  # equal shapes of different strength


def test_positions_are_those_of_the_paper() -> None:
    table = positions(50, 8)
    for step in (0, 1, 49):
        for pair in range(4):
            angle = step / 10_000 ** (2 * pair / 8)
            expected = torch.tensor([np.sin(angle), np.cos(angle)], dtype=torch.float32)
            torch.testing.assert_close(table[step, 2 * pair : 2 * pair + 2], expected)


def test_a_windows_features_are_those_of_patchtst(encoders: dict[str, str]) -> None:
    oracle = hf.PatchTSTModel.from_pretrained(encoders["patchtst"]).eval()
    modality = TimeseriesModality(channels=2, encoder=encoders["patchtst"])
    series = noise(50)
    whole = torch.tensor(series, dtype=torch.float32)
    with torch.no_grad():
        ours = modality.build_encoder()(**modality.collate([prepared(modality, series)])).values[0]
        first, last = (
            oracle(past_values=window[None]).last_hidden_state[0]  # [channels, patches, width]
            for window in (whole[:32], whole[-32:])
        )
    theirs = torch.cat([first, last[:, 1:]], dim=1)  # 18 steps are new: three patches
    torch.testing.assert_close(ours, torch.cat([theirs[0], theirs[1]], dim=-1))


def test_a_short_series_is_filled_at_the_front_and_the_filling_is_not_observed(
    encoders: dict[str, str],
) -> None:
    oracle = hf.PatchTSTModel.from_pretrained(encoders["patchtst"]).eval()
    modality = TimeseriesModality(channels=2, encoder=encoders["patchtst"], merge_channels="mean")
    series = torch.tensor(noise(10), dtype=torch.float32)
    window = torch.cat([torch.full((22, 2), 777.0), series])
    observed = torch.arange(32)[None, :, None].expand(1, 32, 2) >= 22
    window[:22] = series.mean(0)
    with torch.no_grad():
        ours = modality.build_encoder()(
            **modality.collate([prepared(modality, series.numpy())])
        ).values[0]
        theirs = oracle(past_values=window[None], past_observed_mask=observed).last_hidden_state
    assert len(ours) == 2  # ten steps reach into two patches of eight
    torch.testing.assert_close(ours, theirs[0].mean(0)[-2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["timesfm", "timesfm2_5"])
def test_each_channel_goes_through_timesfm_by_itself(encoders: dict[str, str], family: str) -> None:
    oracle: Any = hf.AutoModel.from_pretrained(encoders[family]).eval()
    modality = TimeseriesModality(channels=2, encoder=encoders[family])
    series = torch.tensor(noise(32), dtype=torch.float32)
    more = {"freq": torch.zeros(1, 1, dtype=torch.long)} if family == "timesfm" else {}
    with torch.no_grad():
        encoder = modality.build_encoder()
        ours = encoder(**modality.collate([prepared(modality, series.numpy())])).values[0]
        theirs = [
            oracle(
                past_values=channel[None],
                past_values_padding=torch.zeros(1, 32, dtype=torch.long),
                **more,
            ).last_hidden_state[0]
            for channel in series.T
        ]
    torch.testing.assert_close(ours, torch.cat(theirs, dim=-1), rtol=1e-4, atol=1e-5)


def test_sources_of_every_kind_are_read_alike(tmp_path: Path) -> None:
    series = noise(9).astype(np.float32)
    path = tmp_path / "series"  # no suffix: the bytes say what it is
    path.write_bytes(npy(series))
    sources: list[Any] = [series, series.tolist(), torch.tensor(series), str(path), npy(series)]
    sources += [{"array": series}, {"path": str(path), "bytes": None, "sampling_rate": 5}]
    for source in sources:
        assert np.array_equal(SCRATCH.load(source, Fetch()), series)
    one = TimeseriesModality(channels=1)
    assert one.load([1, 2, 3], Fetch()).tolist() == [[1.0], [2.0], [3.0]]


def test_a_series_is_brought_to_the_rate_of_the_recipe() -> None:
    modality = TimeseriesModality(channels=2, rate=50.0)
    ramp = np.stack([np.arange(20.0), -np.arange(20.0)], axis=1)
    slower = modality.load({"array": ramp, "sampling_rate": 100}, Fetch())
    np.testing.assert_allclose(slower[:, 0], np.arange(0, 20, 2), atol=1e-5)
    faster = modality.load({"array": ramp, "sampling_rate": 20}, Fetch())
    assert len(faster) == 50
    np.testing.assert_allclose(faster[:48, 1], -0.4 * np.arange(48), atol=1e-5)
    assert np.array_equal(modality.load(ramp, Fetch()), ramp)  # says no rate: as it is
    assert len(modality.load({"array": ramp[:1], "sampling_rate": 1000}, Fetch())) == 1


@pytest.mark.parametrize("unit", [1.0, 1e-13, 1e6])
def test_channels_are_normalized_in_any_unit_and_a_constant_one_is_zeros(unit: float) -> None:
    series = np.concatenate([noise(40, 1), np.full((40, 1), 0.1)], axis=1) * unit
    values, level = normalized(series.astype(np.float32))
    assert values[:, 0].mean() == pytest.approx(0, abs=1e-5)
    assert values[:, 0].std() == pytest.approx(1, abs=1e-5)
    assert not values[:, 1].any() and np.isfinite(level).all()
    mean, deviation = series[:, 0].mean(), series[:, 0].std()
    assert np.exp(level[2]) == pytest.approx(deviation, rel=1e-4)
    assert np.sinh(level[0]) * np.exp(level[2]) == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ([[1.0, 2.0], [float("nan"), 4.0]], "holds nan at step 1 of channel 0 .1 such values"),
        (np.full((3, 2), 1e300), "holds inf at step 0 of channel 0 .6 such values"),
        (noise(3, channels=5), r"of shape \[time, 2\] .* got \[3, 5\]; set `channels`"),
        (noise(2, channels=7), r"got \[2, 7\]; time comes first, so transpose it"),
        ([1.0, 2.0, 3.0], r"of shape \[time, 2\] .* got \[3\]"),
        ([], "a series has at least one step"),
        (np.zeros((0, 2)), r"got \[0, 2\]; a series has at least one step"),
        ([[1.0, 2.0], [3.0]], "with rows of one length, got"),
        ([["1", "2"]], "expected numbers in the row's series"),
        ([[1.0, None]], "expected numbers in the row's series"),
        (np.zeros((2, 2), dtype=complex), "expected numbers in the row's series"),
        (noise(101), "has 101 steps, and the limit is 100; cut it"),
        ({"array": noise(60), "sampling_rate": 5}, "at 10 steps a second, has 120 steps, .* 100"),
        ({"array": noise(3), "sampling_rate": 0}, "`sampling_rate` above 0 .* got 0"),
        ({"array": noise(3), "sampling_rate": float("nan")}, "above 0 .* got nan"),
        ({"array": noise(3), "sampling_rate": "fast"}, "above 0 .* got 'fast'"),
        ({"values": [[1, 2]]}, "got the keys values"),
        ({"array": [[1, 2]], "hz": 5}, "got the keys array, hz"),
        ({}, "got the keys none"),
        (b"no array", "the bytes given has no lines of numbers; expected .npy, CSV"),
        (npy(noise(3))[:-9], "the bytes given is not a .npy file of numbers"),
        (
            npy(noise(3)).replace(b"(3, 2), }" + b" " * 12, b"(3000000000000, 2), }"),
            "is not a .npy",
        ),
    ],
)
def test_a_bad_series_is_refused_with_a_sentence(source: Any, sentence: str) -> None:
    modality = TimeseriesModality(channels=2, rate=10.0, max_steps=100)
    with pytest.raises(MediaError, match=sentence) as caught:
        modality.load(source, Fetch())
    assert caught.value.kind == "undecodable"


def test_pickles_and_archives_of_arrays_are_refused_and_named(tmp_path: Path) -> None:
    np.save(tmp_path / "pickle.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "several.npz", a=noise(3), b=noise(3))
    with pytest.raises(MediaError, match=r"pickle.npy is not a .npy file of numbers"):
        SCRATCH.load(str(tmp_path / "pickle.npy"), Fetch())
    with pytest.raises(MediaError, match=r"several.npz holds several arrays"):
        SCRATCH.load(str(tmp_path / "several.npz"), Fetch())
    with pytest.raises(MediaError, match="no file at") as caught:
        SCRATCH.load(str(tmp_path / "nowhere.npy"), Fetch())
    assert caught.value.kind == "missing_file"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"channels": 0}, "greater than 0"),
        ({"hidden_size": 30}, "multiple of `num_heads`, 30 is not one of 4"),
        ({"hidden_size": 3, "num_heads": 3}, "must be even"),
        ({"encoder": "some/encoder", "patch_length": 8}, "`patch_length` is for a series without"),
        ({"rate": 0}, "greater than 0"),
    ],
)
def test_a_recipe_that_cannot_be_says_why(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        validate_fields(TimeseriesModality, {"channels": 2, **fields}, where="the recipe")


def test_an_encoder_of_other_channels_or_without_patches_is_refused(
    encoders: dict[str, str], parts: Path
) -> None:
    three = TimeseriesModality(channels=3, encoder=encoders["patchtst"])
    with pytest.raises(RecipeError, match="reads 2 channels, the recipe says `channels: 3`"):
        three.prepare(noise(4, channels=3))
    wrong = TimeseriesModality(channels=3, encoder=str(parts / "clip"))
    with pytest.raises(RecipeError, match="CLIPConfig without `context_length`"):
        wrong.build_encoder()


def test_fields_come_back_from_json_and_pickling_loads_nothing(tmp_path: Path) -> None:
    for modality in (SCRATCH, TimeseriesModality(channels=3, encoder=str(tmp_path / "not there"))):
        assert TimeseriesModality.model_validate(modality.model_dump(mode="json")) == modality
        assert pickle.loads(pickle.dumps(modality)) == modality  # noqa: S301


def test_the_example_of_the_kit_is_read(tmp_path: Path) -> None:
    fields, sources = timeseries_example(tmp_path)
    modality = TimeseriesModality.model_validate(fields)
    assert [prepared(modality, source).num_features for source in sources] == [7, 2, 1]
