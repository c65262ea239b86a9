"""The golden request: whether an engine has the weights that a run was exported with.

Border: reads manifest.json, says what is asked and whether an answer is right; sending is
engine_pool.py's, and what is done with an engine that is wrong as well.
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

MANIFEST = "manifest.json"
_SCHEMA = 1
_NUM_LOGPROBS = 5


@dataclass(frozen=True)
class GoldenRequest:
    """A prompt, and how the exported language model goes on with it."""

    input_ids: tuple[int, ...]
    greedy_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of `greedy_ids`, each behind those before it."""
    embedding_scale: float = 1.0
    """What the language model multiplies looked up embeddings with, outside of the look-up."""
    needs_ids: bool = False
    """Its layers look ids up, which embeddings do not have."""
    folder: str = "language_model"
    """What an engine is to be started with."""

    @property
    def sampling_params(self) -> SamplingParams:
        """How it is asked: greedily, no further than is known, and behind ends of turn."""
        return SamplingParams(len(self.greedy_ids), num_logprobs=_NUM_LOGPROBS, ignore_eos=True)

    @property
    def prompt(self) -> Prompt:
        """The prompt, of which nothing is media."""
        return Prompt(torch.tensor(self.input_ids), (), (), ())

    def mismatch(self, tokens: Sequence[TokenEvent], tolerance: float) -> str | None:
        """What is wrong with an answer, or None.

        `tolerance`: of log-probabilities, by which other kernels and another device may round
        otherwise. Ids are compared as far as they are the same. Where they part, the expected id
        must be as likely as the chosen one within the tolerance; what follows is another text then
        and says nothing. Ids alone would let another model pass that happens to begin alike (the
        one from before the adapter was merged, say), hence the log-probabilities.
        """
        if len(tokens) != len(self.greedy_ids):
            return f"{len(tokens)} tokens came, expected {len(self.greedy_ids)}"
        for step, token in enumerate(tokens):
            expected, logprob = self.greedy_ids[step], self.logprobs[step]
            if token.logprob is None:
                return "no log-probabilities came"
            if token.id != expected:
                other = dict(token.top).get(expected, -torch.inf)
                if token.logprob - other <= tolerance:
                    return None
                ids = [token.id for token in tokens]
                return f"ids {ids} came, expected {list(self.greedy_ids)}"
            if abs(token.logprob - logprob) > tolerance:
                return (
                    f"id {expected} came with log-probability {token.logprob:.3f}, "
                    f"expected {logprob:.3f}"
                )
        return None


def logprob_tolerance(dtype: torch.dtype) -> float:
    """What log-probabilities may differ by between two machines that are right."""
    return 0.02 if dtype in (torch.float32, torch.float64) else 0.5


def read_golden(run: Path) -> GoldenRequest:
    """The golden request of an exported folder. Raises CheckpointError."""
    command = f"`multi-token export RUN --to language-model --out {run.name or 'OUT'}`"
    path = run / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{run} has no {MANIFEST}, which the backend vllm checks its engines by; write a "
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
            f"{path} is not what this version reads ({type(error).__name__}: {error}); write it "
            f"again with {command}"
        ) from None
    if not found.input_ids or not 0 < len(found.greedy_ids) == len(found.logprobs):
        raise CheckpointError(f"{path} has an empty golden request; write it again with {command}")
    return found
