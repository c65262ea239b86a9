"""How much of each prompt the cache of keys and values had already, when it was first read.

Border: counts what continuous.py hands in; what is shared, and when, is transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from multi_token.serve.engine import Event, Token


class PrefixHits:
    """Of prompts by their number. `num_queries`, `num_hits`: tokens of all of them so far."""

    def __init__(self) -> None:
        self.num_queries = 0
        self.num_hits = 0
        self._by_number: dict[str, int] = {}

    def __contains__(self, number: str) -> bool:
        return number in self._by_number

    def add(self, number: str, num_tokens: int, num_there: int) -> None:
        """A prompt of so many tokens is read for the first time, and so many are there."""
        self._by_number[number] = num_there
        self.num_queries += num_tokens
        self.num_hits += num_there

    def forget(self, number: str) -> None:
        """A prompt has ended."""
        self._by_number.pop(number, None)

    def telling(
        self, emit: Callable[[Event], None], number: Callable[[], str]
    ) -> Callable[[Event], None]:
        """`emit`, whose first token tells how many of its prompt's were there."""
        is_first = True

        def told(event: Event) -> None:
            nonlocal is_first
            if is_first and isinstance(event, Token):
                is_first = False
                event = replace(event, num_cached=self._by_number.get(number(), 0))
            emit(event)

        return told
