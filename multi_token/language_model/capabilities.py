"""Capabilities of a language model, and a sentence for each one that is missing.

`probe.py` finds them; training, packing, generation and serving ask for them here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from multi_token.errors import LanguageModelError
from multi_token.language_model.forward import PrefillMode

LazyCapability = Literal["supports_packing", "supports_segment_attention", "segment_reach"]
"""Capabilities that only some runs need; each is probed when it is first asked for."""

UNLIMITED_REACH = 1 << 30
"""A number of tokens that is out of reach of any sliding window."""

_LIMITATIONS = {
    "supports_left_padding": (
        "{name} gives other answers when its rows are padded on the left, so only prompts of one "
        "length are batched"
    ),
    "supports_logits_to_keep": (
        "{name} does not compute logits at chosen positions only, so all logits are computed and "
        "the supervised ones taken, which needs more memory"
    ),
    "supports_chunked_logits": (
        "{name} computes logits only together with its layers, so those of all supervised tokens "
        "are held at once, whatever train.logits_megabytes is"
    ),
    "supports_packing": (
        "{name} cannot take packed rows: the content of one row changes the logits of the next; "
        "set train.packing to false"
    ),
    "supports_shared_prefix": (
        "{name} cannot share a prefix among packed rows: it does not run on `sdpa`, or not all of "
        "its layers attend to everything before them; set train.packing to true, without `share`"
    ),
}


@dataclass
class Capabilities:
    """Findings of the startup probe about one language model.

    `probe.probe` makes them, and raises LanguageModelError for a model that cannot be used.
    """

    name: str
    """Class of the model."""
    embedding_scale: float
    """Factor that turns embeddings into what the model makes of ids."""
    needs_input_ids: bool
    """Layers look ids up, so ids are passed beside the embeddings."""
    prefill_mode: PrefillMode
    """How `generate` starts: see `forward.generate_from_embeds`."""
    supports_left_padding: bool
    """Rows padded on the left give the answers that they give alone. Right padding always does."""
    supports_logits_to_keep: bool
    """The head computes logits at supervised positions only."""
    supports_chunked_logits: bool
    """Logits of a chunk of hidden states equal those of all: see `loss.supervised_output`."""
    max_batched_length: int | None
    """Rows of a batch with a longer row change: see `forward.max_batched_length`."""
    probe: Callable[[LazyCapability], int] | None = field(default=None, repr=False, compare=False)
    """Finds a lazy capability by running a few tokens; None without layers: it has none of them."""

    # found once: each of the three runs the model, which may take seconds
    @cached_property
    def supports_packing(self) -> bool:
        """Rows packed into one, with positions that restart at zero, do not see each other."""
        return bool(self._find("supports_packing"))

    @cached_property
    def supports_segment_attention(self) -> bool:
        """Packed rows are exact with segment_attention.py, which is faster than a full mask."""
        return bool(self._find("supports_segment_attention"))

    @cached_property
    def segment_reach(self) -> int:
        """Longest segment for which a table of segments may stand in place of a mask; 0: none.

        `UNLIMITED_REACH` where all layers attend to everything before them; less with a sliding
        window.
        """
        return self._find("segment_reach")

    @property
    def supports_shared_prefix(self) -> bool:
        """Packed rows may share a prefix that is computed once."""
        return self.segment_reach >= UNLIMITED_REACH

    def _find(self, capability: LazyCapability) -> int:
        return 0 if self.probe is None else self.probe(capability)

    def require(self, capability: Literal["supports_packing", "supports_shared_prefix"]) -> None:
        """Check a capability that a setting of the recipe needs.

        Raises:
            LanguageModelError: If it is missing, with the reason and the setting to change.
        """
        if not getattr(self, capability):
            raise LanguageModelError(_LIMITATIONS[capability].format(name=self.name))

    def notes(self) -> list[str]:
        """Return a sentence for each finding that differs from a plain model."""
        notes = []
        if self.embedding_scale != 1.0:
            notes.append(f"embeddings are multiplied by {self.embedding_scale:g}, as ids' are")
        if self.needs_input_ids:
            notes.append("its layers get the ids too; a media span shows them the filler id")
        if self.prefill_mode == "ids":
            notes.append("generation continues from a KV cache of the prompt, by ids")
        missing = [
            c for c in ("supports_left_padding", "supports_logits_to_keep") if not getattr(self, c)
        ]
        if self.supports_logits_to_keep and not self.supports_chunked_logits:
            missing.append("supports_chunked_logits")
        notes += [_LIMITATIONS[capability].format(name=self.name) for capability in missing]
        if self.max_batched_length is not None:
            notes.append(
                f"in a batch with a row of more than {self.max_batched_length} tokens it scales "
                "the positions of all rows by the longest (see rope_type in its config.json): keep "
                "data.max_tokens below, or train longer rows one at a time"
            )
        return notes

    def can_batch_lengths(self, longest: int) -> bool:
        """Return True if prompts of several lengths may be padded to one batch.

        Args:
            longest: Number of tokens of the longest prompt with its answer.
        """
        return self.supports_left_padding and (
            self.max_batched_length is None or longest <= self.max_batched_length
        )
