"""Text is emitted in complete characters, and ends at stop strings."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from multi_token.chat.format import ChatFormat
from multi_token.serve.detokenizer import IncrementalDetokenizer
from multi_token.testing import tiny_tokenizer

TEXT = "Käse für 3 €, 猫と犬 🐈‍⬛ — naïve; then\n\nthe first <b>two</b>  spaces."


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(tiny_tokenizer())


def pieces_of(stream: IncrementalDetokenizer, ids: list[int]) -> list[str]:
    return [stream.add(token_id) for token_id in ids] + [stream.flush()]


def ids_of(chat: ChatFormat, text: str) -> list[int]:
    return chat.tokenizer(text, add_special_tokens=False).input_ids


def test_deltas_are_complete_characters_and_add_up_to_the_text(chat: ChatFormat) -> None:
    ids = ids_of(chat, TEXT)
    assert len(ids) > len(TEXT), "characters must be split into several ids"
    pieces = pieces_of(IncrementalDetokenizer(chat), ids)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 20, "the text must come in many pieces"


def test_deltas_of_any_ids_add_up_to_the_decoded_text(chat: ChatFormat) -> None:
    chance = random.Random(0)
    for _ in range(50):
        ids = [chance.randrange(len(chat.tokenizer)) for _ in range(40)]
        assert "".join(pieces_of(IncrementalDetokenizer(chat), ids)) == chat.decode(ids)


def test_flush_emits_an_incomplete_character(chat: ChatFormat) -> None:
    ids = ids_of(chat, "a 猫")[:-1]
    stream = IncrementalDetokenizer(chat)
    assert "".join(stream.add(i) for i in ids) == "a "
    assert stream.flush() == chat.decode(ids)[2:] != ""


def test_spaces_that_a_decoder_drops_at_the_start_stay_between_deltas() -> None:
    known = {"<pad>": 0, "</s>": 1, "▁yes": 2, "▁and": 3, "▁no": 4}
    words = Tokenizer(models.WordLevel(known, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    chat = ChatFormat(tokenizer)
    ids = [2, 3, 4, 3, 2, 3, 4, 3, 2]
    pieces = pieces_of(IncrementalDetokenizer(chat), ids)
    assert pieces[:3] == ["yes", " and", " no"]
    assert "".join(pieces) == chat.decode(ids) == "yes and no and yes and no and yes"


def test_special_tokens_give_no_text(chat: ChatFormat) -> None:
    end = chat.end_of_turn_ids
    ids = [*ids_of(chat, "yes"), *end, *ids_of(chat, " no"), *end]
    assert "".join(pieces_of(IncrementalDetokenizer(chat), ids)) == "yes no"


def test_the_answer_prefix_of_the_template_gives_no_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = ChatFormat(tokenizer)
    ids = ids_of(chat, "<think>\n\n</think>\n\na red square <think>")
    pieces = pieces_of(IncrementalDetokenizer(chat), ids)
    assert "".join(pieces) == chat.decode(ids)
    assert "".join(pieces).strip() == "a red square <think>"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", [" two"], "one"),
        ("one two three", ["three", "two"], "one "),
        ("one two three", ["four"], "one two three"),
        ("one two three", ["threefold", "e f"], "one two three"),
        ("a aab aaab", ["aaab"], "a aab "),
        ("a red 猫 cat", ["猫"], "a red "),
        ("stop", ["stop"], ""),
        ("one two", [""], "one two"),
    ],
)
def test_the_text_ends_before_its_stop_string(
    chat: ChatFormat, text: str, stop: list[str], expected: str
) -> None:
    stream = IncrementalDetokenizer(chat, stop)
    handed = ""
    for token_id in ids_of(chat, text):
        handed += stream.add(token_id)
        assert expected.startswith(handed), "no text after the stop string may be emitted"
    assert handed + stream.flush() == expected
    assert stream.is_stopped == (expected != text)
    if stream.is_stopped:
        assert stream.add(ids_of(chat, " more")[0]) == stream.flush() == ""


def test_of_two_stop_strings_in_one_delta_the_first_ends_the_text(chat: ChatFormat) -> None:
    texts = {i: chat.tokenizer.decode([i]) for i in range(len(chat.tokenizer))}
    twice = next(i for i, text in texts.items() if len(text) > len(set(text)) and "<" not in text)
    letter = next(c for c in texts[twice] if texts[twice].count(c) > 1)
    stream = IncrementalDetokenizer(chat, [letter])
    assert stream.add(twice) == texts[twice].partition(letter)[0]
    assert stream.is_stopped


def test_only_a_possible_stop_string_is_held_back(chat: ChatFormat) -> None:
    stream = IncrementalDetokenizer(chat, ["<end>"])
    pieces = [stream.add(i) for i in ids_of(chat, "a<e") + ids_of(chat, "x b")]
    assert pieces[:3] == ["a", "", ""]
    assert "".join(pieces) == "a<ex b", "nothing is held back to the end"
