"""The engine that admits prompts at every step: transformers' continuous batching, with soft ids.

Border: who is admitted, where media lie in the pool, and what is done when the loop ends. The loop
itself is behind paged.py, ids and rows are soft_tokens.py's.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from multi_token.errors import LanguageModelError
from multi_token.generate import eos_token_ids
from multi_token.language_model.forward import base_language_model
from multi_token.language_model.loading import first_line
from multi_token.serve.engines.base import EngineEvent, Prompt, SamplingParams, TokenEvent
from multi_token.serve.engines.fallback import (
    collect_tokens,
    generate_one,
    retry_individually,
    smoke_prompt,
)
from multi_token.serve.engines.prefix_hits import PrefixCacheStats
from multi_token.serve.engines.prompts import check_prompt, context_length, min_limit
from multi_token.serve.engines.scheduler import (
    GenerationRequest,
    Scheduler,
    fail_request,
    force_tokens,
    sample_batch,
)
from multi_token.serve.engines.soft_tokens import (
    SoftEmbedding,
    SoftIds,
    own_to_tenant,
    soft_embedding,
)
from multi_token.serve.errors import ServeError

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration
    from multi_token.serve.engines.paged import Paged

_LOG = logging.getLogger(__name__)
_NUM_PROVED = 6
"""New tokens of each prompt of the proof at the start."""


class ContinuousEngine:
    """Answers each prompt as soon as there is room, beside those that are being answered.

    A prompt is ids to transformers; those of media lie beyond the vocabulary and look up what the
    projectors made (soft_tokens.py). At the start it proves on a short prompt with media that the
    language model answers so as it does by `generate`, or it refuses.
    """

    name = "continuous"

    def __init__(
        self,
        model: MultiTokenForConditionalGeneration,
        *,
        max_batch: int = 8,
        max_tokens: int | None = None,
        num_cache_tokens: int | None = None,
        num_soft_tokens: int | None = None,
        max_step_tokens: int = 512,
        page_size: int = 32,
    ) -> None:
        """`max_batch`: prompts answered at once. `max_tokens`: see `Engine`; by default what the
        language model's config says, and never more than the cache holds. `num_cache_tokens`: keys
        and values for all prompts together; by default 1024 for each, or for one of the model's
        length up to 8192. `num_soft_tokens`: rows of media kept, by default as many.
        `max_step_tokens`: read in one forward; `page_size`: tokens that prompts share as a whole.
        """
        self.model = model
        self.max_batch = max_batch
        length = context_length(model)
        if num_cache_tokens is None:
            num_cache_tokens = max(min(length or 8192, 8192), max_batch * 1024)
        self.max_tokens = min_limit(max_tokens, length, num_cache_tokens)
        self._paged_options = {
            "num_cache_tokens": num_cache_tokens,
            "page_size": page_size,
            "max_step_tokens": max_step_tokens,
            "max_batch": max_batch,
        }
        self._num_soft_tokens = num_soft_tokens or num_cache_tokens
        self._filler_id = model.require_processor().chat.filler_id
        self._end_ids = frozenset(eos_token_ids(model))
        self._requests = Scheduler()
        self._numbers = itertools.count()
        self._by_number: dict[str, GenerationRequest] = {}
        self.prefix_stats = PrefixCacheStats()
        self._thread: threading.Thread | None = None
        self._is_open = False  # for prompts of clients
        self._admits = False  # prompts that wait may go into the loop that runs
        self._is_stopping = False
        self._fault: Exception | None = None  # what ended the thread

    def start(self) -> None:
        """Begin to answer, once it is proved that the answers are right.

        Raises LanguageModelError for a language model that cannot be served so.
        """
        if self.is_alive:
            return
        if self._thread is not None:
            self._thread.join()
        if self.model.capabilities.needs_input_ids:
            raise LanguageModelError(
                f"{self.model.capabilities.name} looks ids up in its layers, which soft ids do not "
                "have; serve it with the static engine"
            )
        language_model = base_language_model(self.model.language_model)
        _paged().greedy_config(language_model)  # refuses what it would leave out
        prompts = [smoke_prompt(self.model, num_media_tokens=3), smoke_prompt(self.model)]
        options = SamplingParams(_NUM_PROVED, num_logprobs=0, ignore_eos=True)
        expected = [generate_one(self.model, prompt, options) for prompt in prompts]
        self._is_stopping = False
        self._fault = None
        self._stack = ExitStack()
        try:
            self._soft: SoftEmbedding = self._stack.enter_context(
                soft_embedding(language_model, self._num_soft_tokens)
            )
            self._ids = SoftIds(self._soft.num_ids, self._num_soft_tokens)
            self._paged = self._build()
        except LanguageModelError:
            self._stack.close()
            raise
        self.max_tokens = min_limit(self.max_tokens, self._paged.max_tokens)
        self._paged.start()
        self._admits = True
        self._thread = threading.Thread(target=self._watch, name="continuous engine", daemon=True)
        self._thread.start()
        try:
            self._prove(prompts, options, expected)
        except LanguageModelError:
            self.stop()
            raise
        self._is_open = True

    def _build(self) -> Paged:
        language_model = base_language_model(self.model.language_model)
        return _paged().Paged(
            language_model, choose=self._choose, on_read=self._on_read, **self._paged_options
        )

    def _prove(
        self,
        prompts: Sequence[Prompt],
        options: SamplingParams,
        expected: Sequence[Sequence[TokenEvent]],
    ) -> None:
        """Answer these at once. Raises LanguageModelError if the tokens or their probabilities are
        not as expected.
        """
        precision = self._soft.weight.dtype
        tolerance = 1e-3 if precision == torch.float32 else 0.2
        name = self.model.capabilities.name
        have_ended = [threading.Event() for _ in prompts]
        said: list[list[EngineEvent]] = [[] for _ in prompts]

        def listen(index: int, event: EngineEvent) -> None:
            said[index].append(event)
            if not isinstance(event, TokenEvent):
                have_ended[index].set()

        for index, prompt in enumerate(prompts):
            self._add(
                GenerationRequest(
                    f"proof {index}",
                    prompt,
                    options,
                    lambda event, index=index: listen(index, event),
                    self._end_ids,
                    self._on_end,
                )
            )
        for index, ended in enumerate(have_ended):
            while not ended.wait(0.1):
                if self._thread is None or not self._thread.is_alive():
                    raise self._fault_of_proof(RuntimeError("its loop ends"))
            try:
                tokens = collect_tokens(said[index])
            except ServeError as error:
                raise self._fault_of_proof(error) from error
            for token, other in zip(tokens, expected[index], strict=True):
                assert token.logprob is not None and other.logprob is not None
                if abs(token.logprob - other.logprob) > tolerance:
                    raise LanguageModelError(
                        f"{name} answers otherwise in continuous batching than by itself (a log-"
                        f"probability of {token.logprob:.4g} instead of {other.logprob:.4g}); "
                        "serve it with the static engine"
                    )
                if token.id != other.id:  # so near that it is rounding; what follows is another
                    break

    def _fault_of_proof(self, error: Exception) -> LanguageModelError:
        return LanguageModelError(
            f"{self.model.capabilities.name} has no continuous batching: "
            f"{first_line(self._fault or error)}; serve it with the static engine"
        )

    def stop(self) -> None:
        """Cancel all, end the loop behind its step, and give the language model back as it was."""
        with self._requests.condition:
            self._is_stopping = True
            self._is_open = self._admits = False
        for row in self._requests.unfinished():
            row.cancel()
        if self._thread is not None:
            if self._thread.is_alive():
                self._paged.request_stop()
            self._thread.join()

    def submit(
        self,
        request_id: str,
        prompt: Prompt,
        options: SamplingParams,
        emit: Callable[[EngineEvent], None],
    ) -> None:
        """Queue a prompt; see `Engine`."""
        if not self.is_alive:
            raise ServeError("the engine does not run", status=503)
        check_prompt(self.model, prompt, options, self.max_tokens)
        prompt = own_to_tenant(prompt, self._soft, self.model.capabilities.embedding_scale)
        num_soft = sum(dict(_items(prompt)).values())
        if num_soft > self._num_soft_tokens:
            raise ServeError(
                f"the media of this prompt have {num_soft} tokens, over the "
                f"{self._num_soft_tokens} that this server keeps; send fewer items",
                param="messages",
            )
        row = GenerationRequest(request_id, prompt, options, emit, self._end_ids, self._on_end)
        self._add(row)

    def cancel(self, request_id: str) -> None:
        """End an answer early; see `Engine`. Its pages are free before the next step."""
        row = self._requests.cancel(request_id)
        if row is not None and row.engine_key and self._admits:
            self._paged.cancel(row.engine_key)

    @property
    def is_alive(self) -> bool:
        return self._is_open and self._thread is not None and self._thread.is_alive()

    @property
    def cache_usage(self) -> float:
        """The part of the cache that answers hold, 0 to 1."""
        return self._paged.cache_usage if self.is_alive else 0.0

    @property
    def num_running(self) -> int:
        return self._requests.num_running

    @property
    def num_waiting(self) -> int:
        return self._requests.num_waiting

    def _add(self, row: GenerationRequest) -> None:
        with self._requests.condition:
            if self._is_stopping:
                raise ServeError("the engine does not run", status=503)
            self._requests.add(row)
            self._admit()

    def _admit(self) -> None:
        """Hand prompts to the loop, in their order, as long as there is room. Under the lock."""
        waiting = self._requests.waiting
        while self._admits and waiting and self._requests.num_running < self.max_batch:
            row = waiting[0]
            pinned = self._ids.pin(_items(row.prompt))
            if pinned is None:
                if self._ids.is_worn_out and self._requests.num_running == 0:
                    self._admits = False
                    self._paged.request_stop()  # and begin anew, with nothing of the old ids
                return
            waiting.popleft()
            ids = row.prompt.input_ids.tolist()
            firsts, new = pinned
            for place, first in zip(row.prompt.media_spans, firsts, strict=True):
                ids[place.start : place.start + place.length] = range(first, first + place.length)
            for index in new:
                self._write(firsts[index], row.prompt.media_embeds[index])
            row.engine_key = str(next(self._numbers))
            self._by_number[row.engine_key] = row
            self._paged.add(
                row.engine_key,
                ids,
                max_new_tokens=row.options.max_new_tokens,
                end_ids=sorted(row.end_ids),
            )

    @torch.no_grad()
    def _write(self, first: int, tokens: Tensor) -> None:
        pool = self._soft.pool
        # the model multiplies what its embedding gives; these are what comes of that
        rows = tokens.to(pool.device).float() / self.model.capabilities.embedding_scale
        pool[self._ids.rows(first, len(tokens)).to(pool.device)] = rows.to(pool.dtype)
        if pool.device.type != "cpu":  # the loop has a stream of its own
            torch.get_device_module(pool.device).synchronize()

    def _on_end(self, row: GenerationRequest) -> None:
        # safe though the loop may still hold a cancelled prompt: what it computes of rows that
        # have been written over stands under ids that nobody will ever have again
        with self._requests.condition:
            self._requests.remove(row)
            if self._by_number.pop(row.engine_key, None) is not None:
                self._ids.unpin([key for key, _ in _items(row.prompt)])
            self._admit()

    def _choose(self, numbers: list[str], scores: Tensor) -> Tensor:
        ids, bad, all_likeliest = sample_batch([self._by_number.get(n) for n in numbers], scores)
        if bad:
            # in one long row a number that is none spreads to all, and into the cache
            raise LanguageModelError(f"no numbers come of {len(bad)} of {len(numbers)} prompts")
        return scores if all_likeliest else force_tokens(scores, ids)

    def _on_read(self, number: str, num_there: int) -> None:
        with self._requests.condition:
            row = self._by_number.get(number)
            if row is not None:
                self.prefix_stats.record(row, num_there)

    def _give_up(self, number: str, why: str) -> None:
        row = self._by_number.get(number)
        if row is not None:
            fail_request(row, LanguageModelError(why))

    def _watch(self) -> None:
        """Wait for the loop to end; then begin a new one, or tell everybody that it is over."""
        try:
            while not self._is_stopping:
                error = self._paged.wait(self._give_up)
                with self._requests.condition:
                    self._admits = False
                    interrupted = self._requests.running()
                self._paged.close()
                if self._is_stopping:
                    return
                if error is not None:
                    _LOG.error("the loop with %d prompts ended", len(interrupted), exc_info=error)
                    if not self._is_open:  # the proof shows what the loop does, or nothing
                        raise error
                    retry_individually(self.model, interrupted, self._filler_id, error)
                self._begin_anew()
        except Exception as error:  # noqa: BLE001 - every client must be told
            _LOG.error("the engine ends", exc_info=error)
            self._fault = error
            with self._requests.condition:
                self._is_stopping = True
                self._is_open = False
            for row in self._requests.unfinished():
                row.fail(ServeError("the engine has failed", status=503))
        finally:
            self._paged.close()
            self._stack.close()

    def _begin_anew(self) -> None:
        self._ids.reset()  # the new loop keeps nothing of the old ids
        self._paged = self._build()
        self._paged.start()
        with self._requests.condition:
            self._admits = not self._is_stopping
            self._admit()
        if self._is_stopping:
            self._paged.request_stop()


def _items(prompt: Prompt) -> list[tuple[str, int]]:
    """Of each item a name that only equal rows have, and their number."""
    return [
        (f"{key} {place.length}", place.length)
        for key, place in zip(prompt.media_keys, prompt.media_spans, strict=True)
    ]


def _paged() -> ModuleType:
    """paged.py, which asks for insides of transformers. Raises LanguageModelError."""
    try:
        from multi_token.serve.engines import paged
    except ImportError as error:
        raise LanguageModelError(
            f"this release of transformers has another continuous batching ({error}); serve with "
            "the static engine"
        ) from error
    return paged
