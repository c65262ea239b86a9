"""Real chat templates: supervised text and prompts, with TRL's hand-made marks as an oracle."""

from __future__ import annotations

import importlib.util
import re
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from multi_token.chat.format import ChatFormat
from multi_token.chat.template import ChatTemplate
from multi_token.errors import ChatTemplateError
from multi_token.types import Conversation


def table() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "docs" / "chat_templates.py"
    spec = importlib.util.spec_from_file_location("chat_templates", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLE = table()
trials = TABLE.part("trials")
ALL = TABLE.part("families").FAMILIES
FAMILIES = {name: family for name, family in ALL.items() if family.closes and trials.is_here(name)}
TWINS = {name: family for name, family in FAMILIES.items() if trials.twin(name) is not None}
of_each = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
of_each_twin = pytest.mark.parametrize("family", TWINS.values(), ids=TWINS)

# TRL is a development dependency; its templates are read, it is not imported.
needs_trl = pytest.mark.skipif(trials.trl_folder() is None, reason="TRL is not installed")


def shapes(family: Any) -> list[tuple[int, bool]]:
    """Turns, and whether a system message comes first."""
    return list(product((1, 2, 5), (False, True) if family.system else (False,)))


def talks_with_media(family: Any) -> list[Conversation]:
    """1, 2 and 5 turns, with media in the first, the middle and the last question."""
    return [
        trials.conversation(num_turns, system=system, media_at=media_at)
        for num_turns, system in shapes(family)
        for media_at in sorted({0, num_turns // 2, num_turns - 1})
    ]


def text_talks(family: Any) -> list[Conversation]:
    return [trials.conversation(n, system=system) for n, system in shapes(family)]


def in_turns(family: Any, num_turns: int, first: str, last: str) -> list[str]:
    """Return `first` for every turn, with `last` (unless empty) for the last one."""
    return [last if last and i == num_turns - 1 else first for i in range(num_turns)]


def to_be_supervised(family: Any, answers: list[str]) -> list[str]:
    """Head, answer and end of turn, as the published format has them."""
    heads = in_turns(family, len(answers), family.head, family.last_head)
    ends = in_turns(family, len(answers), family.end, family.last_end)
    after = family.more[1] if trials.shape_of(family).is_tagged else ""  # as its own tags say
    return [h + a + e + after for h, a, e in zip(heads, answers, ends, strict=True)]


def comparable(family: Any, texts: list[str]) -> list[str]:
    """Byte-level tokenizers give texts back as they were, the others lose and add some blanks."""
    return texts if family.kind in ("bytes", "nfc") else ["".join(text.split()) for text in texts]


def answers_of(talk: Conversation) -> list[str]:
    return [m["content"] for m in trials.plain(talk) if m["role"] == "assistant"]


@needs_trl
def test_more_than_forty_families_have_an_oracle_or_a_published_format() -> None:
    assert len(TWINS) >= 30
    assert len(FAMILIES) - len(TWINS) >= 20
    assert {family.kind for family in FAMILIES.values()} == {
        "bytes",
        "nfc",
        "llama",
        "gemma",
        "unigram",
    }


@of_each
def test_supervised_text_is_the_answers_and_their_ends_wherever_media_stand(family: Any) -> None:
    chat = trials.chat_of(family)
    for talk in talks_with_media(family):
        texts = trials.supervised_texts(chat, talk)
        expected = to_be_supervised(family, answers_of(talk))
        assert comparable(family, texts) == comparable(family, expected)


@of_each
def test_asking_gives_the_ids_that_training_saw_before_the_last_answer(family: Any) -> None:
    chat = trials.chat_of(family)
    for talk in talks_with_media(family):
        trained = chat.tokenize(talk, [3, 2])
        asked = chat.tokenize(Conversation(talk.messages[:-1]), [3, 2], prompt_only=True)
        before = trained.input_ids[: trials.runs_of(trained)[-1][0]]
        assert asked.input_ids.tolist() == before.tolist()
        assert asked.media_spans == trained.media_spans


@of_each
def test_asking_stops_where_any_supervised_turn_ends(family: Any) -> None:
    chat = trials.chat_of(family)
    for end in {family.end, family.last_end or family.end}:
        closing = chat.tokenizer(end.rstrip(), add_special_tokens=False).input_ids[-1]
        assert closing in chat.end_of_turn_ids, (end, chat.end_of_turn_ids)


@of_each
def test_ids_of_text_are_the_tokenizers_own_with_no_second_bos(family: Any) -> None:
    chat, shape = trials.chat_of(family), trials.shape_of(family)
    for talk in text_talks(family):
        messages = trials.plain(talk)
        own = chat.tokenizer.apply_chat_template(
            trials.in_parts(messages) if shape.takes_content_parts else messages,
            chat_template=chat.template,
        )["input_ids"]
        ours = chat.tokenize(talk, []).input_ids.tolist()
        # closed by the next turn's opening, which a last answer lacks; TRL adds it as well
        closed = family.name in ("glm4moe", "nemotron_mini")
        assert ours == own + chat.end_of_turn_ids * closed
        written = shape.render(messages).count(family.bos) if family.bos else 0
        assert ours.count(chat.tokenizer.bos_token_id) == written
        assert ours[1] != chat.tokenizer.bos_token_id


@of_each_twin
def test_what_is_supervised_is_what_trls_twin_marks_but_for_what_is_named(family: Any) -> None:
    """Name a part of the prompt before a turn, and the text after its end."""
    shape = trials.shape_of(family)
    for talk in text_talks(family):
        messages, answers = trials.plain(talk), answers_of(talk)
        text, spans = shape.render_with_spans(messages)
        twin = trials.marked_by_twin(family, messages)
        for answer in answers[:-1]:
            text = text.replace(answer, family.twin_head + answer)
        assert twin.text == text
        ours = to_be_supervised(family, answers)
        assert [shape.render_with_spans(messages)[0][s.start : s.end] for s in spans] == ours
        before, after = ("", "") if shape.is_tagged else family.more
        befores = [family.twin_head or before] * (len(answers) - 1) + [before]
        afters = in_turns(family, len(answers), after, family.last_more)
        assert twin.marks == [b + o + a for b, o, a in zip(befores, ours, afters, strict=True)]


@of_each_twin
def test_what_the_twin_marks_before_a_turn_is_the_end_of_the_prompt(family: Any) -> None:
    messages = trials.plain(trials.conversation(1))[:-1]
    text, end = trials.shape_of(family).render_prompt(messages)
    assert text[:end].endswith(family.more[0])


@of_each_twin
def test_a_twin_can_be_named_in_a_recipe_and_is_followed_to_the_letter(family: Any) -> None:
    tokenizer = trials.chat_of(family).tokenizer
    shape = ChatTemplate(trials.twin(family.name), tokenizer)
    for num_turns in (1, 3):
        messages = trials.plain(trials.conversation(num_turns))
        text, spans = shape.render_with_spans(messages)
        twin = trials.marked_by_twin(family, messages)
        assert text == twin.text
        assert [text[span.start : span.end] for span in spans] == twin.marks


@of_each
def test_generated_ids_are_read_without_what_the_template_adds(family: Any) -> None:
    chat = trials.chat_of(family)
    sample = chat.tokenize(trials.conversation(2), [])
    start, end = trials.runs_of(sample)[-1]
    assert chat.decode(sample.input_ids[start:end]).strip() == "It is cat 1."


@of_each
def test_a_system_message_is_shown_or_refused_with_the_templates_own_words(family: Any) -> None:
    chat = trials.chat_of(family)
    talk = trials.conversation(2, system=True)
    if family.system:
        decoded = chat.tokenizer.decode(chat.tokenize(talk, []).input_ids)
        assert "Be brief." in decoded
    else:
        with pytest.raises(ChatTemplateError, match=r"refuses .* \(roles: system, user, "):
            chat.tokenize(talk, [])


@of_each
def test_a_tool_message_is_shown_and_not_supervised_or_refused(family: Any) -> None:
    chat = trials.chat_of(family)
    talk = trials.conversation(1, roles=("user", "assistant", "tool", "assistant"))
    reason = trials.refusal(chat, talk)
    if reason is not None:
        assert re.search(
            r"roles: user, assistant, tool|role tool|assistant turns with an end", reason
        )
        return
    sample = chat.tokenize(talk, [])
    said = "Question 0 of the tool?"
    assert said in chat.tokenizer.decode(sample.input_ids)
    texts = trials.supervised_texts(chat, talk)
    assert len(texts) == 2
    assert said not in "".join(texts)


@of_each
def test_an_answer_in_the_templates_own_words_is_not_taken_for_them(family: Any) -> None:
    """Answers that also occur in the header must not be located there."""
    chat = trials.chat_of(family)
    for answer in ("assistant", "final", "think", "Assistant"):
        talk = trials.conversation(3, answer=answer)
        texts = trials.supervised_texts(chat, talk)
        expected = to_be_supervised(family, [answer] * 3)
        assert comparable(family, texts) == comparable(family, expected)


@of_each
def test_only_the_last_turn_is_supervised_where_that_is_asked_for(family: Any) -> None:
    every = trials.chat_of(family)
    last = ChatFormat(every.tokenizer, every.template, train_on_turns="last")
    talk = trials.conversation(3, media_at=1)
    assert trials.supervised_texts(last, talk) == trials.supervised_texts(every, talk)[-1:]
    ids = last.tokenize(talk, [3, 2]).input_ids
    assert torch.equal(ids, every.tokenize(talk, [3, 2]).input_ids)


REASONED = "<think>\nIt purrs {}.\n</think>\n\nA cat."
KEEP_LAST = ["qwen3", "qwen3_5_think", "qwen3_6", "glm4moe", "lfm2_2_5", "lfm2_2_5_v2"]


@needs_trl
@pytest.mark.parametrize("name", KEEP_LAST)
def test_reasoning_is_supervised_where_the_template_shows_it_the_last_turn(name: str) -> None:
    texts = trials.supervised_texts(
        trials.chat_of(FAMILIES[name]), trials.conversation(3, answer=REASONED)
    )
    assert len(texts) == 3
    for text in texts[:-1]:
        assert "A cat." in text
        assert "purrs" not in text
    assert re.search(r"It purrs 2\.\s*</think>\s*A cat\.", texts[-1])


@needs_trl
@pytest.mark.parametrize("name", ["qwen3", "qwen3_8", "glm4moe"])
def test_one_turn_with_reasoning_is_what_the_twin_marks(name: str) -> None:
    family = FAMILIES[name]
    messages = trials.plain(trials.conversation(1, answer=REASONED))
    text, (span,) = trials.shape_of(family).render_with_spans(messages)
    twin = trials.marked_by_twin(family, messages)
    assert twin.text == text
    assert twin.marks == [family.more[0] + text[span.start : span.end] + family.more[1]]


@pytest.mark.parametrize("name", ["chatml", "phi4", "granite", "mistral_v7", "default"])
def test_reasoning_is_text_like_any_other_where_the_template_knows_none(name: str) -> None:
    family = FAMILIES[name]
    texts = trials.supervised_texts(trials.chat_of(family), trials.conversation(2, answer=REASONED))
    assert texts == to_be_supervised(family, [REASONED.format(i) for i in range(2)])


@needs_trl
@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3"])
def test_a_template_that_drops_the_last_answers_reasoning_is_refused(name: str) -> None:
    with pytest.raises(ChatTemplateError, match="drops the reasoning .* set `chat_template`"):
        trials.chat_of(FAMILIES[name]).tokenize(trials.conversation(1, answer=REASONED), [])


@needs_trl
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_nothink", "glm4moe", "deepseekv3", "llama3"])
def test_an_empty_think_block_in_the_row_is_not_written_twice(name: str) -> None:
    family = FAMILIES[name]
    empty = trials.conversation(2, answer="<think>\n\n</think>\n\nIt is cat {}.")
    text, _ = trials.shape_of(family).render_with_spans(trials.plain(empty))
    assert text.count("</think>") <= 2
    found = trials.supervised_texts(trials.chat_of(family), empty)
    assert [text.count("It is cat") for text in found] == [1, 1]


@needs_trl
def test_contents_go_in_parts_only_to_templates_that_show_no_plain_text() -> None:
    in_parts = {
        name for name, family in FAMILIES.items() if trials.shape_of(family).takes_content_parts
    }
    assert in_parts == {"idefics3", "llava_next", "smolvlm"}


def test_a_turn_without_an_end_is_refused_with_what_to_write() -> None:
    chat = trials.chat_of(ALL["falcon_180b"])
    for num_turns in (1, 2):
        with pytest.raises(ChatTemplateError, match=r"set `chat_template` .* \{\{ eos_token \}\}"):
            chat.tokenize(trials.conversation(num_turns), [])


@needs_trl
def test_the_table_in_the_document_is_what_a_run_gives() -> None:
    page = TABLE.PAGE.read_text(encoding="utf-8")
    assert TABLE.rendered(page) == page, "run: python docs/chat_templates.py"
