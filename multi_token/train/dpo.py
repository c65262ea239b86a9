"""Learns to prefer: batches of chosen and rejected answers, the DPO losses, what they did.

Border: tensors and batches; how the reference comes about is reference.py's, the step is the
trainer's. TRL has the same losses inside of its own trainer only: docs/decisions/0024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from multi_token.collate import Collator
from multi_token.recipe.train import DpoSpec
from multi_token.types import IGNORE_INDEX, Batch, Sample

REFERENCE = "reference"
"""The key of a batch under which the reference's log-probabilities stand: float32 [pairs, 2]."""


@dataclass(frozen=True)
class PreferencePair:
    """A row with two answers. `reference`: float32 [2], their log-probabilities at the stage's
    beginning, the chosen one's first.
    """

    sample: Sample
    reference: Tensor

    @property
    def id(self) -> str:
        """The row's name."""
        return self.sample.id


class PreferenceDataset(Dataset[PreferencePair]):
    """Samples with rejected answers, beside what the reference says of them once that is known."""

    def __init__(self, samples: Any, lengths: Sequence[tuple[int, int]]) -> None:
        """`samples`: a dataset of Samples that have `rejected`.

        `lengths`: tokens of each with its chosen and with its rejected answer.
        """
        self.samples = samples
        self.lengths = list(lengths)
        self.reference = torch.zeros(len(samples), 2)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> PreferencePair:
        return PreferencePair(self.samples[index], self.reference[index])

    @property
    def num_tokens(self) -> list[int]:
        """Of each pair, both answers with their prompts."""
        return [chosen + rejected for chosen, rejected in self.lengths]

    @property
    def longest(self) -> int:
        """Tokens of the longest answer with its prompt."""
        return max(map(max, self.lengths))


@dataclass(frozen=True)
class PreferenceCollator:
    """Batches of pairs: all chosen answers, then all rejected ones."""

    collator: Collator
    """Pads to the right."""

    def __call__(self, samples: Sequence[PreferencePair | Sample]) -> Batch | dict[str, Any]:
        """n pairs -> their Batch of [2n, longest], with `reference` float32 [n, 2].

        Media are encoded once for both answers. Samples without a reference, which evaluation has,
        become an ordinary Batch.
        """
        pairs = [pair for pair in samples if isinstance(pair, PreferencePair)]
        if len(pairs) < len(samples):
            return self.collator([sample for sample in samples if isinstance(sample, Sample)])
        chosen = [pair.sample for pair in pairs]
        rejected = [sample.rejected for sample in chosen if sample.rejected is not None]
        batch = self.collator([*chosen, *(replace(r, media_spans=[], media=[]) for r in rejected)])
        time = batch["input_ids"].shape[1]
        again: dict[str, list[Tensor]] = {name: [] for name in batch["media"]}
        for row, sample in enumerate(rejected, start=len(chosen)):
            for place in sample.media_spans:
                first = row * time + place.start
                again[place.modality].append(torch.arange(first, first + place.length))
        for name, media in batch["media"].items():
            media["positions"] = torch.cat([media["positions"], *again[name]])
            media["copies"] = 2
        return {**batch, REFERENCE: torch.stack([pair.reference for pair in pairs])}


def sequence_logps(logits: Tensor, shift_labels: Tensor) -> Tensor:
    """Log-probability of each row's learned tokens: [rows], in float32.

    logits [num_supervised, vocabulary], of the positions of shift_labels int64 [rows, time] that
    are not `IGNORE_INDEX`, row by row.
    """
    keep = shift_labels != IGNORE_INDEX
    of_tokens = -nn.functional.cross_entropy(logits.float(), shift_labels[keep], reduction="none")
    # by position and then summed, not added by row: sums of a GPU would differ from run to run
    return of_tokens.new_zeros(keep.shape).masked_scatter(keep, of_tokens).sum(-1)


