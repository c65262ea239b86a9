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
    ChatMessage,
    Mark,
    Span,
    align,
    find_marks,
    has_reasoning,
    marked,
    num_common,
    spelling,
    text_before,
    text_behind,
    unused_salt,
)
from multi_token.errors import ChatTemplateError

_TAG = (
    "set `chat_template` in the recipe to a template with {% generation %} ... {% endgeneration %} "
    "around each answer and its end of turn, and around nothing else"
)
_MAX_LAYOUTS = 256  # a server sees conversations of any length
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class _Border:
    """What a template writes between the text before an assistant's turn and the answer itself.

    `given`: what the model is given when it is asked; `head`: what it has to write after that.
    """

    given: str
    head: str


@dataclass(frozen=True)
class _Layout:
    """What a template makes of a sequence of roles, whatever the texts are.

    `bare`: the messages, all marks; `text`: their rendering; `borders`: of the assistant's turns,
    by their index, as far as they have been asked for.
    """

    bare: list[ChatMessage]
    text: str
    marks: list[Mark]
    borders: dict[int, _Border]


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
        self._layouts: dict[tuple[str, ...], _Layout] = {}

    def render(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation. Raises ChatTemplateError with the template's own words."""
        return self._render(messages, add_generation_prompt, as_parts=self.takes_parts)

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Whether contents have to be lists of parts. Found by trying; plain text comes first."""
        probe = marked([_message("user"), _message("assistant")], "0")
        for as_parts in (False, True):
            try:
                text = self._render(probe, False, as_parts=as_parts)
            except ChatTemplateError:
                continue
            # quotes around a text: the template has printed the list itself
            if all(re.search(f"(?<!['\"]){re.escape(m['content'])}", text) for m in probe):
                return as_parts
        return False

    def answered(
        self, messages: Sequence[ChatMessage], *, last_only: bool = False
    ) -> tuple[str, list[Span]]:
        """The text to train on, and its learned spans: one for each assistant turn, or the last.

        The text is the template's own. A template that closes a turn by the opening of the next
        one leaves a last answer open; that token is then added behind it.

        Raises ChatTemplateError if a turn cannot be found exactly.
        """
        text = self.render(messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            return text, []
        salt = unused_salt(messages)
        rendering = self.render(marked(messages, salt))
        places = align(rendering, text, messages, salt)
        if places is None:  # the template looks into the texts of others: leave them as they are
            answers = marked(messages, salt, roles=("assistant",))
            places = align(self.render(answers), text, messages, salt)
        marks = find_marks(rendering, salt)
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
            behind = text_behind(rendering, marks, i)
            end = self._end_of_turn(behind, places[i][-1].end)
            if end is None and i == len(messages) - 1 and not behind.strip() and self.end_of_turn:
                text += self.end_of_turn
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
            spans = self._tagged_spans(messages, text, places, ends)
        else:
            spans = {}
            for i in turns:
                before = text_before(rendering, marks, i)
                border = self._border(messages, i)
                between = border.given + border.head
                # blanks at a question's end have no mark, and stand before the border's text
                blank = len(before) - len(between) if before.endswith(between) else 0
                given = blank + num_common(before[blank:], border.given)
                start = _start(text, places[i][0].start, before[given:])
                spans[i] = Span(start, ends[i])
        return text, [spans[i] for i in (turns[-1:] if last_only else turns)]

    def prompt(self, messages: Sequence[ChatMessage]) -> str:
        """The text that ends where the assistant is to speak. Raises ChatTemplateError."""
        text, end = self.asked(messages)
        return text[:end]

    def asked(self, messages: Sequence[ChatMessage]) -> tuple[str, int]:
        """A text that begins with the prompt, and where the prompt ends in it.

        What follows is an answer that has just begun: a tokenizer may cut the blanks at the end of
        a text in another way than before a word, and training saw a word there. The prompt is what
        `answered` has up to the turn: the template's own generation prompt, unless its renderings
        of answers go on in another way (`<think>` opened in the one and not in the other); then
        only as far as both agree.

        Raises ChatTemplateError.
        """
        open_answer = {"role": "assistant", "content": spelling(unused_salt(messages), 0)}
        try:
            text = self.render([*messages, open_answer])
        except ChatTemplateError:
            text = ""
        answer = text.find(open_answer["content"])
        if answer < 0:  # no answer may follow here, so that no training can have seen one
            text = self.render(messages, add_generation_prompt=True)
            return text, len(text)
        head = self._border([*messages, open_answer], len(messages)).head
        return f"{text[:answer]}a", _start(text, answer, head)

    def refuse_dropped(self, messages: Sequence[ChatMessage], *, prompt_only: bool) -> None:
        """Raise ChatTemplateError if the text to train on (or the prompt) lacks a message."""
        try:
            layout = self._layout([*messages, _message("assistant")] if prompt_only else messages)
        except ChatTemplateError:
            layout = self._layout(messages)
        shown = {mark.message for mark in layout.marks}
        for i, message in enumerate(messages):
            if i not in shown and message["content"].strip():
                raise ChatTemplateError(
                    f"the chat template drops message {i + 1} of {len(messages)} (role "
                    f"{message['role']}) of this conversation; leave it out, write its text into "
                    "another turn, or set `chat_template` in the recipe to a template that shows it"
                )

    @functools.cached_property
    def end_of_turn(self) -> str | None:
        """The token that closes a last answer (its last one, if several), or None."""
        last, between = self._closings
        return last[-1] if last else between[0] if between else None

    @functools.cached_property
    def ends_of_turn(self) -> list[str]:
        """Every token that closes an answer, in the middle of a conversation or at its end."""
        num_tokens = num_common(*self._closings) or 1
        return sorted({run[:num_tokens][-1] for run in self._closings if run})

    @functools.cached_property
    def head(self) -> str:
        """What the model has to write between its prompt and an answer; mostly nothing.

        Raises ChatTemplateError if the template shows no answer to a question.
        """
        roles = [_message("user"), _message("assistant")]
        if all(mark.message != 1 for mark in self._layout(roles).marks):
            raise ChatTemplateError(
                "the chat template does not show what the assistant says; set `chat_template` in "
                "the recipe to one that does"
            )
        return self._border(roles, 1).head

    def _render(
        self, messages: Sequence[ChatMessage], add_generation_prompt: bool, *, as_parts: bool
    ) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                _in_parts(messages) if as_parts else list(messages),
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ChatTemplateError(
                f"the language model's chat template refuses this conversation: {error} "
                f"(roles: {', '.join(m['role'] for m in messages)})"
            ) from None

    def _tagged_spans(
        self,
        messages: Sequence[ChatMessage],
        text: str,
        places: dict[int, list[Span]],
        ends: dict[int, int],
    ) -> dict[int, Span]:
        """From the template's own generation tags, held against the turns that were found."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=[_in_parts(messages) if self.takes_parts else list(messages)],  # type: ignore[arg-type]
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        _, (indices,) = rendered
        tagged: list[Span] = []
        for start, end in indices:
            if tagged and tagged[-1].end == start:  # an answer and its end, tagged one by one
                tagged[-1] = Span(tagged[-1].start, end)
            else:
                tagged.append(Span(start, end))
        spans: dict[int, Span] = {}
        for i, end in ends.items():
            start = places[i][-1].start
            around = [s for s in tagged if s.start <= start and end <= s.end]
            if not around:
                raise ChatTemplateError(
                    "the template's {% generation %} tags do not hold all of "
                    f"{text[start:end][:80]!r}, an answer and its end of turn; {_TAG}"
                )
            # two turns may share a tag
            begins = max([around[0].start, *(e for e in ends.values() if e <= start)])
            later = [
                places[j][0].start for j in ends if j > i and places[j][0].end <= around[0].end
            ]
            spans[i] = Span(begins, end if later else around[0].end)
        for j, message in enumerate(messages):
            for place in places.get(j, []) if message["role"] != "assistant" else []:
                if any(
                    span.start < place.end and place.start < span.end for span in spans.values()
                ):
                    raise ChatTemplateError(
                        "the template's {% generation %} tags hold more than the assistant's "
                        f"turns: {text[place.start : place.end][:80]!r}; {_TAG}"
                    )
        return spans

    def _layout(self, messages: Sequence[ChatMessage]) -> _Layout:
        """Rendered once for each sequence of roles."""
        roles = tuple(message["role"] for message in messages)
        if roles not in self._layouts:
            if len(self._layouts) >= _MAX_LAYOUTS:
                self._layouts.clear()
            bare = marked([_message(role) for role in roles], "0")
            text = self.render(bare)
            self._layouts[roles] = _Layout(bare, text, find_marks(text, "0"), {})
        return self._layouts[roles]

    def _border(self, messages: Sequence[ChatMessage], i: int) -> _Border:
        """The border of an assistant turn that is shown; only the roles decide over it."""
        layout = self._layout(messages)
        if i not in layout.borders:
            before = text_before(layout.text, layout.marks, i)
            given = self._num_given(layout.bare[:i], before)
            layout.borders[i] = _Border(before[:given], before[given:])
        return layout.borders[i]

    def _num_given(self, messages: list[ChatMessage], before: str) -> int:
        """How many characters of `before` the generation prompt has as well."""
        given = len(before)
        if messages and "add_generation_prompt" in self.source:
            asked = self.render(messages, add_generation_prompt=True)
            marks = find_marks(asked, "0")
            given = num_common(before, asked[marks[-1].end if marks else 0 :])
            for token in self._tokens.finditer(before):
                if token.start() < given < token.end():
                    given = token.start()
        # a tokenizer glues blanks to what follows them, so they go where that goes
        while given and (
            before[given - 1] == " "
            or (before[given - 1].isspace() and before[given : given + 1].isspace())
        ):
            given -= 1
        return given

    def _end_of_turn(self, behind: str, start: int) -> int | None:
        """Where the end-of-turn tokens end in a text that goes on with `behind` at `start`.

        Those that follow an answer in the middle of a conversation and at its end alike; where the
        two have nothing in common, the first.
        """
        run = self._run(behind)
        if not run:
            return None
        num_tokens = num_common(run, self._closings[0]) or 1
        blanks = len(behind) - len(behind.lstrip())
        return start + blanks + len("".join(run[:num_tokens]))

    @functools.cached_property
    def _closings(self) -> tuple[list[str], list[str]]:
        """Tokens right behind an answer: when it is the last message, and before a user's turn."""
        runs: list[list[str]] = []
        for roles in (("user", "assistant"), ("user", "assistant", "user")):
            try:
                text = self.render(marked([_message(role) for role in roles], "0"))
                runs.append(self._run(text_behind(text, find_marks(text, "0"), 1)))
            except ChatTemplateError:
                runs.append([])
        return runs[0], runs[1]

    def _run(self, text: str) -> list[str]:
        """Tokens that `text` begins with, after blanks."""
        run, at = [], len(text) - len(text.lstrip())
        while token := self._tokens.match(text, at):
            run.append(token[0])
            at = token.end()
        return run

    @functools.cached_property
    def _tokens(self) -> re.Pattern[str]:
        """Any spelling that the tokenizer keeps whole: special and other added tokens."""
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values()]
        tokens = {t for t in [*self.tokenizer.all_special_tokens, *added] if t.strip()}
        longest_first = sorted(tokens, key=lambda token: (-len(token), token))
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _message(role: str) -> ChatMessage:
    return {"role": role, "content": ""}


def _in_parts(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def _start(text: str, answer: int, head: str) -> int:
    """Where a turn begins whose answer begins at `answer`, behind its `head`."""
    if not text.endswith(head, 0, answer):
        raise ChatTemplateError(
            f"expected {head!r} before an answer, but the template renders "
            f"{text[:answer][-40:]!r} there, so where the turn begins is not certain; {_TAG}"
        )
    return answer - len(head)
