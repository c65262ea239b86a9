"""An English Whisper in CTranslate2's format becomes an ordinary transformers folder.

The format is that of `ctranslate2/specs/model_spec.py`: little-endian; a string is a 16-bit length,
its characters and a zero. A header comes first, then named arrays, then aliases.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from multi_token.errors import ConvertError

_HEADER = (6, "WhisperSpec", 3)
_DTYPES = ("float32", "int8", "int16", "int32", "float16")
_MAX_RANK = 8

_ENGLISH_VOCABULARY = 51_864
"""Vocabulary size of English-only models; multilingual ones have at least one token more."""
_START, _END, _NO_TIMESTAMPS, _PREVIOUS = 50_257, 50_256, 50_362, 50_360

_SETTINGS: dict[str, int] = {
    "decoder/activation": 3,  # GELU
    "decoder/alibi": 0,
    "decoder/pre_norm": 1,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
}
"""Config values of Whisper's network; another value would be another network."""
_UNUSED_VARIABLES = (
    "decoder/alignment_heads",
    "decoder/alignment_layer",
    "decoder/alibi_use_positive_positions",
    "decoder/scale_alibi",
)
"""Variables of word times, which are not converted, and of a bias that Whisper does not have."""
_TIED = {"decoder/projection/weight": "decoder/embeddings/weight"}


def convert(model_bin: Path, out: Path) -> None:
    """Write `model_bin`, with the json files beside it, to `out` as a transformers folder.

    The weights become float32 and keep their values to the bit. Raises ConvertError for a file that
    is cut off or damaged, is no English-only Whisper, is quantized to integers, or has an unknown
    variable.
    """
    source = _Variables(model_bin)
    config = _config(source)
    model = WhisperForConditionalGeneration(config)
    tensors = dict(_rename_weights(source, config))
    source.check_all_taken()
    for name, tensor in model.model.state_dict().items():
        found = tensors.get(name)
        if found is None or found.shape != tensor.shape:
            shape = None if found is None else tuple(found.shape)
            raise ConvertError(f"{model_bin}: {name} is {shape} instead of {tuple(tensor.shape)}")
    model.model.load_state_dict(tensors, strict=True)
    # The file has the embeddings once, as the alias of the output projection.
    model.tie_weights()
    model.generation_config = _generation_config(model_bin.with_name("config.json"))
    tokenizer = _tokenizer(model_bin.with_name("tokenizer.json"))
    model.eval().save_pretrained(out)
    # The format has no settings of the mel spectrogram: Whisper's are all defaults but its size.
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(out)
    tokenizer.save_pretrained(out)


class _Variables:
    """Named arrays of a file: each is taken once, and arrays left over are refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arrays, aliases = _read_variables(path)
        if aliases != _TIED:
            raise ConvertError(f"{path}: expected the aliases {_TIED}, found {aliases}")

    def take(self, name: str) -> np.ndarray[Any, Any]:
        if name not in self.arrays:
            raise ConvertError(f"{self.path} lacks the variable {name}")
        return self.arrays.pop(name)

    def weight(self, name: str) -> Tensor:
        array = self.take(name)
        if array.dtype.kind != "f":
            raise ConvertError(
                f"{self.path}: {name} is {array.dtype}, expected float32 or float16; convert the "
                "model to CTranslate2 without quantization to integers"
            )
        return torch.from_numpy(array.astype(np.float32))

    def setting(self, name: str) -> int:
        array = self.take(name)
        if array.shape != ():
            raise ConvertError(f"{self.path}: {name} has shape {array.shape}, expected one number")
        return int(array)

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        shape = self.arrays[name].shape if name in self.arrays else None
        if shape is None or len(shape) != rank:
            raise ConvertError(f"{self.path}: {name} has shape {shape}, expected {rank} sizes")
        return shape

    def num_layers(self, side: str) -> int:
        names = {name.split("/")[1] for name in self.arrays if name.startswith(f"{side}/layer_")}
        return len(names - {"layer_norm"})

    def check_all_taken(self) -> None:
        if self.arrays:
            raise ConvertError(
                f"{self.path} has variables that are not known: {', '.join(sorted(self.arrays))}"
            )


class _ByteReader:
    """Reads the bytes of a file in order, never past their end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.data = path.read_bytes()
        except OSError as error:
            raise ConvertError(f"{path} cannot be read: {error.strerror}") from None
        self.position = 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.position:
            raise ConvertError(
                f"{self.path} is cut off: it ends at byte {len(self.data)}, and {size} more are "
                f"announced at byte {self.position}"
            )
        self.position += size
        return self.data[self.position - size : self.position]

    def number(self, code: str) -> int:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        raw = self.take(self.number("H"))
        if not raw.endswith(b"\0") or not raw[:-1].isascii():
            raise ConvertError(f"{self.path} is damaged: expected a name, found {raw[:40]!r}")
        return raw[:-1].decode("ascii")


