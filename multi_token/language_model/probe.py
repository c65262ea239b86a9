"""What a language model can do, found by trying: a few tokens, some forwards, no list of names.

Border: it tries the very functions of forward.py that training and asking use, and says what
came of it. What follows is decided by those who ask: model.py, generate.py, train/.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from multi_token.errors import LanguageModelError
from multi_token.language_model.capabilities import Capabilities
from multi_token.language_model.forward import (
    GREEDY,
    PrefillMode,
    accepts_position_ids,
    base_language_model,
    filter_flash_attention_kwargs,
    generate_from_embeds,
    max_batched_length,
    per_layer_inputs,
    prefix_cache,
    supervised_loss,
)
from multi_token.language_model.loading import first_line
from multi_token.language_model.quantization import quantized_parameters
from multi_token.language_model.segment_attention import (
    recording_mask_reach,
    segment_attention_enabled,
)

_NUM_TOKENS = 6
_ROUNDING = 0.05
"""What other kernels for the same numbers may change, in units of the logits' spread."""
# Errors by which other libraries refuse an operation; any other error is a defect of ours.
MODEL_FAULTS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    LanguageModelError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def probe(language_model: Any) -> Capabilities:
    """Try what a language model can do, where it is and in its precision: five forwards if all
    is plain.

    Raises LanguageModelError for one that cannot take embeddings that are no token's, gives other
    logits for embeddings than for the ids they belong to, lets a position see those behind it, or
    cannot go on from a prompt.
    """

    def everything(trial: _Probe) -> Capabilities:
        supports_logits_to_keep = trial.supports_logits_to_keep()
        prefill_mode, supports_left_padding = trial.find_prefill_mode()
        return Capabilities(
            name=trial.name,
            embedding_scale=trial.scale,
            needs_input_ids=bool(per_layer_inputs(language_model, trial.ids)),
            prefill_mode=prefill_mode,
            supports_left_padding=supports_left_padding,
            supports_logits_to_keep=supports_logits_to_keep,
            max_batched_length=max_batched_length(language_model),
            probes={
                "supports_packing": lambda: _run_probe(language_model, _Probe.supports_packing),
                "supports_segment_attention": lambda: _run_probe(
                    language_model, _Probe.supports_segment_attention
                ),
                "supports_shared_media": lambda: _run_probe(
                    language_model, _Probe.supports_shared_media
                ),
                "repeats_cache": lambda: _run_probe(language_model, _Probe.repeats_cache),
            },
        )

    return _run_probe(language_model, everything)


def check_trainable(language_model: Any) -> None:
    """One step without an update, in training mode: a gradient must reach the embeddings, and the
    frozen weights must stay what they are.

    Raises LanguageModelError otherwise. Apart from `probe`, since asking needs no gradient.
    """
    was_training = language_model.training
    fault = ""
    trial = _Probe(language_model)
    try:
        embeds = trial.embed(trial.ids).detach().requires_grad_(True)
        language_model.eval()
        before = trial.logits_from_embeds(embeds, trial.ids).detach()
        with torch.enable_grad(), torch.random.fork_rng():
            language_model.train()
            logits = trial.logits_from_embeds(embeds, trial.ids).float()
            (gradient,) = torch.autograd.grad(logits.square().sum(), embeds)
        language_model.eval()
        trial.spread = float(before.std())
        if not gradient.abs().max() > 0:
            fault = "the gradient is zero or no number"
        elif (
            trial.distance(trial.logits_from_embeds(embeds, trial.ids).detach(), before) > _ROUNDING
        ):
            fault = "its frozen weights do not stay what they are"
    except MODEL_FAULTS as error:
        fault = first_line(error)
    finally:
        language_model.train(was_training)
    if fault:
        mend = "; set model.quantization to null" if quantized_parameters(language_model) else ""
        raise LanguageModelError(f"{trial.name} cannot be trained through: {fault}{mend}")


_Result = TypeVar("_Result")


@torch.no_grad()
def _run_probe(language_model: Any, trial: Callable[[_Probe], _Result]) -> _Result:
    """What a trial finds in eval mode, after the model was driven by ids and by embeddings."""
    was_training = language_model.training
    language_model.eval()
    try:
        started = _Probe(language_model)
        started.check_embeddings()
        return trial(started)
    finally:
        language_model.train(was_training)


