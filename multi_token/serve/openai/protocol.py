"""The request: OpenAI's fields with bounds on every number; what is not supported is refused.

Border: shapes and bounds of JSON; what a content part stands for is parts.py's to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from multi_token.registry import did_you_mean
from multi_token.serve.errors import ServeError

Model = TypeVar("Model", bound=BaseModel)
Role = Literal["system", "developer", "user", "assistant"]
"""Who may speak in a request; `developer` is OpenAI's newer word for `system`."""
MAX_INT = 2**63 - 1


class _StrictModel(BaseModel):
    """JSON as it stands: no "1" for 1, no unknown keys, no infinities."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class TextPart(_StrictModel):
    """Text, which stays text whatever it spells."""

    type: Literal["text"]
    text: str


class UrlField(_StrictModel):
    """A `data:` address, or one of the web where the server allows its host."""

    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] | None = None
    """Has no effect."""


class ImageUrlPart(_StrictModel):
    """A picture."""

    type: Literal["image_url"]
    image_url: UrlField | str


class AudioUrlPart(_StrictModel):
    """A sound or a voice."""

    type: Literal["audio_url"]
    audio_url: UrlField | str


class VideoUrlPart(_StrictModel):
    """A film."""

    type: Literal["video_url"]
    video_url: UrlField | str


class InputAudioField(_StrictModel):
    """A sound as base64."""

    data: str
    format: str = Field(max_length=16)


class InputAudioPart(_StrictModel):
    """A sound or a voice, as OpenAI has it."""

    type: Literal["input_audio"]
    input_audio: InputAudioField


class FileField(_StrictModel):
    """A file as base64 or a `data:` address."""

    file_data: str
    filename: str | None = Field(None, max_length=256)


class FilePart(_StrictModel):
    """A document; or a picture, sound or film, if its `data:` address or name says so."""

    type: Literal["file"]
    file: FileField


class MediaPart(_StrictModel):
    """An item of any sense, by the name that the run has for it: exactly one of data and url."""

    type: Literal["media"]
    modality: str
    data: str | list[Any] | None = None
    """base64, or a list of numbers; with `format: text` the text itself."""
    url: str | None = None
    format: str | None = Field(None, max_length=16)


CONTENT_PART_MODELS: Mapping[str, type[BaseModel]] = {
    "text": TextPart,
    "image_url": ImageUrlPart,
    "input_audio": InputAudioPart,
    "audio_url": AudioUrlPart,
    "video_url": VideoUrlPart,
    "file": FilePart,
    "media": MediaPart,
}
"""Type of a content part -> its fields. Beside them there is `<name>_url` for each sense."""


class ChatMessage(_StrictModel):
    """One turn. `content`: a text, or content parts."""

    role: Role
    content: (
        Annotated[str, Field(title="Text")]
        | list[Annotated[dict[str, Any], Field(title="Part")]]
        | None
    ) = None


class StreamOptions(_StrictModel):
    """What a stream tells beside the answer."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class ResponseFormat(_StrictModel):
    """Only text."""

    type: Literal["text"]


_Stop = Annotated[str, Field(min_length=1, max_length=256)]


class ChatRequest(_StrictModel):
    """The body of `POST /v1/chat/completions`."""

    model: str | None = Field(None, max_length=256)
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    temperature: float | None = Field(None, ge=0, le=2)
    """Default: 0, the likeliest answer; 1 if `top_p`, `top_k` or `n` ask for more than one."""
    top_p: float | None = Field(None, ge=0, le=1)
    """0: the likeliest token alone, as OpenAI has it; many tasks of lmms-eval send that."""
    top_k: int | None = Field(None, ge=-1, le=2**31)
    """0 and -1: all."""
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=0, le=MAX_INT)
    n: int | None = Field(None, ge=1, le=8)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    ignore_eos: bool | None = None
    user: str | None = Field(None, max_length=512)


NEUTRAL_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "best_of": (1,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (False, True),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "chat_template": (),
    "documents": (),
    "continuous_usage_stats": (False,),
}
"""Fields that are not supported -> values (beside null) that ask for nothing: those may be sent."""

