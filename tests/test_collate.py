"""collate.py: cached features and encoder inputs of one sense do not mix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from multi_token.collate import FEATURES_KEY, Collator
from multi_token.errors import MultiTokenError
from multi_token.types import Prepared


def test_cached_features_of_different_lengths_are_padded_with_their_mask(model: Any) -> None:
    items = [Prepared({FEATURES_KEY: torch.ones(n, 4)}, num_features=n) for n in (1, 3)]
    batch = Collator(model.modalities, 0).inputs("vector", items)
    assert batch[FEATURES_KEY].shape == (2, 3, 4)
    assert batch["mask"].tolist() == [[True, False, False], [True, True, True]]


def test_items_of_which_only_some_are_cached_are_refused(model: Any) -> None:
    cached = Prepared({FEATURES_KEY: torch.ones(1, 5)}, num_features=1)
    plain = model.modalities["vector"].prepare([0.0, 1.0, 2.0, 3.0, 4.0])
    collate = Collator(model.modalities, 0)
    for items in ([cached, plain, plain], [plain, plain, cached]):
        with pytest.raises(MultiTokenError, match="1 of 3 items of 'vector' come with cached"):
            collate.inputs("vector", items)
