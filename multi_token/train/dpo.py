"""Preference optimization: the DPO losses, and datasets and batches of chosen and rejected answers.

TRL has the same losses, but only inside of its own trainer: docs/decisions/0024. The log-
probabilities of the reference are computed before the stage begins: `train.dpo_reference`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from multi_token.collate import Collator
from multi_token.language_model.loss import token_losses
from multi_token.recipe.train import DpoSpec
from multi_token.train.objective import Objective, Reduce
from multi_token.types import IGNORE_INDEX, Batch, Sample

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration

REFERENCE = "reference"
"""Key of a batch that holds the log-probabilities of the reference: float32 [pairs, 2]."""


@dataclass(frozen=True)
class PreferencePair:
    """Row with two answers. `reference`: float32 [2], log-probability of the chosen and of the
    rejected answer when the stage began."""

    sample: Sample
    reference: Tensor


class PreferenceDataset(Dataset[PreferencePair]):
    """Samples with rejected answers; `reference` is zero until `train.dpo_reference` fills it."""

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
        """Tokens of each pair: both answers with their prompts."""
        return [chosen + rejected for chosen, rejected in self.lengths]


@dataclass(frozen=True)
class PreferenceCollator:
    """Batches of pairs: all chosen answers, then all rejected ones, padded to the right."""

    collator: Collator

    def __call__(self, samples: Sequence[PreferencePair | Sample]) -> Batch | dict[str, Any]:
        """n pairs -> their Batch of [2n, longest], with `reference` float32 [n, 2].

        Media are encoded once for both answers. Samples without a reference become an ordinary
        Batch: evaluation has them where no held-out row has two answers.
        """
        pairs = [pair for pair in samples if isinstance(pair, PreferencePair)]
        if len(pairs) < len(samples):
            return self.collator([sample for sample in samples if isinstance(sample, Sample)])
        chosen = [pair.sample for pair in pairs]
        rejected = [sample.rejected for sample in chosen if sample.rejected is not None]
        batch = self.collator([*chosen, *(replace(r, media_spans=[], media=[]) for r in rejected)])
        time = batch["input_ids"].shape[1]
        # The rejected rows were collated without media; here their spans get the positions at which
        # the model writes the same embeddings a second time (`copies`).
        again: dict[str, list[Tensor]] = {name: [] for name in batch["media"]}
        for row, sample in enumerate(rejected, start=len(chosen)):
            for span in sample.media_spans:
                again[span.modality].append(span.positions(row * time))
        for name, media in batch["media"].items():
            media["positions"] = torch.cat([media["positions"], *again[name]])
            media["copies"] = 2
        return {**batch, REFERENCE: torch.stack([pair.reference for pair in pairs])}


def sequence_logps(losses: Tensor, shift_labels: Tensor, supervised: Tensor) -> Tensor:
    """Log-probability of each row's supervised tokens: [rows], in float32.

    losses [num_supervised]: cross entropy at the positions `supervised` of the flattened
    shift_labels int64 [rows, time].
    """
    # by position and then summed, not added by row: `index_add` on a GPU differs from run to run
    places = losses.new_zeros(shift_labels.numel()).index_copy(0, supervised, -losses)
    return places.view(shift_labels.shape).sum(-1)


def dpo_losses(logratios: Tensor, num_tokens: Tensor, spec: DpoSpec) -> Tensor:
    """The loss of each pair: [pairs].

    logratios [pairs, 2]: log of the model's probability of the chosen and of the rejected answer
    over the reference's, r_c and r_r. num_tokens [pairs, 2]: the answers' lengths n_c and n_r.
    With d = r_c - r_r, s the label smoothing and b `beta`:

    - `sigmoid`: -(1 - s) log sigmoid(b d) - s log sigmoid(-b d). Rafailov et al.,
      arXiv:2305.18290, equation 7; smoothed as in Mitchell, A note on DPO with noisy preferences
      (2023).
    - `ipo`: (r_c / n_c - r_r / n_r - 1 / (2 b))^2. Azar et al., arXiv:2310.12036, equation 17, of
      means over tokens as its authors and TRL compute it, so that `beta` suits every length.
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


class DpoLoss(Objective):
    """DPO, IPO or hinge loss of one batch at a time, with metrics under TRL's names.

    Metrics are means over pairs since the last log.
    """

    METRICS = (
        "loss",
        "rewards/chosen",  # `beta` times the log-ratio
        "rewards/rejected",
        "rewards/margins",  # chosen less rejected
        "rewards/accuracies",  # share of pairs with a positive margin
        "logps/chosen",
        "logps/rejected",
    )

    def __init__(self, spec: DpoSpec) -> None:
        self.spec = spec
        self.reference: Tensor | None = None
        """Reference of the current batch, [pairs, 2]; None for a batch without pairs."""
        self.shift_labels = torch.zeros(0, 0, dtype=torch.long)
        self.supervised = torch.zeros(0, dtype=torch.long)
        self._sums: Tensor | None = None
        self._gather: Reduce | None = None

    def collator(self, collator: Collator, *, packed: bool) -> PreferenceCollator:
        return PreferenceCollator(collator)

    def before_forward(
        self, model: MultiTokenForConditionalGeneration, inputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return a batch without the reference, which is kept for `loss`."""
        self.reference, self.shift_labels = inputs.get(REFERENCE), inputs["shift_labels"]
        self.supervised = inputs["supervised"]
        own = {key: value for key, value in inputs.items() if key != REFERENCE}
        return {**own, "returns": token_losses(self.shift_labels, self.supervised)}

    def loss(
        self, outputs: Any, labels: Any = None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Loss [] of the batch of `before_forward`, from cross entropy of each token.

        Summed over pairs and divided by `num_items_in_batch`, the number of pairs of a step on all
        devices. A batch without pairs has cross entropy.
        """
        if self.reference is None:
            # an evaluation of rows without two answers
            losses = outputs.per_token
            return losses.sum() / (
                len(losses) if num_items_in_batch is None else num_items_in_batch
            )
        # the collator puts all chosen answers before all rejected ones
        logps = sequence_logps(outputs.per_token, self.shift_labels, self.supervised).view(2, -1).T
        num_tokens = (self.shift_labels != IGNORE_INDEX).sum(-1).view(2, -1).T
        logratios = logps - self.reference
        losses = dpo_losses(logratios, num_tokens, self.spec)
        self._count(losses.detach(), logps.detach(), self.spec.beta * logratios.detach())
        return losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)

    def countable(self, batches: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return batches with one label for each pair; those without pairs as they are."""
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
        # before summing: accelerate repeats rows to fill the last batch of an evaluation, and only
        # its gather drops them again
        if self._gather is not None:
            facts = self._gather(facts)
        # stays on the device: it is read only when metrics are logged
        sums = facts.sum(0)
        self._sums = sums if self._sums is None else self._sums + sums

    @contextmanager
    def evaluation_mode(self, gather: Reduce) -> Iterator[None]:
        """Count pairs apart from those of training; `gather` gets facts of pairs [pairs, facts]."""
        before, self._sums, self._gather = self._sums, None, gather
        try:
            yield
        finally:
            self._sums, self._gather = before, None

    def metrics(self, reduce: Reduce | None = None) -> dict[str, float]:
        """Means over pairs since the last call; `reduce` sums a tensor over all devices."""
        if self._sums is None:
            return {}
        *sums, num_pairs = (self._sums if reduce is None else reduce(self._sums)).tolist()
        self._sums = None
        found = {name: total / num_pairs for name, total in zip(self.METRICS, sums, strict=True)}
        if self._gather is None:
            del found["loss"]  # in training the trainer logs it
        return found
