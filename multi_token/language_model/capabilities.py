"""What a language model was found to be able to do, and a sentence for each thing that it cannot.

Border: the findings only. probe.py makes them; training, packing, asking and serving ask for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from multi_token.errors import LanguageModelError
from multi_token.language_model.forward import PrefillMode

_LIMITATIONS = {
    "supports_left_padding": (
        "{name} answers otherwise when its rows are padded on the left, so only prompts of one "
        "length are answered together"
    ),
    "supports_logits_to_keep": (
        "{name} does not select logits by a mask, so all logits are computed and the supervised "
        "ones taken, which needs more memory"
    ),
    "supports_packing": (
        "{name} cannot take packed rows: what stands in one row changes what comes of the next; "
        "leave them padded"
    ),
    "supports_shared_prefix": (
        "{name} cannot share a prefix among packed rows: it does not run on `sdpa`, or not all of "
        "its layers attend to everything before them; set train.packing to true, without `share`"
    ),
}


@dataclass(frozen=True)
class Capabilities:
    """What was found. A model that cannot be driven at all has none: `probe.probe` raises."""

    name: str
    """The model's class."""
    embedding_scale: float
    """What embeddings must be multiplied with to be what the model makes of ids."""
    needs_input_ids: bool
    """Layers look ids up: they are passed beside the embeddings."""
    prefill_mode: PrefillMode
    """How a prompt is continued: see `drive.continue_text`."""
    supports_left_padding: bool
    """Rows padded on the left answer as they do alone. Padding on the right is exact for all."""
    supports_logits_to_keep: bool
    """The head computes logits at supervised positions only."""
    max_batched_length: int | None
    """Rows change each other in a batch with one longer than this: see `drive.num_exact_tokens`."""
    probes: Mapping[str, Callable[[], bool]] = field(repr=False, compare=False)
    """Of what is tried when it is first asked for."""

    @cached_property
    def supports_packing(self) -> bool:
        """Rows packed into one, with positions that begin anew, do not see each other.

        Tried when first asked for, as only packing needs it.
        """
        return self.probes["supports_packing"]()

    @cached_property
    def supports_segment_attention(self) -> bool:
        """Packed rows are right with segment_attention.py, which is faster than a mask over all
        of them.

        Tried when first asked for.
        """
        return self.probes["supports_segment_attention"]()

    @cached_property
    def supports_shared_prefix(self) -> bool:
        """Packed rows may share a prefix that is computed once.

        Tried when first asked for.
        """
        return self.probes["supports_shared_prefix"]()

    def require(self, what: Literal["supports_packing", "supports_shared_prefix"]) -> None:
        """Raise LanguageModelError, with the reason, if the model cannot do it."""
        if not getattr(self, what):
            raise LanguageModelError(_LIMITATIONS[what].format(name=self.name))

    def notes(self) -> list[str]:
        """What differs from the plain case, in words; nothing if all is plain."""
        said = []
        if self.embedding_scale != 1.0:
            said.append(f"embeddings are multiplied by {self.embedding_scale:g}, as ids' are")
        if self.needs_input_ids:
            said.append("its layers get the ids too; a media span shows them the filler id")
        if self.prefill_mode == "ids":
            said.append("answers go on from a cache of the prompt, by ids")
        for what in ("supports_left_padding", "supports_logits_to_keep"):
            if not getattr(self, what):
                said.append(_LIMITATIONS[what].format(name=self.name))
        if self.max_batched_length is not None:
            said.append(
                f"in a batch with a row of more than {self.max_batched_length} tokens it "
                f"scales the "
                "positions of all rows by the longest (see rope_type in its config.json): keep "
                "data.max_tokens below, or train longer rows one at a time"
            )
        return said

    def can_batch_lengths(self, longest: int) -> bool:
        """Whether prompts of several lengths, the longest with its answer so long, may be padded
        to one batch and are answered as each alone.
        """
        return self.supports_left_padding and (
            self.max_batched_length is None or longest <= self.max_batched_length
        )
