"""One sample in the terminal: prompt, supervised text and media in colours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from multi_token.types import IGNORE_INDEX, Sample

if TYPE_CHECKING:
    from rich.text import Text

PROMPT_STYLE, SUPERVISED_STYLE, MEDIA_STYLE = "dim", "bold green", "bold magenta"


class Decoder(Protocol):
    """The one method of a tokenizer that `render_sample` needs."""

    def decode(self, token_ids: list[int], /) -> Any: ...


def render_sample(sample: Sample, tokenizer: Decoder, *, marks: bool = False) -> Text:
    """Render a sample as the model gets it: prompt dim, supervised text green, `[image x 4]`.

    With `marks`, supervised text also is between `⟦` and `⟧`, for terminals without colour.
    """
    from rich.text import Text

    ids: list[int] = sample.input_ids.tolist()
    supervised: list[bool] = (sample.labels != IGNORE_INDEX).tolist()
    starts = {span.start: span for span in sample.media_spans}
    opening, closing = ("⟦", "⟧") if marks else ("", "")
    text = Text.assemble(
        ("prompt", PROMPT_STYLE),
        "  ",
        (f"{opening}supervised{closing}", SUPERVISED_STYLE),
        "  ",
        ("[media x tokens]", MEDIA_STYLE),
        "\n\n",
    )
    position = 0
    while position < len(ids):
        if span := starts.get(position):
            text.append(f"[{span.modality} x {span.length}]", style=MEDIA_STYLE)
            # a span of no tokens still must not loop for ever
            position += max(span.length, 1)
            continue
        end = position + 1
        while end < len(ids) and end not in starts and supervised[end] == supervised[position]:
            end += 1
        # a run of ids at a time: one token alone may be half of a UTF-8 letter
        decoded = str(tokenizer.decode(ids[position:end]))
        if supervised[position]:
            text.append(f"{opening}{decoded}{closing}", style=SUPERVISED_STYLE)
        else:
            text.append(decoded, style=PROMPT_STYLE)
        position = end
    return text
