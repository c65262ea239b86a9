"""Golden request: verifies that a vLLM server runs the weights of an exported run.

The export's manifest.json holds a prompt, the greedy ids of the exported language model and their
log-probabilities. A server that gives other ones is not used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from multi_token.errors import CheckpointError
from multi_token.serve.engines.base import Prompt, SamplingParams, TokenEvent
from multi_token.serve.engines.parity import logprob_mismatch

MANIFEST = "manifest.json"
_SCHEMA = 1
_NUM_LOGPROBS = 5


@dataclass(frozen=True)
class GoldenRequest:
    """A prompt, and the exported language model's greedy continuation."""

    input_ids: tuple[int, ...]
    greedy_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Log-probability of each of `greedy_ids`, given the previous ones."""
    embedding_scale: float = 1.0
    """Factor of token embeddings that the language model applies outside of its look-up."""
    needs_ids: bool = False
    """The language model's layers look ids up, which prompts of embeddings do not have."""
    folder: str = "language_model"
    """Folder for `vllm serve`."""

    @property
    def sampling_params(self) -> SamplingParams:
        """Greedy, for the number of recorded ids."""
        # `ignore_eos`: the recorded continuation may go on past an end of turn.
        return SamplingParams(len(self.greedy_ids), num_logprobs=_NUM_LOGPROBS, ignore_eos=True)

    @property
    def prompt(self) -> Prompt:
        return Prompt(torch.tensor(self.input_ids), (), (), ())

    def mismatch(self, tokens: Sequence[TokenEvent], tolerance: float) -> str | None:
        """Return how a server's tokens differ from the recorded ones, or None."""
        expected = [
            TokenEvent(id, logprob)
            for id, logprob in zip(self.greedy_ids, self.logprobs, strict=True)
        ]
        return logprob_mismatch(tokens, expected, tolerance)


def read_golden(run: Path) -> GoldenRequest:
    """Return the golden request of an exported folder. Raises CheckpointError."""
    command = f"`multi-token export RUN --to language-model --out {run.name or 'OUT'}`"
    path = run / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{run} has no {MANIFEST}, by which --engine-url verifies vLLM servers; write a "
            f"folder that has one with {command}, and serve that"
        )
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if fields["schema"] != _SCHEMA:
            raise ValueError(f"schema {fields['schema']!r} instead of {_SCHEMA}")
        golden, described = fields["golden"], fields["language_model"]
        found = GoldenRequest(
            tuple(int(id) for id in golden["input_ids"]),
            tuple(int(id) for id in golden["greedy_ids"]),
            tuple(float(value) for value in golden["greedy_logprobs"]),
            float(described["embedding_scale"]),
            bool(described["needs_ids"]),
            str(run / described["folder"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not in the format of this version ({type(error).__name__}: {error}); write "
            f"it again with {command}"
        ) from None
    if not found.input_ids or not 0 < len(found.greedy_ids) == len(found.logprobs):
        raise CheckpointError(f"{path} has an empty golden request; write it again with {command}")
    return found
