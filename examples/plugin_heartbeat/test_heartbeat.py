"""The conformance kit of multi_token on the sense `heartbeat`, and what is its own."""

from pathlib import Path

import pytest
from multi_token_heartbeat import HeartbeatModality

from multi_token import Fetch, MultiTokenError
from multi_token.testing import assert_conforms


def test_it_keeps_the_contract(tmp_path: Path) -> None:
    fields, sources = HeartbeatModality.example(tmp_path)
    assert_conforms(HeartbeatModality(**fields), sources)


def test_a_word_is_refused_with_a_sentence() -> None:
    with pytest.raises(MultiTokenError, match="expected numbers for heartbeat"):
        HeartbeatModality().load(["fast"], Fetch())
