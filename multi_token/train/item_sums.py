"""Sums over encoded items in float64: the only thing that a fit keeps of its items.

Items are encoded once, so the statistics of their features are not known when the sums are made.
The sums are therefore of features c from a provisional centre, and standardized as a whole. `group`
of a projector is linear, so with u = group(1), the share of real features in each part of a group,

    x = scale (group(c) - (mean - centre) u)

is a linear map of [group(c), u]. `is_linear` notices a projector of which that is not true.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from multi_token.distributed import all_gather, all_reduce_sum, num_processes
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.projectors.base import mask_without_newlines
from multi_token.recipe.train import ClosedFormSpec
from multi_token.types import Features, Prepared

_BLOCK_BYTES = 8 * 2**20
"""Largest piece of features or targets that is converted to float64 at once."""
_NUM_SCALED = 32
"""Distinct calibrated items on which the projector's output is scaled."""
_SCALED_BYTES = 64 * 2**20
"""Memory for their features."""


@dataclass(frozen=True)
class FitItem:
    """One item that a projector is fitted to, and how often it counts."""

    prepared: Prepared
    num_calibrated: int = 0
    """Occurrences in the rows that the feature statistics count."""
    captions: Sequence[tuple[Sequence[int], int]] = ()
    """Ids of each different target text (`target_ids`), and the number of rows with it."""
    number: int = 0
    """Number of the item among the calibrated ones of all processes."""


