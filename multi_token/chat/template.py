"""Chat template: renders a conversation and finds the assistant's turns in the rendered text.

Text in, text and character spans out; `chat/format.py` turns both into ids.

Worked example, with a ChatML template and the messages user "Hi", assistant "Hello":

    1. text       <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    2. markers    <|im_start|>user\\n[0]<|im_end|>\\n<|im_start|>assistant\\n[1]<|im_end|>\\n
    3. put back   [0] -> "Hi", [1] -> "Hello" gives text 1 again, so text[52:57] is the answer
    4. turn end   after [1]: "<|im_end|>\\n"; its special tokens belong to the turn -> 67
    5. turn start before [1]: "<|im_end|>\\n<|im_start|>assistant\\n"; the generation prompt ends
                  with all of it, so the model has to write nothing before the answer -> 52
    6. supervised text[52:67] == "Hello<|im_end|>"

Step 5 differs for a template that writes `<think>\\n\\n</think>\\n\\n` before an answer but not in
its generation prompt: the model has to write that block, so the supervised span includes it.
"""

from __future__ import annotations

import functools
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from multi_token.chat.alignment import (
    CharSpan,
    ChatMessage,
    MarkedText,
    marker_text,
    match_markers,
    replace_with_markers,
    unused_marker_id,
)
from multi_token.errors import ChatTemplateError

_GENERATION_TAG_HINT = (
    "set `chat_template` in the recipe to a template with {% generation %} ... {% endgeneration %} "
    "around each answer and its end of turn, and around nothing else"
)
_MAX_LAYOUTS = 256
"""Layouts kept: a server sees conversations of any length, so their number needs a bound."""
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class _TurnPrefix:
    """Text between the previous message and an answer.

    `in_prompt`: the part that the generation prompt has too; `answer_prefix`: the part that the
    model has to write before the answer.
    """

    in_prompt: str
    answer_prefix: str


@dataclass(frozen=True)
class _RoleLayout:
    """Rendering of a sequence of roles, with a marker for each text.

    `turn_prefixes`: filled on demand, by index of the assistant's message.
    """

    marker_messages: list[ChatMessage]
    rendering: MarkedText
    turn_prefixes: dict[int, _TurnPrefix]


@dataclass(frozen=True)
class RenderedTurns:
    """A rendered conversation and the positions of its texts (steps 1 to 3 of the example).

    `text`: the template's own rendering. `rendering`: the same with markers for the texts.
    `turns`: indices of the assistant's messages. `text_spans`: by message, the spans in `text` of
    its reasoning (if any) and its text.
    """

    text: str
    rendering: MarkedText
    turns: list[int]
    text_spans: dict[int, list[CharSpan]]


