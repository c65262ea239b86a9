"""Request schema of OpenAI's chat completions; every number and text has bounds.

    bytes -> `parse_json` (bounded) -> `parse_chat` (checked) -> `request_params` -> SamplingParams

An unsupported field that would change the output is refused, never ignored. Fields without an
effect are accepted, and a response header lists them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from multi_token.registry import did_you_mean, fields_at
from multi_token.serve.engines.base import SamplingParams
from multi_token.serve.errors import ServeError
from multi_token.serve.settings import ServeSettings

Model = TypeVar("Model", bound=BaseModel)
Role = Literal["system", "developer", "user", "assistant"]
"""Roles of a message; `developer` is OpenAI's newer name of `system`."""
MAX_INT = 2**63 - 1


class _StrictModel(BaseModel):
    """Strict JSON: no "1" for 1, no unknown keys, no infinities."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class TextPart(_StrictModel):
    """Text. Special tokens in it are treated as plain letters."""

    type: Literal["text"]
    text: str


class UrlField(_StrictModel):
    """A `data:` URL, or an http(s) URL of a host that the server allows."""

    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] | None = None
    """Has no effect."""


class ImageUrlPart(_StrictModel):
    """An image."""

    type: Literal["image_url"]
    image_url: UrlField | str


class AudioUrlPart(_StrictModel):
    """Audio or speech."""

    type: Literal["audio_url"]
    audio_url: UrlField | str


class VideoUrlPart(_StrictModel):
    """A video."""

    type: Literal["video_url"]
    video_url: UrlField | str


class InputAudioField(_StrictModel):
    """Audio as base64."""

    data: str
    format: str = Field(max_length=16)


class InputAudioPart(_StrictModel):
    """Audio or speech in OpenAI's format."""

    type: Literal["input_audio"]
    input_audio: InputAudioField


class FileField(_StrictModel):
    """A file as base64 or as a `data:` URL."""

    file_data: str
    filename: str | None = Field(None, max_length=256)


class FilePart(_StrictModel):
    """A document, or an image, audio or video file if its `data:` URL or file name says so."""

    type: Literal["file"]
    file: FileField


class MediaPart(_StrictModel):
    """An item for the modality of this name in the run; give either data or url."""

    type: Literal["media"]
    modality: str
    data: str | list[Any] | None = None
    """base64, or a list of numbers, or with `format: text` the text itself."""
    url: str | None = None
    format: str | None = Field(None, max_length=16)
    options: dict[str, str | float] | None = Field(None, max_length=8)
    """Part of a file to take, as a row says it: `{"page": 3}` of a PDF, `{"start": 2, "end": 5}` in
    seconds, `{"record": "P12345"}` of a FASTA file, `{"row": 5}` of an array."""


CONTENT_PART_MODELS: Mapping[str, type[BaseModel]] = {
    "text": TextPart,
    "image_url": ImageUrlPart,
    "input_audio": InputAudioPart,
    "audio_url": AudioUrlPart,
    "video_url": VideoUrlPart,
    "file": FilePart,
    "media": MediaPart,
}
"""Type of a content part -> its fields. Each modality adds a part type `<name>_url`."""


class ChatMessage(_StrictModel):
    """One message. `content`: a text, or a list of content parts."""

    role: Role
    content: (
        Annotated[str, Field(title="Text")]
        | list[Annotated[dict[str, Any], Field(title="Part")]]
        | None
    ) = None


class StreamOptions(_StrictModel):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class ResponseFormat(_StrictModel):
    """Format of the response; only text is supported."""

    type: Literal["text"]


_VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=64)]
_VariableValue = bool | int | float | Annotated[str, Field(max_length=4096)] | None
_Stop = Annotated[str, Field(min_length=1, max_length=256)]