class ItemSums:
    """Sums over items, in float64: moments of the features, and products of groups and targets.

    A row of a product is [group, u, 1] with a provisional centre, or [group, 1] if `standardized`.
    The column of ones holds the sums and the number of rows.
    """

    def __init__(
        self,
        model: MultiTokenForConditionalGeneration,
        name: str,
        spec: ClosedFormSpec | None,
        *,
        standardized: bool = False,
    ) -> None:
        self.model, self.name = model, name
        self.projector = projector = model.projector(name)
        self.standardized = standardized
        self.in_dim = len(projector.feature_mean)
        self.device = _float64_device(projector.feature_mean.device)
        self.centre: Tensor | None = None
        # float64: a variance from sums loses the digits that mean and values have in common
        self.moments = torch.zeros(2, self.in_dim, dtype=torch.float64, device=self.device)
        self.num_features = 0
        self.num_captioned = 0
        self.scaled: list[tuple[Features, int]] = []
        self.first: Features | None = None
        self.targets = None if spec is None else Targets(model, projector.tokens_per_group, spec)
        self.num_parts = 0 if standardized else projector.group_dim // self.in_dim
        num_columns = projector.group_dim + self.num_parts + 1
        self.gram = ProductSum(num_columns, num_columns, self.device)
        num_out = projector.tokens_per_group * projector.out_dim
        self.cross = ProductSum(num_columns, num_out, self.device)

    def add(self, features: Features, batch: Sequence[FitItem]) -> None:
        """Add a batch of encoded items."""
        real = mask_without_newlines(features)
        for i, item in enumerate(batch):
            one = Features(features.values[i : i + 1], None if real is None else real[i : i + 1])
            values = one.values[0] if one.mask is None else one.values[0][one.mask[0]]
            if self.centre is None:
                self.centre = values.float().mean(0).nan_to_num()
            # a clone: a view would keep the whole batch
            if self.first is None and item.captions:
                self.first = _clone(one)
            if item.num_calibrated:
                self._add_moments(values, item.num_calibrated)
                size = values.numel() * 4 * (item.number + 1)
                # by the item alone, so that the number of processes changes nothing
                if item.number < _NUM_SCALED and (size <= _SCALED_BYTES or item.number == 0):
                    self.scaled.append((_clone(one), item.num_calibrated))
            if item.captions and self.targets is not None:
                self._add_captions(self.groups(one), item.captions, self.targets)

    def _add_moments(self, values: Tensor, count: int) -> None:
        assert self.centre is not None
        for block in values.split(rows_of_block(self.in_dim)):
            from_centre = exact(block.float() - self.centre, self.device)
            self.moments[0] += count * from_centre.sum(0)
            self.moments[1] += count * from_centre.square().sum(0)
        self.num_features += count * len(values)

    def _add_captions(
        self, groups: Tensor, captions: Sequence[tuple[Sequence[int], int]], targets: Targets
    ) -> None:
        num_rows = sum(count for _, count in captions)
        self.num_captioned += num_rows
        num_groups = len(groups)
        common = targets.common(num_groups)
        total = torch.zeros(groups.shape[1], dtype=torch.float64, device=self.device)
        step = rows_of_block(max(groups.shape[1], targets.width))
        for start in range(0, num_groups, step):
            x = exact(groups[start : start + step], self.device)
            self.gram.add(num_rows * x, x)
            if common:
                total += x.sum(0)
            else:
                self.cross.add(x, self._target(captions, targets, num_groups, start, len(x)))
        if common:
            # one target for all groups: their sum is one row, and no copy of the target is made
            self.cross.add(total[None], self._target(captions, targets, num_groups, 0, 1))

    def _target(
        self,
        captions: Sequence[tuple[Sequence[int], int]],
        targets: Targets,
        num_groups: int,
        start: int,
        num: int,
    ) -> Tensor:
        """Sum of the targets of all captions, for `num` groups from `start` on."""
        found = torch.zeros(num, targets.width, dtype=torch.float64, device=self.device)
        for ids, count in captions:
            found += count * exact(targets(ids, num_groups, start, num), self.device)
        return found

    def groups(self, one: Features) -> Tensor:
        """Rows of the products for an item [groups, columns]."""
        projector = self.projector
        if self.standardized:
            groups, present = projector.arrange(one)
            columns = [groups[present]]
        else:
            assert self.centre is not None
            values = one.values.float() - self.centre
            mask = one.mask
            if mask is None:
                mask = values.new_ones(values.shape[:2], dtype=torch.bool)
            shares = mask[..., None].to(values.dtype).expand_as(values)
            groups, present = projector.spec.group(values * mask[..., None], mask)
            ones, _ = projector.spec.group(shares, mask)
            columns = [groups[present], ones[present][:, :: self.in_dim][:, : self.num_parts]]
        return torch.cat([*columns, columns[0].new_ones(len(columns[0]), 1)], dim=1)

    def reduce(self) -> None:
        """Add the sums of all processes."""
        self.gram.flush()
        self.cross.flush()
        if num_processes() == 1:
            return
        centres = all_gather(None if self.centre is None else self.centre.cpu())
        known = [centre for centre in centres if centre is not None]
        if known:
            common = torch.stack(known).mean(0).to(self.projector.feature_mean.device)
            if self.centre is not None:
                self._move_centre(common)
            self.centre = common
        counts = torch.tensor([self.num_features, self.num_captioned], device=self.model.device)
        all_reduce_sum(counts)
        self.num_features, self.num_captioned = counts.tolist()
        all_reduce_sum(self.moments)
        if self.num_captioned:
            all_reduce_sum(self.gram.total)
            all_reduce_sum(self.cross.total)

    def _move_centre(self, common: Tensor) -> None:
        # all centres are within the features' range, so this loses no digits
        shift = self.shift_from(common)
        first = self.moments[0].clone()
        self.moments[0] -= self.num_features * shift
        self.moments[1] += self.num_features * shift.square() - 2 * shift * first
        self.standardize(shift, torch.ones_like(shift))

    def shift_from(self, mean: Tensor) -> Tensor:
        """`mean - centre`, in float64."""
        assert self.centre is not None
        return exact(mean, self.device) - exact(self.centre, self.device)

    def standardize(self, shift: Tensor, scale: Tensor) -> None:
        """Turn the sums of [group(c), u, 1] into those of [scale (group(c) - shift u), u, 1]."""
        if self.standardized or not self.gram.is_filled:
            return
        gram = self.gram.total
        for sums in (gram, gram.T, self.cross.total):
            for part in range(self.num_parts):
                rows = sums[part * self.in_dim : (part + 1) * self.in_dim]
                rows.addr_(shift, sums[self.num_parts * self.in_dim + part].clone(), alpha=-1)
                rows.mul_(scale[:, None])

    def is_linear(self) -> bool:
        """True if standardizing the sums is the same as standardizing the features."""
        if self.standardized:
            return True
        dim = self.num_parts * self.in_dim
        if dim != self.projector.group_dim:
            return False
        tried = [features for features, _ in self.scaled]
        return all(map(self._is_linear_on, [*tried, *([self.first] if self.first else [])]))

    def _is_linear_on(self, features: Features) -> bool:
        dim = self.num_parts * self.in_dim
        found = exact(self.groups(features), self.device)
        shares = found[:, dim : dim + self.num_parts].repeat_interleave(self.in_dim, 1)
        shift = self.shift_from(self.projector.feature_mean).repeat(self.num_parts)
        scale = exact(self.projector.feature_scale, self.device).repeat(self.num_parts)
        found = (found[:, :dim] - shift * shares) * scale
        groups, present = self.projector.arrange(features)
        wanted = exact(groups[present], self.device)
        return bool((found - wanted).abs().max() <= 1e-3 * wanted.abs().max() + 1e-6)