IGNORED_FIELDS = frozenset(
    {
        "media_io_kwargs",
        "mm_processor_kwargs",
        "chat_template_kwargs",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)
"""Fields that clients send by habit: they have no effect, and a header of the answer says so."""

_IGNORED_MESSAGE_FIELDS = frozenset({"name"})
_NULL_MESSAGE_FIELDS = frozenset(
    {"refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content"}
)
"""Fields of an answer that clients send back as they got it: accepted while they are empty."""


def parse_json(body: bytes, *, max_values: int) -> Any:
    """Bytes -> JSON, with bounds on its values and its depth (200, the parser's own).

    Raises ServeError. Brackets and commas are counted first: `[],[],[]` takes 25 times its bytes in
    memory. base64 has neither.
    """
    num_values = body.count(b",") + body.count(b"[") + body.count(b"{")
    if num_values > max_values:
        raise ServeError(
            f"the body has {num_values} brackets and commas, and the limit is {max_values}; send "
            "long lists of numbers as base64 of a .npy file",
            status=413,
            code="too_many_values",
        )
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ServeError(f"the body is not JSON: {error}", code="invalid_json") from None


def parse_chat(fields: Any) -> tuple[ChatRequest, tuple[str, ...]]:
    """JSON -> the request, and which of its fields have no effect. Raises ServeError (400)."""
    if not isinstance(fields, dict):
        raise ServeError("the body should be a JSON object with `messages`", code="invalid_type")
    ignored = []
    kept = {}
    for name, value in fields.items():
        if name in ChatRequest.model_fields:
            kept[name] = value
        elif name in IGNORED_FIELDS:
            ignored.append(name)
        elif name in NEUTRAL_FIELDS:
            if value is not None and not any(_is_neutral(value, n) for n in NEUTRAL_FIELDS[name]):
                raise _unsupported_error(name, NEUTRAL_FIELDS[name])
        else:
            raise unknown_field_error(name, ChatRequest.model_fields, where=name)
    if isinstance(kept.get("messages"), list):
        kept["messages"] = [
            _strip_message(message, i, ignored) for i, message in enumerate(kept["messages"])
        ]
    if isinstance(kept.get("response_format"), dict):
        kind = kept["response_format"].get("type")
        if isinstance(kind, str) and kind != "text":
            raise ServeError(
                f"response_format {kind} is not supported; answers are text",
                param="response_format",
                code="unsupported_parameter",
            )
    request = validate(ChatRequest, kept)
    if request.stream_options is not None and not request.stream:
        raise ServeError(
            "stream_options is for stream: true", param="stream_options", code="invalid_value"
        )
    if request.top_logprobs is not None and not request.logprobs:
        raise ServeError(
            "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value"
        )
    both = (request.max_tokens, request.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise ServeError(
            "max_tokens and max_completion_tokens say the same: give one of them",
            param="max_tokens",
            code="invalid_value",
        )
    return request, tuple(dict.fromkeys(ignored))


def validate(cls: type[Model], fields: Any, *, where: str = "") -> Model:
    """`cls` from JSON. Raises ServeError (400) that names the field and what is wrong with it."""
    try:
        return cls.model_validate(fields)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
    # of a union each branch complains: the one that the value was meant for says more
    fault = min(faults, key=lambda f: f["type"] in ("string_type", "list_type", "model_type"))
    loc = [str(part) for part in fault["loc"] if not _is_union_branch(part)]
    param = ".".join([*([where] if where else []), *loc])
    if fault["type"] == "extra_forbidden":
        raise unknown_field_error(loc[-1], _model_at(cls, loc[:-1]).model_fields, where=param)
    if fault["type"] == "missing":
        message = f"{param} is missing"
    else:
        message = f"{param}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"
    raise ServeError(message, param=param, code="invalid_value")


def unknown_field_error(name: str, known: Iterable[str], *, where: str) -> ServeError:
    """400 that names the nearest field that there is."""
    near = did_you_mean(name, known) or f"; there are {', '.join(known)}"
    return ServeError(f"unknown field {where[:80]!r}{near}", param=where, code="unknown_field")


def _unsupported_error(name: str, neutral: tuple[Any, ...]) -> ServeError:
    values = [repr(value) for value in neutral if value is not None]
    return ServeError(
        f"{name} is not supported" + (f" (only {' or '.join(values)})" if values else ""),
        param=name,
        code="unsupported_parameter",
    )


def _is_neutral(value: Any, neutral: Any) -> bool:
    if isinstance(value, bool) or isinstance(neutral, bool):
        return value is neutral
    return bool(value == neutral)


def _strip_message(message: Any, index: int, ignored: list[str]) -> Any:
    """A message without what has no effect in it."""
    if not isinstance(message, dict):
        return message
    where = f"messages.{index}"
    role = message.get("role")
    if role in ("tool", "function"):
        raise ServeError(
            f"{where}.role: tools are not supported, so nobody speaks as {role}",
            param=f"{where}.role",
            code="unsupported_value",
        )
    kept = {}
    for name, value in message.items():
        if name in _IGNORED_MESSAGE_FIELDS:
            ignored.append(f"messages.{name}")
        elif name in _NULL_MESSAGE_FIELDS:
            if value not in (None, [], ""):
                raise ServeError(
                    f"{where}.{name} is not supported",
                    param=f"{where}.{name}",
                    code="unsupported_parameter",
                )
        else:
            kept[name] = value
    return kept


def _is_union_branch(part: str | int) -> bool:
    """Whether a step of a pydantic location names the branch of a union, not a field."""
    return isinstance(part, str) and (
        part in ("str", "constrained-str") or "[" in part or part in _MODELS
    )


_MODELS = {cls.__name__ for cls in _StrictModel.__subclasses__()}


def _model_at(cls: type[BaseModel], loc: list[str]) -> type[BaseModel]:
    """The model that a location leads to, through lists and unions."""
    for part in loc:
        field = cls.model_fields.get(part)
        if field is not None:
            inner = [
                m for m in _StrictModel.__subclasses__() if m.__name__ in str(field.annotation)
            ]
            cls = inner[0] if inner else cls
    return cls