class ChatRequest(_StrictModel):
    """The body of `POST /v1/chat/completions`."""

    model: str | None = Field(None, max_length=256)
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    temperature: float | None = Field(None, ge=0, le=2)
    """Default: 0 (greedy); 1 if `top_p`, `top_k` or `n` ask for sampling."""
    top_p: float | None = Field(None, ge=0, le=1)
    """0: greedy, as in OpenAI's API; many tasks of lmms-eval send it."""
    top_k: int | None = Field(None, ge=-1, le=2**31)
    """0 or -1: no limit."""
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=0, le=MAX_INT)
    n: int | None = Field(None, ge=1, le=8)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[_VariableName, _VariableValue] | None = Field(None, max_length=16)
    """Values of the chat template's variables, such as `enable_thinking`. One that the template
    does not have is ignored."""
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
"""Unsupported field -> values (besides null) without an effect, which are accepted."""

IGNORED_FIELDS = frozenset(
    {
        "media_io_kwargs",
        "mm_processor_kwargs",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)
"""Fields that clients send by default: ignored, and listed in a response header."""

# Chat templates have no place for the name of an author.
_IGNORED_MESSAGE_FIELDS = frozenset({"name"})
_NULL_MESSAGE_FIELDS = frozenset(
    {"refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content"}
)
"""Fields of a response message that clients send back in the history: accepted if empty."""


def parse_json(body: bytes | bytearray, *, max_values: int) -> Any:
    """Parse JSON with a limit on its values and its depth. Raises ServeError (400, 413)."""
    # Counted before parsing: `[],[],[]` takes 25 times its bytes as Python objects. base64 contains
    # neither brackets nor commas, so media do not count. The parser limits the depth to 200.
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
    """JSON -> the request, and the names of ignored fields. Raises ServeError (400)."""
    if not isinstance(fields, dict):
        raise ServeError("the body should be a JSON object with `messages`", code="invalid_type")
    ignored = []
    kept = {}
    # Sorted out before pydantic, which knows one kind of extra field only: the forbidden one.
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
    # Clients of structured outputs send it; pydantic would only report that 'text' was expected.
    if isinstance(kept.get("response_format"), dict):
        kind = kept["response_format"].get("type")
        if isinstance(kind, str) and kind != "text":
            raise invalid_field(
                f"response_format {kind} is not supported; the output is text",
                "response_format",
                code="unsupported_parameter",
            )
    request = validate(ChatRequest, kept)
    if request.stream_options is not None and not request.stream:
        raise invalid_field("stream_options needs stream: true", "stream_options")
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid_field("top_logprobs needs logprobs: true", "top_logprobs")
    both = (request.max_tokens, request.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise invalid_field(
            "max_tokens and max_completion_tokens differ; give one of them", "max_tokens"
        )
    return request, tuple(dict.fromkeys(ignored))


def validate(cls: type[Model], fields: Any, *, where: str = "") -> Model:
    """Build `cls` from JSON. Raises ServeError (400) that names the field and its error."""
    try:
        return cls.model_validate(fields)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
    # Each branch of a union reports an error. "Expected a string" says less than the error inside
    # of the object that the client sent.
    fault = min(faults, key=lambda f: f["type"] in ("string_type", "list_type", "model_type"))
    loc = [str(part) for part in fault["loc"] if not _is_union_branch(part)]
    param = ".".join([*([where] if where else []), *loc])
    if fault["type"] == "extra_forbidden":
        raise unknown_field_error(loc[-1], fields_at(cls, loc[:-1]), where=param)
    if fault["type"] == "missing":
        raise invalid_field(f"{param} is missing", param)
    raise invalid_field(f"{param}: {fault['msg'][:1].lower()}{fault['msg'][1:]}", param)


def invalid_field(message: str, param: str, *, code: str | None = "invalid_value") -> ServeError:
    """Build a 400 for one field of the request."""
    return ServeError(message, param=param, code=code)


def unknown_field_error(name: str, known: Iterable[str], *, where: str) -> ServeError:
    """Build a 400 that suggests the nearest known field."""
    near = did_you_mean(name, known) or f"; known fields: {', '.join(known)}"
    return invalid_field(f"unknown field {where[:80]!r}{near}", where, code="unknown_field")


def _unsupported_error(name: str, neutral: tuple[Any, ...]) -> ServeError:
    values = [repr(value) for value in neutral if value is not None]
    only = f" (only {' or '.join(values)})" if values else ""
    return invalid_field(f"{name} is not supported{only}", name, code="unsupported_parameter")


def _is_neutral(value: Any, neutral: Any) -> bool:
    # Python holds True == 1 and False == 0: `echo: 0` would pass as false.
    if isinstance(value, bool) or isinstance(neutral, bool):
        return value is neutral
    return bool(value == neutral)


def _strip_message(message: Any, index: int, ignored: list[str]) -> Any:
    """Drop ignored and empty fields of a message. Raises ServeError for unsupported ones."""
    if not isinstance(message, dict):
        return message
    where = f"messages.{index}"
    role = message.get("role")
    if role in ("tool", "function"):
        raise invalid_field(
            f"{where}.role: tools are not supported, so the role {role} is not either",
            f"{where}.role",
            code="unsupported_value",
        )
    kept = {}
    for name, value in message.items():
        if name in _IGNORED_MESSAGE_FIELDS:
            ignored.append(f"messages.{name}")
        elif name in _NULL_MESSAGE_FIELDS:
            if value not in (None, [], ""):
                at = f"{where}.{name}"
                raise invalid_field(f"{at} is not supported", at, code="unsupported_parameter")
        else:
            kept[name] = value
    return kept


_UNION_BRANCHES = {"bool", "int", "float", "str", "constrained-str"}
_UNION_BRANCHES |= {*(c.__name__ for c in _StrictModel.__subclasses__())}


def _is_union_branch(part: str | int) -> bool:
    """Return True for a step of a pydantic error location that names a union branch."""
    return isinstance(part, str) and (part in _UNION_BRANCHES or "[" in part)


@dataclass(frozen=True)
class RequestParams:
    """Sampling parameters of a request, shared by all of its choices."""

    max_tokens: int | None = None
    """None: the server's default, or what the context length leaves after the prompt."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    num_logprobs: int | None = None
    ignore_eos: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def sampling_params(self, index: int, max_new_tokens: int) -> SamplingParams:
        """Build the engine's parameters of one choice."""
        # Each choice has its own seed, or all choices would be equal.
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=None if self.seed is None else (self.seed + index) % (MAX_INT + 1),
            num_logprobs=self.num_logprobs,
            ignore_eos=self.ignore_eos,
        )


def request_params(request: ChatRequest, settings: ServeSettings) -> RequestParams:
    """Checked request -> sampling parameters. Raises ServeError for too high `max_tokens`."""
    max_tokens = request.max_completion_tokens or request.max_tokens
    if max_tokens is not None and max_tokens > settings.max_tokens:
        raise invalid_field(
            f"max_tokens is {max_tokens}, and the limit is {settings.max_tokens}", "max_tokens"
        )
    top_p = 1.0 if request.top_p is None else request.top_p
    temperature = request.temperature
    # OpenAI takes top_p 0 for greedy; vLLM refuses it.
    if top_p == 0:
        top_p, temperature = 1.0, 0.0
    top_k = max(0, request.top_k or 0)
    n = request.n or 1
    # Sampling is what these ask for: greedy decoding would ignore them, and give n equal choices.
    is_sampled = top_p < 1 or top_k > 1 or n > 1
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    return RequestParams(
        max_tokens=max_tokens,
        temperature=(1.0 if is_sampled else 0.0) if temperature is None else temperature,
        top_p=top_p,
        top_k=top_k,
        seed=request.seed,
        stop=stop,
        n=n,
        num_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        ignore_eos=bool(request.ignore_eos),
        chat_template_kwargs=request.chat_template_kwargs or {},
    )
