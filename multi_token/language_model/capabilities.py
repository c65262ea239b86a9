"""What a language model was found to be able to do, and a sentence for each thing that it cannot.

Border: the findings only. probe.py makes them; training, packing, asking and serving ask for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from multi_token.errors import LanguageModelError
from multi_token.language_model.forward import Start

_LACKS = {
    "pads_left": (
        "{name} answers otherwise when its rows are padded on the left, so only prompts of one "
        "length are answered together"
    ),
    "selects_logits": (
        "{name} does not select logits by a mask, so all logits are computed and the supervised "
        "ones taken, which needs more memory"
    ),
    "isolates_packed": (
        "{name} cannot take packed rows: what stands in one row changes what comes of the next; "
        "leave them padded"
    ),
    "branches": (
        "{name} cannot go on from one start several times in a packed row: it does not run on "
        "`sdpa`, or not all of its layers see everything before them; set train.share_media to "
        "false"
    ),
    "repeats_cache": (
        "{name} keeps no key-value cache that could be repeated for each row, so a shared start "
        "cannot be computed once; set train.share_prefix to false"
    ),
}


@dataclass(frozen=True)
class Capabilities:
    """What was found. A model that cannot be driven at all has none: `probe.probe` raises."""

    name: str
    """The model's class."""
    embedding_scale: float
    """What embeddings must be multiplied with to be what the model makes of ids."""
    needs_ids: bool
    """Layers look ids up: they are passed beside the embeddings."""
    starts_from: Start
    """How a prompt is continued: see `drive.continue_text`."""
    pads_left: bool
    """Rows padded on the left answer as they do alone. Padding on the right is exact for all."""
    selects_logits: bool
    """The head computes logits at supervised positions only."""
    num_exact_tokens: int | None
    """Rows change each other in a batch with one longer than this: see `drive.num_exact_tokens`."""
    trials: Mapping[str, Callable[[], bool]] = field(repr=False, compare=False)
    """Of what is tried when it is first asked for."""

    @cached_property
    def isolates_packed(self) -> bool:
        """Rows packed into one, with positions that begin anew, do not see each other.

        Tried when first asked for, as only packing needs it.
        """
        return self.trials["isolates_packed"]()

    @cached_property
    def attends_by_segment(self) -> bool:
        """Packed rows are right with segment_attention.py, which is faster than a mask over all
        of them.

        Tried when first asked for.
        """
        return self.trials["attends_by_segment"]()

    @cached_property
    def branches(self) -> bool:
        """Packed rows may share a start, computed once, that each of them goes on from.

        Tried when first asked for.
        """
        return self.trials["branches"]()

    @cached_property
    def repeats_cache(self) -> bool:
        """A start that all rows share can be computed once. Tried when first asked for."""
        return self.trials["repeats_cache"]()

    def require(self, what: Literal["isolates_packed", "branches", "repeats_cache"]) -> None:
        """Raise LanguageModelError, with the reason, if the model cannot do it."""
        if not getattr(self, what):
            raise LanguageModelError(_LACKS[what].format(name=self.name))

    def findings(self) -> list[str]:
        """What differs from the plain case, in words; nothing if all is plain."""
        said = []
        if self.embedding_scale != 1.0:
            said.append(f"embeddings are multiplied by {self.embedding_scale:g}, as ids' are")
        if self.needs_ids:
            said.append("its layers get the ids too; a media span shows them the filler id")
        if self.starts_from == "ids":
            said.append("answers go on from a cache of the prompt, by ids")
        for what in ("pads_left", "selects_logits"):
            if not getattr(self, what):
                said.append(_LACKS[what].format(name=self.name))
        if self.num_exact_tokens is not None:
            said.append(
                f"in a batch with a row of more than {self.num_exact_tokens} tokens it scales the "
                "positions of all rows by the longest (see rope_type in its config.json): keep "
                "data.max_tokens below, or train longer rows one at a time"
            )
        return said

    def answers_together(self, longest: int) -> bool:
        """Whether prompts of several lengths, the longest with its answer so long, may be padded
        to one batch and are answered as each alone.
        """
        return self.pads_left and (
            self.num_exact_tokens is None or longest <= self.num_exact_tokens
        )
