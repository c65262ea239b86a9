"""Content parts in the spellings of OpenAI, Hugging Face and this library -> modality and source.

Rows and Python use `media_part`; the server, which checks each field first, uses `openai_item`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

from multi_token.media.sniff import FILE_KINDS
from multi_token.modalities.base import Modality, OpenAIKind

OPENAI_PARTS: Mapping[str, OpenAIKind | None] = {
    "image_url": "image",
    "audio_url": "audio",
    "input_audio": "audio",
    "video_url": "video",
    "file": None,
}
"""OpenAI's part types, each with a field of the same name -> kind; a `file` says its own."""
_BASE64 = "data:application/octet-stream;base64,"
_KIND_OF_SUFFIX: Mapping[str, OpenAIKind] = {
    # The last kind wins: `.webm` is listed for audio too, and is usually a video.
    suffix: kind
    for kind in ("image", "audio", "video")
    for suffix in FILE_KINDS[kind].suffixes
}


class OpenAIItem(NamedTuple):
    """Item of one of OpenAI's parts; an `input_audio` or a `file` may be plain base64."""

    address: str
    kind: OpenAIKind
    may_be_base64: bool


def openai_item(part: Mapping[str, Any]) -> OpenAIItem | None:
    """Return the item of one of OpenAI's parts; None if its field has no address."""
    type = part["type"]
    field, kind = part.get(type), OPENAI_PARTS[type]
    if isinstance(field, Mapping):
        key = {"input_audio": "data", "file": "file_data"}.get(type, "url")
        address = field.get(key)
        kind = kind or _file_kind(str(address), field.get("filename"))
    else:
        address = field if kind is not None and type != "input_audio" else None
    if not isinstance(address, str) or kind is None:
        return None
    return OpenAIItem(address, kind, type in ("input_audio", "file"))


def _file_kind(data: str, filename: Any) -> OpenAIKind:
    """Kind of a file: by the type of its `data:` URL, else by its name, else a document."""
    if data[:5].lower() == "data:":
        kind = data[5:64].partition("/")[0].lower()
        if kind in get_args(OpenAIKind):
            return cast(OpenAIKind, kind)
    return _KIND_OF_SUFFIX.get(Path(filename or "").suffix.lower(), "document")


def modalities_of_kind(kind: OpenAIKind, modalities: Collection[str]) -> list[str]:
    """Return the names of the modalities that take a kind; of names alone, the kind itself."""
    if not isinstance(modalities, Mapping):
        return [kind] if kind in modalities else []
    known = cast(Mapping[str, Modality], modalities)
    fitting = [name for name, modality in known.items() if kind in modality.openai_kinds]
    # an instance that has the kind for its name is meant by it
    return [kind] if kind in fitting else fitting


class MediaPart(NamedTuple):
    """Media part of a row: its modality, and its source, or None to fill it from the row."""

    modality: str
    source: Any


def media_part(part: Mapping[str, Any], modalities: Collection[str]) -> MediaPart:
    """Read a media part of a row.

    | part                                                   | read as                            |
    |--------------------------------------------------------|------------------------------------|
    | `{"type": NAME}`                                       | the row's next item of NAME        |
    | `{"type": NAME, SOURCE: ...}`                          | ours; NAME is a modality           |
    | `{"type": "image", SOURCE: ...}`                       | Hugging Face's; also `audio`,      |
    |                                                        | `video`, `document`                |
    | `{"type": "image_url", "image_url": {"url": ...}}`     | OpenAI's; also `audio_url`,        |
    |                                                        | `video_url`, `input_audio`, `file` |
    | `{"type": "NAME_url", "NAME_url": {"url": ...}}`       | the server's                       |
    | `{"type": "media", "modality": NAME, "data": ...}`     | the server's; also `url`           |

    SOURCE is one of `NAME`, `source`, `url`, `path` and `base64`. Raises ValueError: the sentence
    says what is wrong with the part, LookupError for an unknown type.
    """
    type: str = part["type"]
    own = type.removesuffix("_url")
    if type in modalities:
        return MediaPart(type, _source_of(part, type))
    if own != type and own in modalities:
        field = part.get(type)
        url = field.get("url") if isinstance(field, Mapping) else field
        return MediaPart(own, _given(url, f"`{type}`"))
    if type == "media":
        name = part.get("modality")
        if not isinstance(name, str) or name not in modalities:
            raise ValueError(f"has the unknown modality {name!r}")
        if part.get("data") is not None:
            data = part["data"]
            return MediaPart(name, _BASE64 + data if isinstance(data, str) else data)
        return MediaPart(name, _given(part.get("url"), "`data` or `url`"))
    if type in OPENAI_PARTS:
        item = openai_item(part)
        if item is None:
            raise ValueError(f"has no address under `{type}`")
        plain = item.may_be_base64 and "://" not in item.address[:16]
        plain = plain and item.address[:5].lower() != "data:"
        source = _BASE64 + item.address if plain else item.address
        return MediaPart(_modality_for(item.kind, modalities), source)
    if type in get_args(OpenAIKind) and modalities_of_kind(cast(OpenAIKind, type), modalities):
        return MediaPart(_modality_for(cast(OpenAIKind, type), modalities), _source_of(part, type))
    raise LookupError(type)


def _modality_for(kind: OpenAIKind, modalities: Collection[str]) -> str:
    fitting = modalities_of_kind(kind, modalities)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(
            f"is a part for {kind}, which {', '.join(fitting)} take; write the name of one as its "
            "`type`"
        )
    raise ValueError(
        f"is a part for {kind}, which no modality of this recipe takes (it has "
        f"{', '.join(sorted(modalities))})"
    )


def _source_of(part: Mapping[str, Any], type: str) -> Any:
    given = [k for k in (type, "source", "url", "path", "base64") if part.get(k) is not None]
    if len(given) > 1:
        raise ValueError(f"has both `{given[0]}` and `{given[1]}`; leave one of them out")
    if not given:
        return None
    source = part[given[0]]
    return _BASE64 + source if given[0] == "base64" and isinstance(source, str) else source


def _given(value: Any, where: str) -> Any:
    if value is None:
        raise ValueError(f"has nothing under {where}")
    return value


def media_source(item: Any) -> Any:
    """Return an item of a row as `Media.source`; None for an empty one.

    | item                                       | source                                         |
    |--------------------------------------------|------------------------------------------------|
    | `{"bytes", "path"}` of `datasets`          | the bytes, or else the path                    |
    | `{"url", "start_time", "end_time"}`        | `{"path", "start", "end"}`                     |

    The last one is a source of the original multi_token.
    """
    if not isinstance(item, Mapping) or not item:
        return item
    keys = set(item)
    if keys <= {"bytes", "path"}:
        # bytes first: the path is one on the machine that wrote the table
        data = item.get("bytes")
        return data if data is not None else item.get("path")
    if "url" in keys and keys <= {"url", "start_time", "end_time"}:
        times = {"start": item.get("start_time"), "end": item.get("end_time")}
        times = {key: time for key, time in times.items() if time is not None}
        return {"path": item["url"], **times} if times else item["url"]
    return item