class _Probe:
    """The trials, each on a few tokens. `check_embeddings` comes first."""

    def __init__(self, language_model: Any) -> None:
        self.model = language_model
        self.name = type(base_language_model(language_model)).__name__
        self.embedding = language_model.get_input_embeddings()
        self.scale = self.spread = 1.0
        num_ids = int(self.embedding.weight.shape[0])
        # none of the first or last: these are special tokens, some of them without an embedding
        ids = torch.linspace(num_ids // 8, num_ids - 1 - num_ids // 8, 2 * _NUM_TOKENS).long()
        ids = ids.to(self.embedding.weight.device)[None]
        self.ids, self.others = ids[:, ::2], ids[:, 1::2]

    def embed(self, ids: Tensor) -> Tensor:
        return self.embedding(ids) * self.scale

    def logits(self, **inputs: Any) -> Tensor:
        return self.model(use_cache=False, **inputs).logits

    def logits_from_embeds(self, embeds: Tensor, ids: Tensor, **inputs: Any) -> Tensor:
        return self.logits(inputs_embeds=embeds, **per_layer_inputs(self.model, ids), **inputs)

    def distance(self, a: Tensor, b: Tensor) -> float:
        """The largest difference, in units of the logits' spread; no number counts as far."""
        largest = float((a.float() - b.float()).abs().max())
        return largest / max(self.spread, 1e-12) if largest == largest else float("inf")

    def is_close(self, a: Tensor, b: Tensor) -> bool:
        return self.distance(a, b) <= self.tolerance

    def check_embeddings(self) -> None:
        """By ids, then by embeddings: of the same tokens, and of media among them.

        Afterwards there is a prompt of `ids` whose embeddings `embeds` are not all some token's,
        and its logits, followed by those of `others`, in `reference`.
        """
        ids = torch.cat([self.ids, self.others], 1)
        try:
            by_ids = self.logits(input_ids=ids)
        except MODEL_FAULTS as error:
            raise LanguageModelError(
                f"{self.name} does not run on a few ids: {first_line(error)}"
            ) from None
        if not bool(by_ids.isfinite().all()):
            raise LanguageModelError(
                f"{self.name} answers a few ids with numbers that are not "
                f"finite{self._broken_weights()}"
            )
        self.spread = float(by_ids.std())
        # of rounding; `supports_logits_to_keep` measures what it amounts to in this model
        self.tolerance = 16 * max(torch.finfo(dtype).eps for dtype in self._precisions(by_ids))
        own = float(
            getattr(base_language_model(self.model).config, "embedding_multiplier", 1.0) or 1.0
        )
        distances = []
        # the second, where the model multiplies the embeddings of ids only
        for self.scale in dict.fromkeys((1.0, own)):
            text, media = self._logits_of_embeddings(ids)
            distance = self.distance(text, by_ids[0])
            if 1e-2 < distance <= 0.25:  # beside another row 8-bit products round otherwise
                distance = self.distance(self.logits_from_embeds(self.embed(ids), ids), by_ids)
            distances.append(distance)
            if distance <= 1e-2:
                self.reference = media
                return
        raise LanguageModelError(
            f"{self.name} gives other logits for embeddings than for the same ids (by up to "
            f"{min(distances):.3g} times their spread): it needs ids in its layers, so media "
            "cannot be written into its input"
        )

    def _broken_weights(self) -> str:
        """Which weights are to blame, in words."""
        broken = [
            name
            for name, p in self.model.named_parameters()
            if p.is_floating_point() and not bool(p.float().isfinite().all())
        ]
        if not broken:
            return "; try another `model.dtype`"
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        return f": its weight {broken[0]}{more} holds nan or inf; get its files anew"

    def _logits_of_embeddings(self, ids: Tensor) -> Tensor:
        """Logits [2, time, vocabulary] of the ids' embeddings, and with one that is no token's."""
        text = self.embed(ids)
        media = text.clone()
        media[:, 2] = (text[:, 1] + text[:, 3]) / 2
        self.embeds = media[:, :_NUM_TOKENS]
        try:
            return self.logits_from_embeds(torch.cat([text, media]), ids.repeat(2, 1))
        except MODEL_FAULTS as error:
            fault = first_line(error)
        if _succeeds(lambda: self.logits_from_embeds(text, ids) is not None):
            raise LanguageModelError(
                f"{self.name} takes no embedding that is not a token's, so media cannot be written "
                f"into its input: {fault}"
            )
        raise LanguageModelError(f"{self.name} cannot be driven by embeddings: {fault}")

    def _precisions(self, logits: Tensor) -> set[torch.dtype]:
        """Those of weights and logits; what is stored in integers is multiplied in few bits."""
        dtypes = {logits.dtype, *(p.dtype for p in self.model.parameters())}
        if quantized_parameters(self.model):
            dtypes.add(torch.bfloat16)
        return {dtype for dtype in dtypes if dtype.is_floating_point}

    def supports_logits_to_keep(self) -> bool:
        """Whether training's loss comes of selected logits: those of a longer text, as nothing
        that stands behind a position may change it. Raises LanguageModelError if it does.
        """
        labels = torch.full_like(self.ids, -100)
        labels[:, 1:4] = self.others[:, 1:4]
        keep = labels[0] != -100
        expected = self.reference[:_NUM_TOKENS]
        distance = float("inf")
        try:
            found = supervised_loss(
                self.model,
                inputs_embeds=self.embeds,
                attention_mask=torch.ones_like(self.ids),
                shift_labels=labels,
                num_items_in_batch=6,
                **per_layer_inputs(self.model, self.ids),
            )
            distance = self.distance(found.logits, expected[keep])
            loss = torch.nn.functional.cross_entropy(expected[keep].float(), labels[0, keep]) / 2
            selected = distance <= 0.25 and bool((found.loss - loss).abs() <= 0.05 * loss)
        except MODEL_FAULTS:
            selected = False
        if not selected:
            distance = self.distance(self.logits_from_embeds(self.embeds, self.ids)[0], expected)
            if distance > 0.25:
                raise LanguageModelError(
                    f"{self.name} lets a position see what stands behind it, so it cannot write "
                    "text; a decoder-only model is expected"
                )
        self.tolerance = max(self.tolerance, 8 * distance)
        return selected

    def find_prefill_mode(self) -> tuple[PrefillMode, bool]:
        """How a prompt is continued with the logits of repeated forwards, and padded as alone.

        A recurrent model may go on by other kernels than it reads a prompt with, so what it rounds
        alone is allowed when padded too.
        """
        starts: tuple[PrefillMode, PrefillMode] = ("embeddings", "ids")
        fault = ""
        for start in starts:
            padded = alone = float("inf")
            for is_padded in (True, False):
                try:
                    distance = self._generation_distance(start, padded=is_padded)
                except MODEL_FAULTS as error:
                    fault = fault or first_line(error)
                    continue
                padded, alone = (distance, alone) if is_padded else (padded, distance)
                if padded <= self.tolerance:
                    return start, True
            if alone <= max(self.tolerance, _ROUNDING):
                return start, padded <= 2 * alone
        raise LanguageModelError(
            f"{self.name} cannot go on from a prompt of embeddings: its `generate` does not give "
            f"the logits of repeated forwards{f' ({fault})' if fault else ''}, so it could be "
            "trained, but not asked"
        )

    def _generation_distance(self, start: PrefillMode, *, padded: bool) -> float:
        """From the reference, over two new tokens; `padded`: beside a longer row."""
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
            prefill_mode=start,
            max_new_tokens=2,
            **GREEDY,
            pad_token_id=0,
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
        if not accepts_position_ids(self.model):
            return False
        self.supports_logits_to_keep()  # measures rounding
        positions = torch.arange(_NUM_TOKENS, device=self.ids.device).repeat(1, 2)
        borders = torch.arange(3, device=self.ids.device, dtype=torch.int32) * _NUM_TOKENS
        lengths = {"max_length_q": _NUM_TOKENS, "max_length_k": _NUM_TOKENS}
        segments = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, **lengths}
        return _succeeds(
            lambda: self.is_close(
                self.logits_from_embeds(
                    torch.cat([self.embed(self.others), self.embeds], 1),
                    torch.cat([self.others, self.ids], 1),
                    position_ids=positions,
                    **filter_flash_attention_kwargs(self.model, segments),
                )[0, _NUM_TOKENS:],
                self.reference[:_NUM_TOKENS],
            )
        )

    def supports_segment_attention(self) -> bool:
        def trial() -> bool:
            with segment_attention_enabled(self.model) as switched:
                return switched and self.supports_packing()

        return _succeeds(trial)

    def supports_shared_media(self) -> bool:
        """Two rows that share three tokens: what the second comes to, as it does alone."""

        def trial() -> bool:
            with recording_mask_reach() as far, segment_attention_enabled(self.model) as switched:
                if not switched or not accepts_position_ids(self.model):
                    return False
                self.supports_logits_to_keep()  # measures rounding
                self.logits_from_embeds(self.embeds, self.ids)
                if not (far and all(far)):
                    return False
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
                return self.is_close(
                    torch.cat([found[:3], found[6:]]), self.reference[:_NUM_TOKENS]
                )

        return _succeeds(trial)

    def repeats_cache(self) -> bool:
        def trial() -> bool:
            self.supports_logits_to_keep()  # measures rounding
            past = prefix_cache(self.model, self.ids[:, :2], num_rows=2)
            found = self.logits_from_embeds(
                self.embeds[:, 2:].repeat(2, 1, 1),
                self.ids[:, 2:].repeat(2, 1),
                past_key_values=past,
                attention_mask=torch.ones_like(self.ids).repeat(2, 1),
            )
            return self.is_close(found, self.reference[2:_NUM_TOKENS].expand_as(found))

        return _succeeds(trial)


def _succeeds(trial: Callable[[], bool]) -> bool:
    """Whether a trial succeeds; a fault of the model's means that it does not."""
    try:
        return trial()
    except MODEL_FAULTS:
        return False