def _read_variables(path: Path) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    """Return the file's arrays by name, and its aliases."""
    source = _ByteReader(path)
    version = source.number("I")
    # Another version may have any layout after this number.
    header = (version, source.string(), source.number("I")) if version == _HEADER[0] else (version,)
    if header != _HEADER:
        raise ConvertError(
            f"{path}: expected (binary version, kind, revision) {_HEADER}, found {header}"
        )
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for _ in range(source.number("I")):
        name = source.string()
        if name in arrays:
            raise ConvertError(f"{path} is damaged: it has the variable {name} twice")
        arrays[name] = _array(source, name)
    aliases = {source.string(): source.string() for _ in range(source.number("I"))}
    if source.position != len(source.data):
        raise ConvertError(f"{path} is damaged: data at byte {source.position}, after its end")
    return arrays, aliases


def _array(source: _ByteReader, name: str) -> np.ndarray[Any, Any]:
    rank = source.number("B")
    if rank > _MAX_RANK:
        raise ConvertError(f"{source.path} is damaged: {name} has {rank} axes")
    shape = tuple(source.number("I") for _ in range(rank))
    code = source.number("B")
    if code >= len(_DTYPES):
        raise ConvertError(
            f"{source.path}: {name} has type number {code}, known are 0 to {len(_DTYPES) - 1} "
            f"({', '.join(_DTYPES)})"
        )
    dtype = np.dtype(_DTYPES[code]).newbyteorder("<")
    num_bytes = source.number("I")
    if num_bytes != math.prod(shape) * dtype.itemsize:
        raise ConvertError(
            f"{source.path} is damaged: {name} of shape {shape} in {dtype.name} has {num_bytes} "
            "bytes"
        )
    return np.frombuffer(source.take(num_bytes), dtype).reshape(shape)


def _config(source: _Variables) -> WhisperConfig:
    """Return the network's sizes from tensor shapes. Raises ConvertError unless it is Whisper's."""
    for name, expected in _SETTINGS.items():
        if (found := source.setting(name)) != expected:
            raise ConvertError(f"{source.path}: {name} is {found}, Whisper's is {expected}")
    # Taken out, so that `check_all_taken` does not refuse them.
    for name in _UNUSED_VARIABLES:
        source.arrays.pop(name, None)
    num_tokens, width = source.shape("decoder/embeddings/weight", 2)
    if num_tokens != _ENGLISH_VOCABULARY:
        raise ConvertError(
            f"{source.path} has {num_tokens} tokens, expected a Whisper of English alone, which "
            f"has {_ENGLISH_VOCABULARY}"
        )
    sizes: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sizes[f"{side}_layers"] = source.num_layers(side)
        sizes[f"{side}_attention_heads"] = source.setting(f"{side}/num_heads")
        sizes[f"{side}_ffn_dim"] = source.shape(f"{side}/layer_0/ffn/linear_0/weight", 2)[0]
    return WhisperConfig(
        vocab_size=num_tokens,
        d_model=width,
        **sizes,
        num_mel_bins=source.shape("encoder/conv1/weight", 3)[1],
        max_source_positions=source.shape("encoder/position_encodings/encodings", 2)[0],
        max_target_positions=source.shape("decoder/position_encodings/encodings", 2)[0],
        bos_token_id=_END,
        eos_token_id=_END,
        pad_token_id=_END,
        decoder_start_token_id=_START,
    )