def dpo_losses(logratios: Tensor, num_tokens: Tensor, spec: DpoSpec) -> Tensor:
    """The loss of each pair: [pairs].

    logratios [pairs, 2]: log of the model's probability of the chosen and of the rejected answer
    over the reference's, r_c and r_r. num_tokens [pairs, 2]: the answers' lengths n_c and n_r.
    With d = r_c - r_r, s the label smoothing and b `beta`:

    - `sigmoid`: -(1 - s) log sigmoid(b d) - s log sigmoid(-b d). Rafailov et al.,
      arXiv:2305.18290, equation 7; smoothed as in Mitchell, A note on DPO with noisy preferences
      (2023).
    - `ipo`: (r_c / n_c - r_r / n_r - 1 / (2 b))^2. Azar et al., arXiv:2310.12036, equation 17, of
      means over tokens as its authors compute it (and TRL), so that `beta` does not hang on length.
    - `hinge`: max(0, 1 - b d). Zhao et al., SLiC-HF, arXiv:2305.10425, on DPO's rewards.
    """
    if spec.loss == "ipo":
        chosen, rejected = (logratios / num_tokens.clamp(min=1)).unbind(-1)
        return (chosen - rejected - 1 / (2 * spec.beta)) ** 2
    margins = spec.beta * (logratios[:, 0] - logratios[:, 1])
    if spec.loss == "hinge":
        return torch.relu(1 - margins)
    kept = -nn.functional.logsigmoid(margins)
    swapped = -nn.functional.logsigmoid(-margins)
    return (1 - spec.label_smoothing) * kept + spec.label_smoothing * swapped


class DpoLoss:
    """Takes the reference out of one batch at a time, and then is its loss. It counts what it saw.

    Logged are the means over pairs since the last log, under TRL's names: `rewards/chosen` and
    `rewards/rejected` (`beta` times the log-ratios), `rewards/margins` between them,
    `rewards/accuracies` (how often the chosen one's is larger), `logps/chosen`, `logps/rejected`.
    """

    _NAMES = (
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    )

    def __init__(self, spec: DpoSpec) -> None:
        self.spec = spec
        self.reference: Tensor | None = None
        """Of the batch that was read last, [pairs, 2]; None for a batch without pairs."""
        self.shift_labels = torch.zeros(0, 0, dtype=torch.long)
        self._sums: Tensor | None = None
        self._gather: Callable[[Tensor], Tensor] | None = None

    def read(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A batch as the model takes it, without the reference."""
        self.reference, self.shift_labels = inputs.get(REFERENCE), inputs["shift_labels"]
        return {key: value for key, value in inputs.items() if key != REFERENCE}

    def loss(
        self, outputs: Any, labels: Any = None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Of the batch that was read last, from the model's logits [num_supervised, vocabulary].

        Summed over pairs and divided by `num_items_in_batch`, the number of pairs of a step over
        all devices. A batch without pairs has the model's own loss.
        """
        if self.reference is None:
            return outputs.loss
        logps = sequence_logps(outputs.logits, self.shift_labels).view(2, -1).T
        num_tokens = (self.shift_labels != IGNORE_INDEX).sum(-1).view(2, -1).T
        logratios = logps - self.reference
        losses = dpo_losses(logratios, num_tokens, self.spec)
        self._count(losses.detach(), logps.detach(), self.spec.beta * logratios.detach())
        return losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)

    def as_pair_counts(self, batches: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Batches by which transformers counts the pairs of a step as if they were labels.

        Those without pairs are what they are.
        """
        found: list[Mapping[str, Any]] = []
        for batch in batches:
            if REFERENCE in batch:
                pairs = batch["labels"].new_zeros(len(batch[REFERENCE]))
                batch = {"labels": pairs, "shift_labels": pairs}
            found.append(batch)
        return found

    def _count(self, losses: Tensor, logps: Tensor, rewards: Tensor) -> None:
        margins = rewards[:, 0] - rewards[:, 1]
        facts = torch.stack([losses, *rewards.T, margins, (margins > 0).float(), *logps.T], -1)
        facts = torch.cat([facts, facts.new_ones(len(facts), 1)], -1)
        if self._gather is not None:
            facts = self._gather(facts)
        sums = facts.sum(0)
        self._sums = sums if self._sums is None else self._sums + sums

    @contextmanager
    def evaluation_mode(self, gather: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Within, pairs are counted apart from those that were learned from.

        `gather`: facts of pairs [pairs, facts] on this device -> on all devices, each pair once.
        """
        before, self._sums, self._gather = self._sums, None, gather
        try:
            yield
        finally:
            self._sums, self._gather = before, None

    def metrics(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Means over pairs since the last call; `reduce` sums a tensor over all devices.

        With `loss` while it is evaluated; in training, that is logged by the trainer.
        """
        if self._sums is None:
            return {}
        *sums, num_pairs = (self._sums if reduce is None else reduce(self._sums)).tolist()
        self._sums = None
        found = {name: total / num_pairs for name, total in zip(self._NAMES, sums, strict=True)}
        if self._gather is None:
            del found["loss"]
        return found
