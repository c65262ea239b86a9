"""Series of numbers: channels over time, of any length and rate (ECG, IMU, motion capture)."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from multi_token.errors import RecipeError
from multi_token.hub import hub_arguments, limited_hub_waits
from multi_token.media.examples import example_tables
from multi_token.media.fetch import Fetch
from multi_token.media.series import Series, SeriesSpec, count_steps, read_series
from multi_token.media.sniff import FILE_KINDS, FileKind
from multi_token.modalities.base import Encoder, Modality, load_auto
from multi_token.modalities.parts import collate_parts, gather_features, run_in_micro_batches
from multi_token.types import Fact, Features, Prepared

MergeKind = Literal["join", "mean"]
_OWN_FIELDS = ("patch_length", "hidden_size", "num_layers", "num_heads")


class PatchEncoder(Encoder):
    """A small transformer over patches of all channels, with random weights at first.

    Patches as in PatchTST (arXiv:2211.14730), but with all channels in one patch. Positions are
    sinusoids (arXiv:1706.03762), which bound no length.
    """

    pretrained: ClassVar[bool] = False

    def __init__(self, modality: TimeseriesModality) -> None:
        super().__init__()
        width = self.dim = modality.hidden_size
        self.modality = modality
        self.patch = nn.Linear(modality.channels * modality.patch_length, width)
        self.level = nn.Linear(2 * modality.channels, width)
        options: Any = {"dropout": 0.0, "activation": "gelu", "norm_first": True}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, modality.num_heads, 4 * width, batch_first=True, **options
            )
            for _ in range(modality.num_layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, **inputs: Tensor) -> Features:
        """Encode a batch of series: `patches` [items, length, patch_length * channels], `level`
        [items, 2 * channels] and `mask` [items, length].
        """
        values = run_in_micro_batches(self._values, inputs, self.modality.micro_batch)
        return Features(values, inputs["mask"].bool())

    def _values(self, patches: Tensor, level: Tensor, mask: Tensor) -> Tensor:
        """Features [items, length, dim]."""
        dtype = self.patch.weight.dtype
        hidden = self.patch(patches.to(dtype)) + self.level(level.to(dtype))[:, None]
        # Computed and not stored, so a longer series needs no new weights.
        hidden = hidden + positions(hidden.shape[1], self.dim).to(hidden)
        for block in self.blocks:
            # The mask keeps an item independent of the padding that its batch needs.
            hidden = block(hidden, src_key_padding_mask=~mask.bool())
        return self.norm(hidden)


class WindowEncoder(Encoder):
    """A time series model of transformers, over windows of its input length."""

    def __init__(self, tower: Any, shape: WindowShape, modality: TimeseriesModality) -> None:
        super().__init__()
        self.tower = tower
        self.shape = shape
        self.modality = modality
        width = getattr(tower.config, "d_model", None) or tower.config.hidden_size
        self.dim = width * (modality.channels if modality.merge_channels == "join" else 1)
        self._takes = frozenset(inspect.signature(type(tower).forward).parameters)

    def forward(self, **inputs: Tensor) -> Features:
        """Encode the windows of all items: `past_values` and `observed` [windows, context,
        channels]; `part` (a window) and `feature` (a patch in it), int64 [items, length].
        """
        series, observed = inputs["past_values"], inputs["observed"]
        num_windows, context, channels = series.shape
        # Each channel becomes a row of its own: these models know one channel only.
        if self.shape.channels == 1:
            series, observed = (
                t.transpose(1, 2).reshape(num_windows * channels, context, 1)
                for t in (series, observed)
            )
        values = run_in_micro_batches(
            self._values, {"series": series, "observed": observed}, self.modality.micro_batch
        )  # [rows, channels in a row, patches, width]
        values = values.reshape(num_windows, channels, *values.shape[2:]).transpose(1, 2)
        values = values.flatten(2) if self.modality.merge_channels == "join" else values.mean(2)
        return gather_features(values, inputs["part"], inputs["feature"])

    def _values(self, series: Tensor, observed: Tensor) -> Tensor:
        """Features [rows, channels in a row, patches, width] of [rows, context, channels in a row].

        The forwards differ between families: TimesFM takes padding and frequencies, PatchTST and
        PatchTSMixer a mask, under two names.
        """
        series = series.to(next(self.tower.parameters()).dtype)
        if "past_values_padding" in self._takes:
            more = {}
            if "freq" in self._takes:  # TimesFM has three classes; 0 is for high frequencies
                more["freq"] = torch.zeros(len(series), 1, dtype=torch.long, device=series.device)
            padding = (~observed.bool())[..., 0].long()
            output = self.tower(past_values=series[..., 0], past_values_padding=padding, **more)
            return output.last_hidden_state[:, None]
        name = "past_observed_mask" if "past_observed_mask" in self._takes else "observed_mask"
        output = self.tower(past_values=series, **{name: observed.to(series.dtype)})
        # PatchTST can put a CLS token before the patches.
        return output.last_hidden_state[:, :, -self.shape.num_patches :]


class TimeseriesModality(Modality):
    """Numbers over time, `[time]` or `[time, channels]`, as one item: one feature per patch.

    The features are [patches, dim]. Without `encoder` a small transformer is trained together with
    the projector, on series scaled as in RevIN (Kim et al., ICLR 2022).
    """

    kit_example: ClassVar[str] = "multi_token.testing.examples:timeseries_example"
    fact_names: ClassVar[Mapping[str, str]] = {
        "mean": "mean of the channel, before it is normalized",
        "sd": "standard deviation of the channel",
        "min": "smallest value of the channel",
        "max": "largest value of the channel",
        "channel": "number of the channel, from 1",
        "name": "name of the channel, by `channel_names` or the file",
        "unit": "unit of its values, by `unit` or the file",
        "steps": "steps that are encoded, at `rate`",
        "rate": "steps per second, by `rate` or the source",
        "seconds": "length of the series, where its rate is known",
    }

    type: Literal["timeseries"] = "timeseries"  # type: ignore[reportIncompatibleVariableOverride]
    channels: PositiveInt
    """Numbers at each step. A series of another width is refused. Default: the number of
    `channel_names`."""
    channel_names: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Channels to take of a file that names its channels (CSV, Parquet, EDF, BDF, WFDB), in this
    order. Default: all of them."""
    rate: PositiveFloat | None = None
    """Steps per second. A source with a rate of its own is resampled to this rate, with an
    anti-alias filter where it falls; a source without one is used unchanged."""
    unit: str | None = None
    """Unit of the values, such as `mV`. A file in another one of the same kind (`uV`) is scaled; a
    source that names no unit is used unchanged."""
    max_steps: PositiveInt = 65_536
    """Largest number of steps, as given or at `rate`. A longer series is refused."""
    encoder: str | None = None
    """Hub name or folder of a time series model of transformers that reads patches (PatchTST,
    PatchTSMixer, TimesFM). Default: a small encoder that is trained together with the projector."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    merge_channels: MergeKind = "join"
    """With an `encoder` that reads each channel by itself: `join` concatenates the channels'
    features, `mean` averages them (narrower, but channels can no longer be distinguished)."""
    micro_batch: PositiveInt = 32
    """Series, or windows and their channels, that go through the encoder at once."""
    patch_length: PositiveInt = 16
    """Without `encoder`: steps per feature."""
    hidden_size: PositiveInt = 128
    """Without `encoder`: width of a feature."""
    num_layers: int = Field(default=3, ge=0)
    """Without `encoder`: transformer layers over the patches."""
    num_heads: PositiveInt = 4
    """Without `encoder`: attention heads of each layer."""

    @model_validator(mode="before")
    @classmethod
    def _count_names(cls, fields: Any) -> Any:
        names = fields.get("channel_names") if isinstance(fields, Mapping) else None
        if isinstance(names, (list, tuple)):
            return {"channels": len(names), **fields}
        return fields

    @model_validator(mode="after")
    def _check_names(self) -> TimeseriesModality:
        names = self.channel_names
        if names is not None and (len(names) != self.channels or len(set(names)) != len(names)):
            raise ValueError(
                f"`channel_names` has {len(set(names))} different names, and `channels` is "
                f"{self.channels}; leave `channels` out"
            )
        return self

    @model_validator(mode="after")
    def _check_encoder(self) -> TimeseriesModality:
        fields = type(self).model_fields
        if self.encoder is not None:
            # By value and not by `model_fields_set`, since a checkpoint sets every field.
            set_ones = [n for n in _OWN_FIELDS if getattr(self, n) != fields[n].default]
            if set_ones:
                raise ValueError(f"`{set_ones[0]}` is for a series without `encoder`; remove it")
        # Even, because sinusoids come in pairs.
        elif self.hidden_size % self.num_heads or self.hidden_size % 2:
            raise ValueError(
                f"`hidden_size` must be even and a multiple of `num_heads`, {self.hidden_size} is "
                f"not one of {self.num_heads}"
            )
        return self

    @property
    def _spec(self) -> SeriesSpec:
        return SeriesSpec(self.channels, self.max_steps, self.rate, self.channel_names, self.unit)

    def load(self, source: Any, fetch: Fetch) -> Series:
        """Return the series, float32 [time, channels].

        Args:
            source: List, array, tensor or file (`.npy`, CSV, Parquet, EDF, BDF, WAV, FLAC, WFDB);
                or a mapping with one of them under `array`, `path` or `bytes`, and `sampling_rate`
                in steps per second, `start` and `end` in seconds.
            fetch: Reader of paths and URLs.

        Raises:
            MediaError: The source is no series of such channels, holds NaN or inf, or is over a
                limit.
        """
        return read_series(source, fetch, self._spec)

    def size_from_header(self, source: Any, fetch: Fetch) -> int | None:
        """Return the number of steps at `rate`; numbers in the row are read."""
        return count_steps(source, fetch, self._spec)

    def content(self, source: Any, fetch: Fetch) -> bytes:
        """Return the series as bytes; the key of cached features."""
        # Not the bytes of a file: a row may name a minute of a recording of gigabytes.
        series = self.load(source, fetch)
        # two files may differ in facts alone
        facts = (series.names, series.units, series.rate) if self.facts is not None else ""
        return f"{series.shape}{facts}".encode() + series.tobytes()

    def count_features(self, size: int) -> int:
        """Return the number of patches of a series of `size` steps.

        With `encoder`, the last window overlaps the one before; only its new patches count.
        """
        if self.encoder is None:
            return math.ceil(size / self.patch_length)
        shape = self._window_shape()
        num_full, rest = divmod(size, shape.context)
        return num_full * shape.num_patches + shape.num_new_patches(rest)

    def prepare(self, raw: np.ndarray) -> Prepared:
        """Cut a series [time, channels] into patches, or into windows of the encoder.

        Returns:
            Without `encoder`: `patches` [length, patch_length * channels], `level` [2 * channels],
            `mask` [length]. With: `past_values`, `observed` [windows, context, channels], `part`,
            `feature` int64 [length].

        Raises:
            RecipeError: The encoder cannot read series of `channels`.
        """
        if self.encoder is not None:
            return self._prepare_windows(raw)
        values, level = normalized(np.asarray(raw))
        num_patches = self.count_features(len(values))
        padded = np.pad(values, ((0, num_patches * self.patch_length - len(values)), (0, 0)))
        inputs = {
            "patches": torch.from_numpy(padded.reshape(num_patches, -1)),
            "level": torch.from_numpy(level),
            "mask": torch.ones(num_patches, dtype=torch.bool),
        }
        return Prepared(inputs, num_patches, self._facts(raw))

    def _facts(self, raw: np.ndarray) -> tuple[Fact, ...]:
        """Facts of each channel, all before the first feature."""
        values = np.asarray(raw, dtype=np.float64)
        source = raw if isinstance(raw, Series) else np.asarray(raw).view(Series)
        names, units = source.names or self.channel_names, source.units or self.unit
        steps, rate = len(raw), source.rate or self.rate
        shared = {"steps": steps, "rate": rate, "seconds": None if rate is None else steps / rate}
        columns = {"mean": values.mean(0), "sd": values.std(0)}
        columns |= {"min": values.min(0), "max": values.max(0)}
        return tuple(
            Fact(
                {
                    **{name: float(numbers[i]) for name, numbers in columns.items()},
                    "channel": i + 1,
                    "name": names[i] if names else None,
                    "unit": units if units is None or isinstance(units, str) else units[i],
                    **shared,
                }
            )
            for i in range(self.channels)
        )

    def _prepare_windows(self, raw: np.ndarray) -> Prepared:
        """Consecutive windows. The last one ends with the series; only its new patches count."""
        shape, facts = self._window_shape(), self._facts(raw)
        raw = np.asarray(raw)
        num_full, rest = divmod(len(raw), shape.context)
        windows = [raw[i * shape.context : (i + 1) * shape.context] for i in range(num_full)]
        observed = [np.ones(window.shape, dtype=bool) for window in windows]
        num_patches = [shape.num_patches] * num_full
        if rest:
            # The window reaches back over steps that were seen before: a model trained on full
            # windows reads a padded one worse. A series shorter than a window has to be padded.
            last = raw[-shape.context :]
            missing = shape.context - len(last)
            # Models that scale by the observed steps alone see the mean as zeros.
            fill = np.broadcast_to(last.mean(0), (missing, self.channels))
            windows.append(np.concatenate([fill, last]))
            observed.append(np.arange(shape.context)[:, None].repeat(self.channels, 1) >= missing)
            num_patches.append(shape.num_new_patches(rest))
        inputs = {
            "past_values": torch.from_numpy(np.stack(windows)),
            "observed": torch.from_numpy(np.stack(observed)),
            "part": torch.arange(len(windows)).repeat_interleave(torch.tensor(num_patches)),
            "feature": torch.cat([torch.arange(shape.num_patches)[-n:] for n in num_patches]),
        }
        return Prepared(inputs, self.count_features(len(raw)), facts)

    def _window_shape(self) -> WindowShape:
        assert self.encoder is not None
        shape = window_shape(self.encoder, self.revision)
        if shape.channels not in (1, self.channels):
            raise RecipeError(
                f"{self.encoder} reads {shape.channels} channels, the recipe says "
                f"`channels: {self.channels}`; an encoder of one channel reads any number of them"
            )
        return shape

    def example_sources(self) -> Sequence[Any]:
        """Return one series of 64 steps, and the same as a table and as a Parquet file."""
        series = np.arange(64.0)[:, None].repeat(self.channels, 1)
        return [series.tolist(), *example_tables(series, self.channel_names)]

    def usual_columns(self) -> Sequence[tuple[str, ...]]:
        """Return names of columns of numbers."""
        return [
            ("signal", "signals", "series", "timeseries", "time_series", "ecg", "eeg", "waveform")
        ]

    def file_kinds(self) -> Sequence[FileKind]:
        """Return files of numbers, and recordings."""
        return [FILE_KINDS["series"], FILE_KINDS["recording"]]

    def collate(self, items: Sequence[Prepared]) -> dict[str, Tensor]:
        """Join items into one batch; with `encoder`, all windows are encoded together."""
        return super().collate(items) if self.encoder is None else collate_parts(items)

    def build_encoder(self) -> Encoder:
        """Return the small encoder with random weights, or the model of `encoder`."""
        if self.encoder is None:
            return PatchEncoder(self).eval()
        from transformers import AutoConfig, AutoModel

        shape = self._window_shape()
        config = AutoConfig.from_pretrained(self.encoder, revision=self.revision, **hub_arguments())
        if getattr(config, "do_mask_input", False):
            # Pretraining masks patches at random, in eval mode too.
            config.do_mask_input = False
        with limited_hub_waits(self.encoder):
            tower = AutoModel.from_pretrained(
                self.encoder,
                revision=self.revision,
                config=config,
                dtype=torch.float32,
                **hub_arguments(of_weights=True),
            )
        return WindowEncoder(tower, shape, self).eval()


class WindowShape(NamedTuple):
    """Input window of a time series model, in steps, and its patches."""

    context: int
    num_patches: int
    stride: int
    channels: int

    def num_new_patches(self, rest: int) -> int:
        """Return the patches of the last window with new steps, if `rest` steps are left."""
        return min(self.num_patches, math.ceil(rest / self.stride))


@functools.lru_cache(maxsize=8)
def window_shape(encoder: str, revision: str | None) -> WindowShape:
    """Return the window that the configuration declares. Raises RecipeError without patches."""
    config = load_auto("AutoConfig", encoder, revision)
    context, patch = (getattr(config, n, None) for n in ("context_length", "patch_length"))
    if not context or not patch:
        raise RecipeError(
            f"{encoder} has a {type(config).__name__} without `context_length` and "
            "`patch_length`; expected a time series model that reads patches (PatchTST, "
            "PatchTSMixer, TimesFM)"
        )
    stride = getattr(config, "patch_stride", patch)
    channels = getattr(config, "num_input_channels", 1)
    return WindowShape(context, (context - patch) // stride + 1, stride, channels)


def normalized(series: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a series [time, channels] scaled to mean 0 and deviation 1, and its level.

    Instance normalization as in RevIN (Kim et al., ICLR 2022). The level [2 * channels] keeps the
    removed part as asinh(mean / deviation) and log(deviation). A constant channel becomes zeros,
    with deviation 1.
    """
    # In float64: the deviation of a long series with a large mean is lost in float32.
    values = series.astype(np.float64)
    mean, deviation = values.mean(0), values.std(0)
    # The bound is relative: a microvolt is a signal as a volt is, and a rounding error is not.
    moves = deviation > 1e-6 * np.abs(values).max(0)
    deviation = np.where(moves, deviation, 1.0)
    scaled = np.where(moves, (values - mean) / deviation, 0.0)
    # asinh and log bring values of any unit near 1.
    level = np.concatenate([np.arcsinh(mean / deviation), np.log(deviation)])
    return scaled.astype(np.float32), level.astype(np.float32)


def positions(length: int, dim: int) -> Tensor:
    """Return sinusoids [length, dim] for an even dim (Vaswani et al., arXiv:1706.03762)."""
    frequency = torch.exp(torch.arange(0, dim, 2) * (-math.log(10_000.0) / dim))
    angle = torch.arange(length)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