def _generation_config(path: Path) -> GenerationConfig:
    """Return Whisper's suppressed tokens, and those that open a transcript without times."""
    keys = ("suppress_ids", "suppress_ids_begin", "alignment_heads")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        suppress, suppress_first, alignment_heads = (fields[key] for key in keys)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConvertError(f"expected {path} to hold {', '.join(keys)}: {error!r}") from None
    return GenerationConfig(
        bos_token_id=_END,
        eos_token_id=_END,
        pad_token_id=_END,
        decoder_start_token_id=_START,
        max_length=448,
        suppress_tokens=suppress,
        begin_suppress_tokens=suppress_first,
        alignment_heads=alignment_heads,
        is_multilingual=False,
        no_timestamps_token_id=_NO_TIMESTAMPS,
        prev_sot_token_id=_PREVIOUS,
        return_timestamps=False,
    )


def _tokenizer(path: Path) -> WhisperTokenizer:
    if not path.is_file():
        raise ConvertError(f"expected the model's tokenizer, found nothing at {path}")
    return WhisperTokenizer.from_pretrained(path.parent)


def _rename_weights(source: _Variables, config: WhisperConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight under its name in transformers' WhisperModel."""
    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            yield f"encoder.{conv}.{kind}", source.weight(f"encoder/{conv}/{kind}")
    yield "decoder.embed_tokens.weight", source.weight("decoder/embeddings/weight")
    num_layers = {"encoder": config.encoder_layers, "decoder": config.decoder_layers}
    for side in num_layers:
        positions = source.weight(f"{side}/position_encodings/encodings")
        yield f"{side}.embed_positions.weight", positions
        yield from _layer_norm(source, f"{side}.layer_norm", f"{side}/layer_norm")
        for i in range(num_layers[side]):
            new, old = f"{side}.layers.{i}", f"{side}/layer_{i}"
            yield from _attention(source, f"{new}.self_attn", f"{old}/self_attention", "qkv")
            if side == "decoder":
                yield from _attention(source, f"{new}.encoder_attn", f"{old}/attention", "q", "kv")
            yield from _layer_norm(source, f"{new}.final_layer_norm", f"{old}/ffn/layer_norm")
            for kind in ("weight", "bias"):
                yield f"{new}.fc1.{kind}", source.weight(f"{old}/ffn/linear_0/{kind}")
                yield f"{new}.fc2.{kind}", source.weight(f"{old}/ffn/linear_1/{kind}")


def _layer_norm(source: _Variables, new: str, old: str) -> Iterator[tuple[str, Tensor]]:
    yield f"{new}.weight", source.weight(f"{old}/gamma")
    yield f"{new}.bias", source.weight(f"{old}/beta")


def _attention(
    source: _Variables, new: str, old: str, *joined: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield the norm and projections; `joined`: groups of q, k and v that share one map each."""
    yield from _layer_norm(source, f"{new}_layer_norm", f"{old}/layer_norm")
    for i, letters in enumerate(joined):
        for kind in ("weight", "bias"):
            name = f"{old}/linear_{i}/{kind}"
            for letter, part in zip(
                letters, source.weight(name).tensor_split(len(letters)), strict=True
            ):
                # Whisper's keys have no bias; CTranslate2 joins q, k and v and writes zeros for it.
                if (letter, kind) != ("k", "bias"):
                    yield f"{new}.{letter}_proj.{kind}", part
                elif part.any():
                    raise ConvertError(f"{source.path}: the keys in {name} have a bias")
    for kind in ("weight", "bias"):
        yield f"{new}.out_proj.{kind}", source.weight(f"{old}/linear_{len(joined)}/{kind}")