class ProductSum:
    """Sum of a'b over rows. Rows wait for a block: a product of few is all memory traffic."""

    def __init__(self, num_rows: int, num_columns: int, device: torch.device) -> None:
        self.shape = (num_rows, num_columns)
        self.device = device
        self.step = rows_of_block(max(self.shape))
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.num_waiting = 0
        self._total: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """The sum [rows, columns]; zeros before the first row."""
        if self._total is None:
            self._total = torch.zeros(self.shape, dtype=torch.float64, device=self.device)
        return self._total

    @property
    def is_filled(self) -> bool:
        """False as long as no row was added."""
        return self._total is not None

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add the rows of float64 [num, rows] and [num, columns]."""
        self.waiting.append((a, b))
        self.num_waiting += len(a)
        if self.num_waiting >= self.step:
            self.flush()

    def flush(self) -> None:
        """Add the rows that wait."""
        if self.waiting:
            a, b = (torch.cat(rows) for rows in zip(*self.waiting, strict=True))
            self.total.addmm_(a.T, b)
            self.waiting, self.num_waiting = [], 0


@dataclass
class Targets:
    """Target media embeddings of a caption: rows of the embedding table, looked up each time."""

    model: MultiTokenForConditionalGeneration
    num_tokens: int
    """Media embeddings of a group."""
    spec: ClosedFormSpec
    embedding: Any = field(init=False)
    space: int = field(init=False)
    width: int = field(init=False)
    """Width of the target of a group."""

    def __post_init__(self) -> None:
        self.embedding = self.model.get_input_embeddings()
        processor = self.model.require_processor()
        self.space = processor.tokenizer(" ", add_special_tokens=False).input_ids[-1]
        self.width = self.num_tokens * int(self.embedding.weight.shape[1])

    def common(self, num_groups: int) -> bool:
        """True if all groups of an item have the same target."""
        return num_groups > 1 and self.spec.targets == "mean"

    def __call__(self, ids: Sequence[int], num_groups: int, start: int, num: int) -> Tensor:
        """Targets of `num` of an item's groups, from `start` on [num, num_tokens * dim]."""
        if num_groups == 1:
            filled = [*ids[: self.num_tokens], *[self.space] * self.num_tokens]
            return self._embed(filled[: self.num_tokens]).reshape(1, -1)
        if self.common(num_groups):
            step = rows_of_block(self.width // self.num_tokens)
            parts = [self._embed(ids[i : i + step]).sum(0) for i in range(0, len(ids), step)]
            return (torch.stack(parts).sum(0) / len(ids)).repeat(self.num_tokens)[None]
        # the token in the middle of the part of the caption that belongs to an embedding
        num_all = num_groups * self.num_tokens
        middles = range(start * self.num_tokens, (start + num) * self.num_tokens)
        chosen = [ids[(2 * i + 1) * len(ids) // (2 * num_all)] for i in middles]
        return self._embed(chosen).reshape(num, -1)

    def _embed(self, ids: Sequence[int]) -> Tensor:
        return self.embedding(torch.tensor(ids, device=self.embedding.weight.device)).float()


def rows_of_block(width: int) -> int:
    """Rows of a width that fill a block."""
    return max(1, _BLOCK_BYTES // (8 * width))


def exact(values: Tensor, device: torch.device) -> Tensor:
    # moved first: the device of the values may have no float64
    return values.to(device).double()


def _float64_device(device: torch.device) -> torch.device:
    """Return the device, or the CPU where the device has no float64 (MPS, some GPUs of Intel)."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return torch.device("cpu")
    return device


def _clone(features: Features) -> Features:
    mask = features.mask
    return Features(features.values.clone(), None if mask is None else mask.clone())