class ChatTemplate:
    """Renders conversations and finds the assistant's turns in the text.

    Answers are located by markers, never by a search for their words, so an answer that repeats
    the question is found too. A supervised span goes from the end of the generation prompt, over
    the answer, to the end of its end-of-turn tokens. In a template with `{% generation %}` tags
    the tags decide, and are checked against these spans.
    """

    def __init__(self, source: str, tokenizer: Any) -> None:
        """`source`: Jinja text. `tokenizer`: provides the special tokens and the renderer."""
        self.source = source
        self.tokenizer = tokenizer
        self.is_tagged = _GENERATION_TAG.search(source) is not None
        self._role_layouts: dict[tuple[str, ...], _RoleLayout] = {}
        self._marked: dict[tuple[tuple[str, str], ...], MarkedText] = {}

    def render(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = False
    ) -> str:
        """Return the text of a conversation. Raises ChatTemplateError with the template's error."""
        return self._render(messages, add_generation_prompt, as_parts=self.takes_content_parts)

    @functools.cached_property
    def takes_content_parts(self) -> bool:
        """True if contents must be lists of parts; found by rendering, plain text first."""
        probe = replace_with_markers([_message("user"), _message("assistant")], "0")
        for as_parts in (False, True):
            try:
                text = self._render(probe, False, as_parts=as_parts)
            except ChatTemplateError:
                continue
            # Quotes around a text mean that the template has printed the list of parts itself.
            if all(re.search(f"(?<!['\"]){re.escape(m['content'])}", text) for m in probe):
                return as_parts
        return False

    def render_with_spans(
        self, messages: Sequence[ChatMessage], *, last_only: bool = False
    ) -> tuple[str, list[CharSpan]]:
        """Return the text to train on, and a supervised span for each assistant turn.

        `last_only`: a span for the last assistant turn alone. Where a template closes a turn only
        by opening the next one, the end-of-turn token is appended to the text.

        Raises ChatTemplateError if a turn cannot be located exactly.
        """
        rendered = self.locate_answers(messages)
        if not rendered.turns:
            return rendered.text, []
        rendered, ends = self.find_turn_ends(messages, rendered)
        if self.is_tagged:
            spans = self._spans_from_generation_tags(messages, rendered, ends)
        else:
            starts = self.find_turn_starts(messages, rendered)
            spans = {i: CharSpan(starts[i], ends[i]) for i in rendered.turns}
        chosen = rendered.turns[-1:] if last_only else rendered.turns
        return rendered.text, [spans[i] for i in chosen]

    def locate_answers(self, messages: Sequence[ChatMessage]) -> RenderedTurns:
        """Render with and without markers, and match the two (steps 1 to 3 of the example).

        Raises ChatTemplateError for a template that changes, drops or repeats an answer.
        """
        text = self.render(messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            return RenderedTurns(text, MarkedText(text, ""), [], {})
        marker_id = unused_marker_id(messages)
        marked = replace_with_markers(messages, marker_id)
        rendering = self._render_marked(marked, marker_id)
        spans = match_markers(rendering, text, messages)
        if spans is None:
            # Some templates branch on the texts of other roles (a system message, a tool result);
            # with those left as they are, the answers can still be located.
            answers = replace_with_markers(messages, marker_id, roles=("assistant",))
            spans = match_markers(MarkedText(self.render(answers), marker_id), text, messages)
        is_turn = set(turns)
        shown = [
            m.message for m in rendering.markers if m.message in is_turn and not m.is_reasoning
        ]
        if spans is None or shown != turns:
            raise ChatTemplateError(
                f"expected the text of each of the {len(turns)} assistant turns once and unchanged "
                "in the rendered conversation, but the template changes, drops or repeats one; set "
                "`chat_template` in the recipe to a template that writes {{ message['content'] }} "
                "of an answer as it is"
            )
        # A reasoning part has a marker of its own, which the template did not render.
        last = MarkedText(marked[turns[-1]]["content"], marker_id)
        if len(last.markers) > len(spans[turns[-1]]):
            raise ChatTemplateError(
                "the chat template drops the reasoning (the text before </think>) of the last "
                "answer, so it would not be trained on; remove it from the row, or set "
                "`chat_template` in the recipe to a template that keeps it"
            )
        return RenderedTurns(text, rendering, turns, spans)

    def find_turn_ends(
        self, messages: Sequence[ChatMessage], rendered: RenderedTurns
    ) -> tuple[RenderedTurns, dict[int, int]]:
        """Return where each turn's end-of-turn tokens end, by message (step 4 of the example).

        The rendering comes back too, since a last turn without an end gets one appended. Raises
        ChatTemplateError for a turn that no special token ends.
        """
        ends: dict[int, int] = {}
        for i in rendered.turns:
            after = rendered.rendering.text_after(i)
            end = self._find_end_of_turn(after, rendered.text_spans[i][-1].end)
            is_open = end is None and i == len(messages) - 1 and not after.strip()
            if is_open and self.end_of_turn_token:
                # GLM's templates end a turn by the next role's token, so a last turn has no end.
                rendered = replace(rendered, text=rendered.text + self.end_of_turn_token)
                end = len(rendered.text)
            if end is None:
                raise ChatTemplateError(
                    f"found {len(ends)} of {len(rendered.turns)} assistant turns with an end: the "
                    f"answer is followed by {after[:20]!r}, not by a special token, so the model "
                    "would not learn to stop; set `chat_template` in the recipe to a template that "
                    "writes {{ eos_token }} after each answer"
                )
            ends[i] = end
        return rendered, ends

    def find_turn_starts(
        self, messages: Sequence[ChatMessage], rendered: RenderedTurns
    ) -> dict[int, int]:
        """Return where the generation prompt ends, by message (step 5 of the example)."""
        starts: dict[int, int] = {}
        layout = self._role_layout(messages)
        for i in rendered.turns:
            before = rendered.rendering.text_before(i)
            prefix = self._turn_prefix(layout, i)
            expected = prefix.in_prompt + prefix.answer_prefix
            # Markers exclude the blanks at a question's end, so these come before the prefix.
            blank = len(before) - len(expected) if before.endswith(expected) else 0
            given = blank + _num_common(before[blank:], prefix.in_prompt)
            starts[i] = _answer_start(
                rendered.text, rendered.text_spans[i][0].start, before[given:]
            )
        return starts

    def render_prompt(self, messages: Sequence[ChatMessage]) -> tuple[str, int]:
        """Return a text that begins with the prompt, and the prompt's length in it.

        The prompt equals what `render_with_spans` has before the turn: the template's generation
        prompt, cut where the template renders answers differently (`<think>` in only one of them).

        Raises ChatTemplateError.
        """
        open_answer = {"role": "assistant", "content": marker_text(unused_marker_id(messages), 0)}
        try:
            text = self.render([*messages, open_answer])
        except ChatTemplateError:
            text = ""
        answer = text.find(open_answer["content"])
        if answer < 0:
            # No answer may follow these messages, so training cannot have seen one here either.
            text = self.render(messages, add_generation_prompt=True)
            return text, len(text)
        layout = self._role_layout([*messages, open_answer])
        answer_prefix = self._turn_prefix(layout, len(messages)).answer_prefix
        # A tokenizer may split blanks at the end of a text unlike blanks before a word. Training
        # saw a word there, so the text goes on with a letter that the caller cuts off as ids.
        return f"{text[:answer]}a", _answer_start(text, answer, answer_prefix)

    def check_all_messages_rendered(
        self, messages: Sequence[ChatMessage], *, prompt_only: bool
    ) -> None:
        """Raise ChatTemplateError if the text to train on (or the prompt) lacks a message."""
        answer = [_message("assistant")] if prompt_only else []
        try:
            layout = self._role_layout([*messages, *answer])
        except ChatTemplateError:
            layout = self._role_layout(messages)
        shown = {marker.message for marker in layout.rendering.markers}
        for i, message in enumerate(messages):
            if i not in shown and message["content"].strip():
                raise ChatTemplateError(
                    f"the chat template drops message {i + 1} of {len(messages)} (role "
                    f"{message['role']}) of this conversation; remove it, write its text into "
                    "another turn, or set `chat_template` in the recipe to a template that shows it"
                )

    @functools.cached_property
    def end_of_turn_token(self) -> str | None:
        """The token that closes a last answer (the last of several), or None."""
        last, between = self._end_of_turn_runs
        return last[-1] if last else between[0] if between else None

    @functools.cached_property
    def end_of_turn_tokens(self) -> list[str]:
        """Every token that closes an answer, in the middle of a conversation or at its end."""
        num_tokens = _num_common(*self._end_of_turn_runs) or 1
        return sorted({run[:num_tokens][-1] for run in self._end_of_turn_runs if run})

    @functools.cached_property
    def answer_prefix(self) -> str:
        """Text that the model writes between its prompt and an answer; mostly empty.

        Raises ChatTemplateError if the template shows no answer to a question.
        """
        layout = self._role_layout([_message("user"), _message("assistant")])
        if all(marker.message != 1 for marker in layout.rendering.markers):
            raise ChatTemplateError(
                "the chat template does not show the assistant's messages; set `chat_template` in "
                "the recipe to one that does"
            )
        return self._turn_prefix(layout, 1).answer_prefix

    def _render(
        self, messages: Sequence[ChatMessage], add_generation_prompt: bool, *, as_parts: bool
    ) -> str:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        # `apply_chat_template` copies every message before: two thirds of its time
        try:
            return _compile_jinja_template(self.source).render(
                messages=_as_content_parts(messages) if as_parts else list(messages),
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
                **_absent_variables(),
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ChatTemplateError(
                f"the language model's chat template refuses this conversation: {error} "
                f"(roles: {', '.join(m['role'] for m in messages)})"
            ) from None

    def _spans_from_generation_tags(
        self, messages: Sequence[ChatMessage], rendered: RenderedTurns, ends: dict[int, int]
    ) -> dict[int, CharSpan]:
        """Return the spans of the template's generation tags, checked against the located turns."""
        from transformers.utils.chat_template_utils import render_jinja_template

        text, text_spans = rendered.text, rendered.text_spans
        output: Any = render_jinja_template(
            conversations=[
                _as_content_parts(messages) if self.takes_content_parts else list(messages)
            ],  # type: ignore[arg-type]
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        _, (indices,) = output
        tagged: list[CharSpan] = []
        for start, end in indices:
            # An answer and its end of turn may carry one tag each; join adjacent tags.
            if tagged and tagged[-1].end == start:
                tagged[-1] = CharSpan(tagged[-1].start, end)
            else:
                tagged.append(CharSpan(start, end))
        spans: dict[int, CharSpan] = {}
        turns, tag_starts = [*ends], [tag.start for tag in tagged]
        for number, i in enumerate(turns):
            start, end = text_spans[i][-1].start, ends[i]
            around = tagged[max(0, bisect_right(tag_starts, start) - 1) :][:1]
            if not around or not (around[0].start <= start and end <= around[0].end):
                raise ChatTemplateError(
                    "the template's {% generation %} tags do not hold all of "
                    f"{text[start:end][:80]!r}, an answer and its end of turn; "
                    f"{_GENERATION_TAG_HINT}"
                )
            # Two assistant turns in a row may share a tag: the second starts where the first ends,
            # and only the last one takes what the tag holds after its end of turn.
            first = max(around[0].start, ends[turns[number - 1]] if number else 0)
            following = turns[number + 1 :][:1]
            is_last = not following or text_spans[following[0]][0].end > around[0].end
            spans[i] = CharSpan(first, around[0].end if is_last else end)
        found = list(spans.values())
        span_ends = [span.end for span in found]
        for other in (span for i in text_spans if i not in ends for span in text_spans[i]):
            after = found[bisect_right(span_ends, other.start) :][:1]
            if after and after[0].start < other.end:
                raise ChatTemplateError(
                    "the template's {% generation %} tags hold more than the assistant's turns: "
                    f"{text[other.start : other.end][:80]!r}; {_GENERATION_TAG_HINT}"
                )
        return spans

    def _render_marked(self, marked: list[ChatMessage], marker_id: str) -> MarkedText:
        """Return the rendering of messages with markers for texts, which many rows share."""
        # Jinja is most of the cost of a short row, and here rows of equal roles are equal.
        key = tuple((message["role"], message["content"]) for message in marked)
        if key not in self._marked:
            if len(self._marked) >= _MAX_LAYOUTS:
                self._marked.clear()
            self._marked[key] = MarkedText(self.render(marked), marker_id)
        return self._marked[key]

    def _role_layout(self, messages: Sequence[ChatMessage]) -> _RoleLayout:
        # A template's text around messages depends on the roles alone, so that a layout is
        # rendered once per sequence of roles; Jinja is a large part of the cost of a short row.
        roles = tuple(message["role"] for message in messages)
        if roles not in self._role_layouts:
            if len(self._role_layouts) >= _MAX_LAYOUTS:
                self._role_layouts.clear()
            bare = replace_with_markers([_message(role) for role in roles], "0")
            self._role_layouts[roles] = _RoleLayout(bare, self._render_marked(bare, "0"), {})
        return self._role_layouts[roles]

    def _turn_prefix(self, layout: _RoleLayout, i: int) -> _TurnPrefix:
        """Return the text before answer `i`, split at the end of the generation prompt."""
        if i not in layout.turn_prefixes:
            before = layout.rendering.text_before(i)
            given = self._generation_prompt_length(layout.marker_messages[:i], before)
            layout.turn_prefixes[i] = _TurnPrefix(before[:given], before[given:])
        return layout.turn_prefixes[i]

    def _generation_prompt_length(self, messages: list[ChatMessage], before: str) -> int:
        """Return how many characters of `before` the generation prompt has as well."""
        given = len(before)
        if messages and "add_generation_prompt" in self.source:
            prompt = MarkedText(self.render(messages, add_generation_prompt=True), "0")
            last = prompt.markers[-1].end if prompt.markers else 0
            given = _num_common(before, prompt.text[last:])
            # The two may differ inside a special token (`<|a|>`, `<|b|>`), which is one id.
            for token in self._special_token_pattern.finditer(before):
                if token.start() < given < token.end():
                    given = token.start()
        # Tokenizers join blanks to the word after them, so such blanks belong to that word's side.
        while given and (
            before[given - 1] == " "
            or (before[given - 1].isspace() and before[given : given + 1].isspace())
        ):
            given -= 1
        return given

    def _find_end_of_turn(self, after: str, start: int) -> int | None:
        """Return where the end-of-turn tokens end in a text that has `after` at `start`.

        These are the tokens that follow an answer both in the middle of a conversation and at its
        end; where the two share none, the first token.
        """
        run = self._special_token_run(after)
        if not run:
            return None
        num_tokens = _num_common(run, self._end_of_turn_runs[0]) or 1
        blanks = len(after) - len(after.lstrip())
        return start + blanks + len("".join(run[:num_tokens]))

    @functools.cached_property
    def _end_of_turn_runs(self) -> tuple[list[str], list[str]]:
        """Special tokens after an answer: as the last message, and before a user's turn."""
        runs: list[list[str]] = []
        for roles in (("user", "assistant"), ("user", "assistant", "user")):
            try:
                bare = replace_with_markers([_message(role) for role in roles], "0")
                after = MarkedText(self.render(bare), "0").text_after(1)
                runs.append(self._special_token_run(after))
            except ChatTemplateError:
                runs.append([])
        return runs[0], runs[1]

    def _special_token_run(self, text: str) -> list[str]:
        """Return the special tokens that `text` begins with, after blanks."""
        run, at = [], len(text) - len(text.lstrip())
        while token := self._special_token_pattern.match(text, at):
            run.append(token[0])
            at = token.end()
        return run

    @functools.cached_property
    def _special_token_pattern(self) -> re.Pattern[str]:
        """Pattern of every spelling that the tokenizer keeps as one id."""
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values()]
        tokens = {t for t in [*self.tokenizer.all_special_tokens, *added] if t.strip()}
        # Regular expressions take the first alternative, and one token may begin with another.
        longest_first = sorted(tokens, key=lambda token: (-len(token), token))
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


@functools.cache
def _absent_variables() -> dict[str, Any]:
    """Return what `apply_chat_template` gives to templates for tools and documents without any."""
    from transformers.utils.chat_template_utils import render_jinja_template

    # found by rendering: None in some versions of transformers, an empty list in others
    source = "{{ {'tools': tools, 'documents': documents} | tojson }}"
    rendered: Any = render_jinja_template(conversations=[[]], chat_template=source)
    return json.loads(rendered[0][0])


def _num_common(one: Sequence[str], other: Sequence[str]) -> int:
    if one == other:  # nearly always, and compared without a loop
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _message(role: str) -> ChatMessage:
    return {"role": role, "content": ""}


def _as_content_parts(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def _answer_start(text: str, answer: int, answer_prefix: str) -> int:
    """Return where `answer_prefix` begins, which must end at `answer` in the text."""
    if not text.endswith(answer_prefix, 0, answer):
        raise ChatTemplateError(
            f"expected {answer_prefix!r} before an answer, but the template renders "
            f"{text[:answer][-40:]!r} there, so the start of the turn is not certain; "
            f"{_GENERATION_TAG_HINT}"
        )
    return answer - len(answer_prefix)
