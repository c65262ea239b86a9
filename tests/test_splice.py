"""splice.py: every disagreement is refused, and gradients reach the right tensors."""

from __future__ import annotations

import pytest
import torch

from multi_token.errors import SpliceError
from multi_token.splice import MediaEmbeds, splice


def test_tokens_are_written_at_their_positions_and_nowhere_else() -> None:
    text = torch.arange(24.0).view(2, 3, 4)
    tokens = -torch.ones(2, 4)
    spliced = splice(text, [MediaEmbeds("image", tokens, torch.tensor([1, 5]))])
    expected = text.clone()
    expected[0, 1] = expected[1, 2] = -1.0
    assert torch.equal(spliced, expected)


def test_the_text_embeddings_are_not_changed() -> None:
    text = torch.zeros(1, 3, 2)
    splice(text, [MediaEmbeds("image", torch.ones(1, 2), torch.tensor([0]))])
    assert torch.equal(text, torch.zeros(1, 3, 2))


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_splice_refuses_a_missing_or_surplus_token_with_both_counts(num_tokens: int) -> None:
    piece = MediaEmbeds("left_camera", torch.ones(num_tokens, 4), torch.tensor([0, 1]))
    with pytest.raises(SpliceError, match=f"left_camera: {num_tokens} media embeddings for 2"):
        splice(torch.zeros(1, 3, 4), [piece])


def test_splice_refuses_tokens_of_another_width() -> None:
    with pytest.raises(SpliceError, match="4 wide"):
        splice(torch.zeros(1, 3, 4), [MediaEmbeds("image", torch.ones(1, 5), torch.tensor([0]))])


def test_the_gradient_reaches_the_tokens_and_only_the_text_that_is_left() -> None:
    text = torch.zeros(1, 3, 2, requires_grad=True)
    tokens = torch.ones(1, 2, requires_grad=True)
    splice(text, [MediaEmbeds("image", tokens, torch.tensor([1]))]).sum().backward()
    assert tokens.grad is not None and text.grad is not None
    assert torch.equal(tokens.grad, torch.ones(1, 2))
    assert torch.equal(text.grad[0, :, 0], torch.tensor([1.0, 0.0, 1.0]))
