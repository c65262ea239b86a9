"""A chat template: what it renders, and where the assistant's turns stand in that text.

Border: text in, text and character spans out. It knows tokens by their spelling, never by ids.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from multi_token.chat.alignment import (
    CharSpan,
    ChatMessage,
    Marker,
    common_prefix_length,
    find_markers,
    has_reasoning,
    marker_text,
    match_markers,
    replace_with_markers,
    text_after,
    text_before,
    unused_marker_id,
)
from multi_token.errors import ChatTemplateError

_GENERATION_TAG_HINT = (
    "set `chat_template` in the recipe to a template with {% generation %} ... {% endgeneration %} "
    "around each answer and its end of turn, and around nothing else"
)
_MAX_LAYOUTS = 256  # a server sees conversations of any length
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class _TurnPrefix:
    """What a template writes between the text before an assistant's turn and the answer itself.

    `in_prompt`: what the model is given when it is asked; `answer_prefix`: what it has to write
    after that.
    """

    in_prompt: str
    answer_prefix: str


@dataclass(frozen=True)
class _RoleLayout:
    """What a template makes of a sequence of roles, whatever the texts are.

    `marker_messages`: the messages, all marks; `text`: their rendering; `turn_prefixes`: of the
    assistant's turns,
    by their index, as far as they have been asked for.
    """

    marker_messages: list[ChatMessage]
    text: str
    marks: list[Marker]
    turn_prefixes: dict[int, _TurnPrefix]


class ChatTemplate:
    """Renders conversations and finds the assistant's turns in them.

    Turns are found with marks: the conversation is rendered once more with each text replaced by a
    mark that occurs nowhere else; with the texts put back it must be the first rendering again,
    character by character. So an answer is never searched for by its own words. What is learned
    goes from where the generation prompt ends, over the answer, to the end of its end-of-turn
    tokens. `{% generation %}` tags, in a template that has them, say instead what is learned, and
    are held against that.
    """

    def __init__(self, source: str, tokenizer: Any) -> None:
        """`source`: Jinja text. `tokenizer`: lends its special tokens and its renderer."""
        self.source = source
        self.tokenizer = tokenizer
        self.is_tagged = _GENERATION_TAG.search(source) is not None
        self._role_layouts: dict[tuple[str, ...], _RoleLayout] = {}

    def render(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation. Raises ChatTemplateError with the template's own words."""
        return self._render(messages, add_generation_prompt, as_parts=self.takes_content_parts)

    @functools.cached_property
    def takes_content_parts(self) -> bool:
        """Whether contents have to be lists of parts. Found by trying; plain text comes first."""
        probe = replace_with_markers([_message("user"), _message("assistant")], "0")
        for as_parts in (False, True):
            try:
                text = self._render(probe, False, as_parts=as_parts)
            except ChatTemplateError:
                continue
            # quotes around a text: the template has printed the list itself
            if all(re.search(f"(?<!['\"]){re.escape(m['content'])}", text) for m in probe):
                return as_parts
        return False

    def render_with_spans(
        self, messages: Sequence[ChatMessage], *, last_only: bool = False
    ) -> tuple[str, list[CharSpan]]:
        """The text to train on, and its learned spans: one for each assistant turn, or the last.

        The text is the template's own. A template that closes a turn by the opening of the next
        one leaves a last answer open; that token is then added behind it.

        Raises ChatTemplateError if a turn cannot be found exactly.
        """
        text = self.render(messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            return text, []
        salt = unused_marker_id(messages)
        rendering = self.render(replace_with_markers(messages, salt))
        places = match_markers(rendering, text, messages, salt)
        if places is None:  # the template looks into the texts of others: leave them as they are
            answers = replace_with_markers(messages, salt, roles=("assistant",))
            places = match_markers(self.render(answers), text, messages, salt)
        marks = find_markers(rendering, salt)
        shown = [m.message for m in marks if m.message in turns and not m.is_reasoning]
        if places is None or shown != turns:
            raise ChatTemplateError(
                f"expected the text of each of the {len(turns)} assistant turns once and unchanged "
                "in the rendered conversation, but the template changes, drops or repeats one; set "
                "`chat_template` in the recipe to a template that writes {{ message['content'] }} "
                "of an answer as it is"
            )
        if has_reasoning(messages[turns[-1]]["content"]) and len(places[turns[-1]]) == 1:
            raise ChatTemplateError(
                "the chat template drops the reasoning (the text before </think>) of the last "
                "answer, so it would not be learned; leave it out of the row, or set "
                "`chat_template` in the recipe to a template that keeps it"
            )
        ends: dict[int, int] = {}
        for i in turns:
            behind = text_after(rendering, marks, i)
            end = self._find_end_of_turn(behind, places[i][-1].end)
            if (
                end is None
                and i == len(messages) - 1
                and not behind.strip()
                and self.end_of_turn_token
            ):
                text += self.end_of_turn_token
                end = len(text)
            if end is None:
                raise ChatTemplateError(
                    f"found {len(ends)} of {len(turns)} assistant turns with an end: behind the "
                    f"answer stands {behind[:20]!r}, not a special token, so the model would not "
                    "learn to stop; set `chat_template` in the recipe to a template that writes "
                    "{{ eos_token }} behind each answer"
                )
            ends[i] = end
        if self.is_tagged:
            spans = self._spans_from_generation_tags(messages, text, places, ends)
        else:
            spans = {}
            for i in turns:
                before = text_before(rendering, marks, i)
                border = self._turn_prefix(messages, i)
                between = border.in_prompt + border.answer_prefix
                # blanks at a question's end have no mark, and stand before the border's text
                blank = len(before) - len(between) if before.endswith(between) else 0
                given = blank + common_prefix_length(before[blank:], border.in_prompt)
                start = _answer_start(text, places[i][0].start, before[given:])
                spans[i] = CharSpan(start, ends[i])
        return text, [spans[i] for i in (turns[-1:] if last_only else turns)]

    def prompt(self, messages: Sequence[ChatMessage]) -> str:
        """The text that ends where the assistant is to speak. Raises ChatTemplateError."""
        text, end = self.render_prompt(messages)
        return text[:end]

    def render_prompt(self, messages: Sequence[ChatMessage]) -> tuple[str, int]:
        """A text that begins with the prompt, and where the prompt ends in it.

        What follows is an answer that has just begun: a tokenizer may cut the blanks at the end of
        a text in another way than before a word, and training saw a word there. The prompt is what
        `render_with_spans` has up to the turn: the template's own generation prompt, unless its
        renderings
        of answers go on in another way (`<think>` opened in the one and not in the other); then
        only as far as both agree.

        Raises ChatTemplateError.
        """
        open_answer = {"role": "assistant", "content": marker_text(unused_marker_id(messages), 0)}
        try:
            text = self.render([*messages, open_answer])
        except ChatTemplateError:
            text = ""
        answer = text.find(open_answer["content"])
        if answer < 0:  # no answer may follow here, so that no training can have seen one
            text = self.render(messages, add_generation_prompt=True)
            return text, len(text)
        answer_prefix = self._turn_prefix([*messages, open_answer], len(messages)).answer_prefix
        return f"{text[:answer]}a", _answer_start(text, answer, answer_prefix)

    def check_all_messages_rendered(
        self, messages: Sequence[ChatMessage], *, prompt_only: bool
    ) -> None:
        """Raise ChatTemplateError if the text to train on (or the prompt) lacks a message."""
        try:
            layout = self._role_layout(
                [*messages, _message("assistant")] if prompt_only else messages
            )
        except ChatTemplateError:
            layout = self._role_layout(messages)
        shown = {mark.message for mark in layout.marks}
        for i, message in enumerate(messages):
            if i not in shown and message["content"].strip():
                raise ChatTemplateError(
                    f"the chat template drops message {i + 1} of {len(messages)} (role "
                    f"{message['role']}) of this conversation; leave it out, write its text into "
                    "another turn, or set `chat_template` in the recipe to a template that shows it"
                )

    @functools.cached_property
    def end_of_turn_token(self) -> str | None:
        """The token that closes a last answer (its last one, if several), or None."""
        last, between = self._end_of_turn_runs
        return last[-1] if last else between[0] if between else None

    @functools.cached_property
    def end_of_turn_tokens(self) -> list[str]:
        """Every token that closes an answer, in the middle of a conversation or at its end."""
        num_tokens = common_prefix_length(*self._end_of_turn_runs) or 1
        return sorted({run[:num_tokens][-1] for run in self._end_of_turn_runs if run})

    @functools.cached_property
    def answer_prefix(self) -> str:
        """What the model has to write between its prompt and an answer; mostly nothing.

        Raises ChatTemplateError if the template shows no answer to a question.
        """
        roles = [_message("user"), _message("assistant")]
        if all(mark.message != 1 for mark in self._role_layout(roles).marks):
            raise ChatTemplateError(
                "the chat template does not show what the assistant says; set `chat_template` in "
                "the recipe to one that does"
            )
        return self._turn_prefix(roles, 1).answer_prefix

    def _render(
        self, messages: Sequence[ChatMessage], add_generation_prompt: bool, *, as_parts: bool
    ) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                _as_content_parts(messages) if as_parts else list(messages),
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ChatTemplateError(
                f"the language model's chat template refuses this conversation: {error} "
                f"(roles: {', '.join(m['role'] for m in messages)})"
            ) from None

    def _spans_from_generation_tags(
        self,
        messages: Sequence[ChatMessage],
        text: str,
        places: dict[int, list[CharSpan]],
        ends: dict[int, int],
    ) -> dict[int, CharSpan]:
        """From the template's own generation tags, held against the turns that were found."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=[
                _as_content_parts(messages) if self.takes_content_parts else list(messages)
            ],  # type: ignore[arg-type]
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        _, (indices,) = rendered
        tagged: list[CharSpan] = []
        for start, end in indices:
            if tagged and tagged[-1].end == start:  # an answer and its end, tagged one by one
                tagged[-1] = CharSpan(tagged[-1].start, end)
            else:
                tagged.append(CharSpan(start, end))
        spans: dict[int, CharSpan] = {}
        for i, end in ends.items():
            start = places[i][-1].start
            around = [s for s in tagged if s.start <= start and end <= s.end]
            if not around:
                raise ChatTemplateError(
                    "the template's {% generation %} tags do not hold all of "
                    f"{text[start:end][:80]!r}, an answer and its end of turn; "
                    f"{_GENERATION_TAG_HINT}"
                )
            # two turns may share a tag
            begins = max([around[0].start, *(e for e in ends.values() if e <= start)])
            later = [
                places[j][0].start for j in ends if j > i and places[j][0].end <= around[0].end
            ]
            spans[i] = CharSpan(begins, end if later else around[0].end)
        for j, message in enumerate(messages):
            for place in places.get(j, []) if message["role"] != "assistant" else []:
                if any(
                    span.start < place.end and place.start < span.end for span in spans.values()
                ):
                    raise ChatTemplateError(
                        "the template's {% generation %} tags hold more than the assistant's "
                        f"turns: {text[place.start : place.end][:80]!r}; {_GENERATION_TAG_HINT}"
                    )
        return spans

    def _role_layout(self, messages: Sequence[ChatMessage]) -> _RoleLayout:
        """Rendered once for each sequence of roles."""
        roles = tuple(message["role"] for message in messages)
        if roles not in self._role_layouts:
            if len(self._role_layouts) >= _MAX_LAYOUTS:
                self._role_layouts.clear()
            bare = replace_with_markers([_message(role) for role in roles], "0")
            text = self.render(bare)
            self._role_layouts[roles] = _RoleLayout(bare, text, find_markers(text, "0"), {})
        return self._role_layouts[roles]

    def _turn_prefix(self, messages: Sequence[ChatMessage], i: int) -> _TurnPrefix:
        """The border of an assistant turn that is shown; only the roles decide over it."""
        layout = self._role_layout(messages)
        if i not in layout.turn_prefixes:
            before = text_before(layout.text, layout.marks, i)
            given = self._generation_prompt_length(layout.marker_messages[:i], before)
            layout.turn_prefixes[i] = _TurnPrefix(before[:given], before[given:])
        return layout.turn_prefixes[i]

    def _generation_prompt_length(self, messages: list[ChatMessage], before: str) -> int:
        """How many characters of `before` the generation prompt has as well."""
        given = len(before)
        if messages and "add_generation_prompt" in self.source:
            asked = self.render(messages, add_generation_prompt=True)
            marks = find_markers(asked, "0")
            given = common_prefix_length(before, asked[marks[-1].end if marks else 0 :])
            for token in self._special_token_pattern.finditer(before):
                if token.start() < given < token.end():
                    given = token.start()
        # a tokenizer glues blanks to what follows them, so they go where that goes
        while given and (
            before[given - 1] == " "
            or (before[given - 1].isspace() and before[given : given + 1].isspace())
        ):
            given -= 1
        return given

    def _find_end_of_turn(self, behind: str, start: int) -> int | None:
        """Where the end-of-turn tokens end in a text that goes on with `behind` at `start`.

        Those that follow an answer in the middle of a conversation and at its end alike; where the
        two have nothing in common, the first.
        """
        run = self._special_token_run(behind)
        if not run:
            return None
        num_tokens = common_prefix_length(run, self._end_of_turn_runs[0]) or 1
        blanks = len(behind) - len(behind.lstrip())
        return start + blanks + len("".join(run[:num_tokens]))

    @functools.cached_property
    def _end_of_turn_runs(self) -> tuple[list[str], list[str]]:
        """Tokens right behind an answer: when it is the last message, and before a user's turn."""
        runs: list[list[str]] = []
        for roles in (("user", "assistant"), ("user", "assistant", "user")):
            try:
                text = self.render(replace_with_markers([_message(role) for role in roles], "0"))
                runs.append(self._special_token_run(text_after(text, find_markers(text, "0"), 1)))
            except ChatTemplateError:
                runs.append([])
        return runs[0], runs[1]

    def _special_token_run(self, text: str) -> list[str]:
        """Tokens that `text` begins with, after blanks."""
        run, at = [], len(text) - len(text.lstrip())
        while token := self._special_token_pattern.match(text, at):
            run.append(token[0])
            at = token.end()
        return run

    @functools.cached_property
    def _special_token_pattern(self) -> re.Pattern[str]:
        """Any spelling that the tokenizer keeps whole: special and other added tokens."""
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values()]
        tokens = {t for t in [*self.tokenizer.all_special_tokens, *added] if t.strip()}
        longest_first = sorted(tokens, key=lambda token: (-len(token), token))
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _message(role: str) -> ChatMessage:
    return {"role": role, "content": ""}


def _as_content_parts(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def _answer_start(text: str, answer: int, answer_prefix: str) -> int:
    """Where a turn begins whose answer begins at `answer`, behind its `answer_prefix`."""
    if not text.endswith(answer_prefix, 0, answer):
        raise ChatTemplateError(
            f"expected {answer_prefix!r} before an answer, but the template renders "
            f"{text[:answer][-40:]!r} there, so where the turn begins is not certain; "
            f"{_GENERATION_TAG_HINT}"
        )
    return answer - len(answer_prefix)
