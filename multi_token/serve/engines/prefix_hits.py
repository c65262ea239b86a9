"""How much of each prompt an engine had computed already, when it was first read.

Border: counts what engines hand in; what is shared, and when, is theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multi_token.serve.engines.scheduler import GenerationRequest


class PrefixCacheStats:
    """Of all prompts so far. `num_queries`: their tokens; `num_hits`: those computed before."""

    def __init__(self) -> None:
        self.num_queries = 0
        self.num_hits = 0

    def record(self, request: GenerationRequest, num_there: int) -> None:
        """A prompt is read, of which so many tokens are there. The first time counts: later it may
        find what it left itself.
        """
        if request.num_cached is None:
            request.num_cached = num_there
            self.num_queries += len(request.prompt.input_ids)
            self.num_hits += num_there
