"""Startup probe: finds a language model's capabilities by running a few tokens through it.

No list of model names: each probe calls the functions of `forward.py` that training and
generation use, on six or twelve ids, and compares logits. The order matters:

    1. logits of ids              -> the reference, its spread, the precision
    2. logits of embeddings       -> equal to 1, also with an embedding that is no token's
    3. the loss of a shorter text -> causal? selects logits? rounding of this model
    4. `generate` from a prompt   -> logits of 2, alone and beside a longer row
    later, when asked for: packed rows, segment attention, shared prefixes

All distances are in units of the logits' standard deviation, so one tolerance serves models whose
logits differ by orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from multi_token.errors import LanguageModelError, first_line
from multi_token.language_model.capabilities import Capabilities, LazyCapability
from multi_token.language_model.forward import (
    GREEDY,
    PrefillMode,
    accepts_position_ids,
    base_language_model,
    filter_flash_attention_kwargs,
    generate_from_embeds,
    max_batched_length,
    per_layer_inputs,
)
from multi_token.language_model.loss import supervised_loss, supervised_output
from multi_token.language_model.quantization import quantized_parameters
from multi_token.language_model.segment_attention import (
    recording_mask_reach,
    segment_attention_enabled,
)

_NUM_TOKENS = 6
_MAX_DISTANCE = 1e-2
"""Largest distance between ids and embeddings of one text that counts as equal."""
_OTHER_TEXT = 0.25
"""Smallest distance that no rounding explains: the model has seen another input."""
_ROUNDING = 0.05
"""Largest distance between two kernels that compute the same numbers."""
# Errors by which other libraries refuse an operation; any other error is a defect of ours.
MODEL_FAULTS = (
    AssertionError,
    AttributeError,
    LanguageModelError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def probe(language_model: Any) -> Capabilities:
    """Find the capabilities of a language model, on its device and in its precision.

    Six forwards of up to twelve tokens if the model is a plain one.

    Args:
        language_model: A causal language model of transformers, with or without an adapter.

    Returns:
        Its capabilities; those that only packing needs are probed when first asked for.

    Raises:
        LanguageModelError: If the model takes no embeddings other than its tokens', gives other
            logits for embeddings than for their ids, lets a position attend to later ones, or
            cannot generate from a prompt of embeddings.
    """
    with _started(language_model) as run:
        run.measure_rounding()
        prefill_mode, supports_left_padding = run.find_prefill_mode()
        return Capabilities(
            name=run.name,
            embedding_scale=run.scale,
            needs_input_ids=bool(per_layer_inputs(language_model, run.ids)),
            prefill_mode=prefill_mode,
            supports_left_padding=supports_left_padding,
            supports_logits_to_keep=run.supports_logits_to_keep,
            supports_chunked_logits=run.supports_chunked_logits,
            max_batched_length=max_batched_length(language_model),
            probe=partial(_find_lazy, language_model),
        )


def check_trainable(language_model: Any) -> None:
    """Check that a gradient reaches the embeddings and that frozen weights stay unchanged.

    One forward and backward in train mode, without an update. Apart from `probe`, since a model
    that only generates needs no gradient. Raises LanguageModelError.
    """
    was_training = language_model.training
    fault = ""
    run = _ProbeRun(language_model)
    try:
        embeds = run.embed(run.ids).detach().requires_grad_(True)
        language_model.eval()
        before = run.logits_from_embeds(embeds, run.ids).detach()
        # Dropout draws random numbers; a run's own sequence must not depend on this check.
        # Named: without names, torch saves the state of every GPU of the machine.
        devices = {p.device for p in language_model.parameters()} - {torch.device("cpu")}
        with torch.enable_grad(), torch.random.fork_rng(devices):
            language_model.train()
            logits = run.logits_from_embeds(embeds, run.ids).float()
            (gradient,) = torch.autograd.grad(logits.square().sum(), embeds)
        # 4-bit kernels may repack weights in a forward pass, so the logits are computed again.
        language_model.eval()
        after = run.logits_from_embeds(embeds, run.ids).detach()
        run.spread = float(before.std())
        if not gradient.abs().max() > 0:  # also true for NaN
            fault = "the gradient is zero or NaN"
        elif run.distance(after, before) > _ROUNDING:
            fault = "its frozen weights change"
    except MODEL_FAULTS as error:
        fault = first_line(error)
    finally:
        language_model.train(was_training)
    if fault:
        fix = "; set model.quantization to null" if quantized_parameters(language_model) else ""
        raise LanguageModelError(f"{run.name} cannot be trained through: {fault}{fix}")


def _find_lazy(language_model: Any, capability: LazyCapability) -> int:
    # Started again each time: by now the model may be on another device or have an adapter.
    with _started(language_model) as run:
        return _succeeds(getattr(run, capability))


@contextmanager
def _started(language_model: Any) -> Iterator[_ProbeRun]:
    """Yield a run that has checked embeddings; the model is in eval mode until the end."""
    was_training = language_model.training
    language_model.eval()
    try:
        with torch.no_grad():
            run = _ProbeRun(language_model)
            run.check_embeddings()
            yield run
    finally:
        language_model.train(was_training)


class _ProbeRun:
    """One run of the probe: six ids, six others after them, and the logits of both.

    `check_embeddings` sets `embeds` [1, 6, dim], the embeddings of `ids` with one that is no
    token's, and `reference` [12, vocabulary], the logits of `embeds` followed by `others`.
    """

    def __init__(self, language_model: Any) -> None:
        self.model = language_model
        self.name = type(base_language_model(language_model)).__name__
        self.embedding = language_model.get_input_embeddings()
        self.scale = self.spread = 1.0
        num_ids = int(self.embedding.weight.shape[0])
        # Not the first or last eighth: special tokens are there, some without an embedding.
        ids = torch.linspace(num_ids // 8, num_ids - 1 - num_ids // 8, 2 * _NUM_TOKENS).long()
        ids = ids.to(self.embedding.weight.device)[None]
        self.ids, self.others = ids[:, ::2], ids[:, 1::2]

    def embed(self, ids: Tensor) -> Tensor:
        return self.embedding(ids) * self.scale

    def logits(self, **inputs: Any) -> Tensor:
        # Without a cache: a cache turns off the isolation of packed rows in transformers.
        return self.model(use_cache=False, **inputs).logits

    def logits_from_embeds(self, embeds: Tensor, ids: Tensor, **inputs: Any) -> Tensor:
        return self.logits(inputs_embeds=embeds, **per_layer_inputs(self.model, ids), **inputs)

    def distance(self, a: Tensor, b: Tensor) -> float:
        """Return the largest difference, in units of the logits' spread; inf if one is NaN."""
        largest = float((a.float() - b.float()).abs().max())
        return largest / max(self.spread, 1e-12) if largest == largest else float("inf")

    def is_close(self, a: Tensor, b: Tensor) -> bool:
        return self.distance(a, b) <= self.tolerance

    def check_embeddings(self) -> None:
        """Raise LanguageModelError unless embeddings give the logits of their ids."""
        ids = torch.cat([self.ids, self.others], 1)
        try:
            by_ids = self.logits(input_ids=ids)
        except MODEL_FAULTS as error:
            raise LanguageModelError(
                f"{self.name} does not run on a few ids: {first_line(error)}"
            ) from None
        if not bool(by_ids.isfinite().all()):
            raise LanguageModelError(
                f"{self.name} computes NaN or inf for a few ids{self._broken_weights()}"
            )
        self.spread = float(by_ids.std())
        # A lower bound: `measure_rounding` raises it to what this depth and precision amount to.
        dtypes = {by_ids.dtype, *(p.dtype for p in self.model.parameters())}
        if quantized_parameters(self.model):
            # Stored as integers, but multiplied with few bits: as coarse as bfloat16.
            dtypes.add(torch.bfloat16)
        if torch.is_autocast_enabled(by_ids.device.type):
            dtypes.add(torch.get_autocast_dtype(by_ids.device.type))
        self.tolerance = 16 * max(torch.finfo(d).eps for d in dtypes if d.is_floating_point)
        # Granite multiplies embeddings of ids by a factor, but takes `inputs_embeds` as they are.
        multiplier = getattr(base_language_model(self.model).config, "embedding_multiplier", None)
        distances = []
        for scale in dict.fromkeys((1.0, float(multiplier or 1.0))):
            self.scale = scale
            text, media = self._logits_of_text_and_media(ids)
            distance = self.distance(text, by_ids[0])
            if _MAX_DISTANCE < distance <= _OTHER_TEXT:
                # 8-bit products scale by the largest value of a batch, so that a second row
                # changes the rounding of the first: compare again with one row.
                distance = self.distance(self.logits_from_embeds(self.embed(ids), ids), by_ids)
            distances.append(distance)
            if distance <= _MAX_DISTANCE:
                self.reference = media
                return
        raise LanguageModelError(
            f"{self.name} gives other logits for embeddings than for the same ids (by up to "
            f"{min(distances):.3g} times their spread): it needs ids in its layers, so media "
            "cannot be written into its input"
        )

    def _broken_weights(self) -> str:
        """Return the end of an error: which weights are NaN or inf, and what to do."""
        broken = [
            name
            for name, p in self.model.named_parameters()
            if p.is_floating_point() and not bool(p.float().isfinite().all())
        ]
        if not broken:
            return "; try another `model.dtype`"
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        return f": its weight {broken[0]}{more} holds NaN or inf; download its files again"

    def _logits_of_text_and_media(self, ids: Tensor) -> Tensor:
        """Return logits [2, time, vocabulary]: of the ids' embeddings, and of those in `embeds`."""
        text = self.embed(ids)
        media = text.clone()
        media[:, 2] = (text[:, 1] + text[:, 3]) / 2  # plausible in size, but no token's
        self.embeds = media[:, :_NUM_TOKENS]
        try:
            return self.logits_from_embeds(torch.cat([text, media]), ids.repeat(2, 1))
        except MODEL_FAULTS as error:
            fault = first_line(error)
        # Some classes search the embedding table for the ids of `inputs_embeds`.
        if _succeeds(lambda: self.logits_from_embeds(text, ids) is not None):
            raise LanguageModelError(
                f"{self.name} takes no embedding that is not a token's, so media cannot be written "
                f"into its input: {fault}"
            )
        raise LanguageModelError(f"{self.name} cannot be driven by embeddings: {fault}")

    def measure_rounding(self) -> None:
        """Raise `tolerance` to this model's rounding between texts of two lengths.

        Sets `supports_logits_to_keep` as well: True if the head computes logits at chosen positions
        only and the loss is divided by `num_items_in_batch`. Sets `supports_chunked_logits` too.
        Raises LanguageModelError for a model that is not causal.
        """
        # in a causal model the logits of a prefix are those of the longer text, up to rounding
        labels = torch.full_like(self.ids, -100)
        labels[:, 1:4] = self.others[:, 1:4]
        keep = labels[0] != -100
        expected = self.reference[:_NUM_TOKENS]
        options: dict[str, Any] = {
            "inputs_embeds": self.embeds,
            "attention_mask": torch.ones_like(self.ids),
            "shift_labels": labels,
            "supervised": torch.arange(1, 4, device=labels.device),
            # Twice the labels: a loss that ignores the number is twice too large.
            "num_items_in_batch": 6,
            **per_layer_inputs(self.model, self.ids),
        }
        logits = expected[keep]
        try:
            found = supervised_loss(self.model, **options)
            logits, distance = found.logits, self.distance(found.logits, expected[keep])
            loss = torch.nn.functional.cross_entropy(expected[keep].float(), labels[0, keep]) / 2
            is_loss_close = bool((found.loss - loss).abs() <= 0.05 * loss)
            self.supports_logits_to_keep = distance <= _OTHER_TEXT and is_loss_close
        except MODEL_FAULTS:
            distance = float("inf")
            self.supports_logits_to_keep = False
        if not self.supports_logits_to_keep:
            distance = self.distance(self.logits_from_embeds(self.embeds, self.ids)[0], expected)
            if distance > _OTHER_TEXT:
                raise LanguageModelError(
                    f"{self.name} lets a position attend to later ones, so it cannot write text; "
                    "a decoder-only model is expected"
                )
        self.tolerance = max(self.tolerance, 8 * distance)
        self.supports_chunked_logits = self.supports_logits_to_keep and bool(
            _succeeds(lambda: self._chunks_equal(logits, options))
        )

    def _chunks_equal(self, expected: Tensor, options: dict[str, Any]) -> bool:
        """True if logits [3, vocabulary] come out the same in chunks of two rows."""
        found = supervised_output(self.model, chunk_rows=2, returns="logits", **options).logits
        assert found is not None
        return self.is_close(found.apply(lambda logits, _: logits), expected)

    def find_prefill_mode(self) -> tuple[PrefillMode, bool]:
        """Return how `generate` starts from a prompt, and whether left padding is exact.

        Raises LanguageModelError if neither mode gives the logits of repeated forwards.
        """
        fault = ""
        for mode in get_args(PrefillMode):
            padded = alone = float("inf")
            # Padded first: where it is exact, nothing else has to run.
            for is_padded in (True, False):
                try:
                    distance = self._generation_distance(mode, padded=is_padded)
                except MODEL_FAULTS as error:
                    fault = fault or first_line(error)
                    continue
                padded, alone = (distance, alone) if is_padded else (padded, distance)
                if padded <= self.tolerance:
                    return mode, True
            # Recurrent models decode by other kernels than they prefill with, so that even an
            # unpadded prompt is off by more than the tolerance; padding may double that.
            if alone <= max(self.tolerance, _ROUNDING):
                return mode, padded <= 2 * alone
        raise LanguageModelError(
            f"{self.name} cannot generate from a prompt of embeddings: its `generate` does not "
            f"give the logits of repeated forwards{f' ({fault})' if fault else ''}, so it could be "
            "trained, but not used"
        )

    def _generation_distance(self, mode: PrefillMode, *, padded: bool) -> float:
        """Return the distance from the reference over two new tokens, maybe beside a longer row."""
        ids, embeds = self.ids, self.embeds
        mask = torch.ones_like(ids)
        if padded:
            pad = torch.zeros_like(ids[:, :2])
            ids = torch.cat([torch.cat([pad, ids], 1), torch.cat([self.others, ids[:, :2]], 1)])
            embeds = torch.cat([torch.cat([self.embed(pad), embeds], 1), self.embed(ids[1:])])
            mask = torch.ones_like(ids)
            mask[0, :2] = 0
        out = generate_from_embeds(
            self.model,
            inputs_embeds=embeds,
            input_ids=ids,
            attention_mask=mask,
            prefill_mode=mode,
            max_new_tokens=2,
            **GREEDY,
            pad_token_id=0,
            # Random weights choose any token; the reference continues with the first of `others`.
            logits_processor=[self._force_first_of_others],
            return_dict_in_generate=True,
            output_logits=True,
        )
        return max(
            self.distance(out.logits[step][0], self.reference[_NUM_TOKENS - 1 + step])
            for step in range(2)
        )

    def _force_first_of_others(self, _: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, self.others[0, :1], 0.0)

    def supports_packing(self) -> bool:
        """Pack `others` before `embeds`: the logits of `embeds` must be those it has alone."""
        if not accepts_position_ids(self.model):
            return False
        self.measure_rounding()
        positions = torch.arange(_NUM_TOKENS, device=self.ids.device).repeat(1, 2)
        offsets = torch.arange(3, device=self.ids.device, dtype=torch.int32) * _NUM_TOKENS
        lengths = {"max_length_q": _NUM_TOKENS, "max_length_k": _NUM_TOKENS}
        segments = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, **lengths}
        found = self.logits_from_embeds(
            torch.cat([self.embed(self.others), self.embeds], 1),
            torch.cat([self.others, self.ids], 1),
            position_ids=positions,
            **filter_flash_attention_kwargs(self.model, segments),
        )
        return self.is_close(found[0, _NUM_TOKENS:], self.reference[:_NUM_TOKENS])

    def supports_segment_attention(self) -> bool:
        """Pack as above, with our attention function in place of `sdpa`."""
        with segment_attention_enabled(self.model) as enabled:
            return enabled and self.supports_packing()

    def segment_reach(self) -> int:
        """Pack two rows that share three tokens: each must have the logits it has alone.

        Returns the reach of the model's masks then, else 0.
        """
        with recording_mask_reach() as reach, segment_attention_enabled(self.model) as enabled:
            if not enabled or not accepts_position_ids(self.model):
                return 0
            self.measure_rounding()
            self.logits_from_embeds(self.embeds, self.ids)
            # A sliding window is longer than this text, so the masks are asked about far positions.
            if not min(reach, default=0):
                return 0
            start, rest = slice(0, 3), slice(3, None)
            ids, embeds = (
                torch.cat([a[:, start], b[:, start], a[:, rest]], 1)
                for a, b in ((self.ids, self.others), (self.embeds, self.embed(self.others)))
            )
            found = self.logits_from_embeds(
                embeds,
                ids,
                position_ids=torch.tensor([[0, 1, 2, 3, 4, 5, 3, 4, 5]], device=ids.device),
                attention_mask=torch.tensor([[[[0, 3, 0, 0], [3, 6, 0, 3], [6, 9, 0, 3]]]]),
            )[0]
            row = torch.cat([found[:3], found[6:]])
            return min(reach) if self.is_close(row, self.reference[:_NUM_TOKENS]) else 0


def _succeeds(check: Callable[[], int]) -> int:
    """Return the result of the check, or 0 where the model refuses it."""
    try:
        return check()
    except MODEL_FAULTS:
        return 0
