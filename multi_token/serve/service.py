"""The service: media are decoded, encoded and projected, prompts are continued, text comes back.

Border: joins the parts that do these steps, and knows when to refuse; nothing here is HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from multi_token.errors import ChatTemplateError
from multi_token.generate import reader_of, stop_ids
from multi_token.media.safe_http import UrlPolicy
from multi_token.serve.admission import Admission, Deadline
from multi_token.serve.detokenizer import TextStream
from multi_token.serve.engines.base import Engine, HasCache, HasEngines, Prompt
from multi_token.serve.engines.local.engine import StaticEngine
from multi_token.serve.errors import ServeError
from multi_token.serve.media.limits import DecodeLimits
from multi_token.serve.media.pool import MediaPool
from multi_token.serve.media.totals import MediaTotals, Size
from multi_token.serve.media_embeddings import Projection
from multi_token.serve.metrics import Metrics
from multi_token.serve.openai.literal import LITERAL, Literals
from multi_token.serve.openai.messages import KINDS, MAX_CHARACTERS, PartReader
from multi_token.serve.openai.options import AnswerOptions
from multi_token.serve.openai.output import Answer
from multi_token.serve.openai.responses import Spelling, Usage
from multi_token.serve.settings import ServeSettings
from multi_token.types import Conversation, Media, Prepared, Sample

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration

T = TypeVar("T")
LOG = logging.getLogger("multi_token.serve")
_CHARACTERS_OF_A_TOKEN = 64
_LOOK_S = 0.5
"""How often the engine's life is looked after."""


class Service:
    """One model, answering many requests."""

    def __init__(
        self,
        model: MultiTokenForConditionalGeneration,
        settings: ServeSettings,
        *,
        engine: Engine | None = None,
    ) -> None:
        """`engine`: instead of the one that the settings name."""
        self.settings = settings
        self.reader = reader_of(model)
        self.modalities = model.modalities
        self.engine = engine or build_engine(model, settings)
        self.parts = PartReader(
            {name: modality.type for name, modality in model.modalities.items()},
            takes_urls=bool(settings.allowed_url_hosts),
            max_media=settings.max_media,
            max_messages=settings.max_messages,
            max_characters=_max_characters(self.engine.max_tokens),
        )
        self.admission = Admission(settings.max_batch, settings.num_waiting_allowed)
        self.metrics = Metrics(list(model.modalities))
        self.pool = MediaPool(
            model.modalities,
            num_workers=settings.num_workers,
            timeout_s=settings.media_timeout_s,
            limits=DecodeLimits(max_bytes=settings.max_body_bytes),
            urls=UrlPolicy(allowed_hosts=settings.allowed_url_hosts),
        )
        self.projection = Projection(model, cache_bytes=settings.cache_bytes)
        self._literals = Literals(self.reader.tokenizer)
        self._spelling = Spelling(self.reader.tokenizer)
        self._end_ids = frozenset(stop_ids(model))
        self._kinds = {
            name: kind
            for name, of_type in self.parts.types.items()
            for kind in ("image", "audio")
            if of_type in KINDS[kind] and of_type != "joint"
        }
        self._created = int(time.time())
        # one thread: a tokenizer is not made for several at once
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._answers: set[Answer] = set()
        self._watching: asyncio.Task[None] | None = None
        self._numbers = itertools.count()
        self.start_error: Exception | None = None
        """Why it did not start."""
        self._watch_gauges()

    async def start(self) -> None:
        """Start processes and threads. Raises MultiTokenError if one does not."""
        starting = [asyncio.to_thread(self.engine.start)]
        if self.modalities:
            starting.append(asyncio.to_thread(self.pool.start))
        for result in await asyncio.gather(*starting, return_exceptions=True):
            if isinstance(result, Exception):
                self.start_error = result
                await self.stop()
                raise result
        self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """End all; what is being answered fails."""
        self.admission.drain()
        if self._watching is not None:
            self._watching.cancel()
        self._fail_all()
        await asyncio.to_thread(self.engine.stop)
        await asyncio.to_thread(self.projection.stop)
        if self.modalities:
            await asyncio.to_thread(self.pool.stop)
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    async def drain(self, timeout_s: float) -> None:
        """Let nobody in, and let those inside end; who has not after `timeout_s` is told so."""
        LOG.warning("draining: %d answers inside", self.admission.num_inside)
        self.admission.drain()
        if not await self.admission.emptied(timeout_s):
            self._fail_all()

    def _fail_all(self) -> None:
        for answer in list(self._answers):
            answer.fail(
                ServeError(
                    "the server shut down before the answer was complete",
                    status=503,
                    code="shutting_down",
                    retry=True,
                )
            )

    @property
    def is_healthy(self) -> bool:
        """Whether the engine runs."""
        return self.engine.is_alive

    @property
    def is_ready(self) -> bool:
        """Whether a new request would be taken."""
        return self.is_healthy and not self.admission.is_draining

    def count_request(self, status: int) -> None:
        """Any request has ended with this status; 0 is that of a client that left."""
        self.metrics.requests.labels(str(status) if status else "client_gone").inc()

    def describe(self) -> dict[str, Any]:
        """The model as `/v1/models` tells of it."""
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self._created,
            "owned_by": "multi_token",
            "max_model_len": self.engine.max_tokens,
            "modalities": dict(self.parts.types),
        }

    @asynccontextmanager
    async def answer(
        self,
        conversation: Conversation,
        options: AnswerOptions,
        *,
        request_id: str,
        tenant: str = "",
        deadline: Deadline,
        arrived: float | None = None,
    ) -> AsyncIterator[Answer]:
        """The answer to a conversation, begun; left early, it is cancelled.

        `tenant`: whose cached media may be used. `arrived`: when the request did, by
        `time.monotonic`. Raises ServeError for whatever keeps it from beginning.
        """
        arrived = time.monotonic() if arrived is None else arrived
        self.refuse(options.n)
        with self.admission.enter(options.n):
            prompt = await self._in_time(self._prompt(conversation, tenant), deadline)
            max_new_tokens = self._max_new_tokens(len(prompt.input_ids), options.max_tokens)
            # clients may choose the ids of their requests, so two could choose one
            ids = [f"{request_id}-{next(self._numbers)}" for _ in range(options.n)]
            answer = Answer(
                [TextStream(self.reader.chat, options.stop) for _ in ids],
                self._usage(prompt),
                deadline,
                end_ids=frozenset() if options.ignore_end else self._end_ids,
                cancel=lambda index: self.engine.cancel(ids[index]),
                spelling=None if options.num_logprobs is None else self._spelling,
            )
            self._answers.add(answer)
            submitted = time.monotonic()
            try:
                for index, id in enumerate(ids):
                    sampling = options.sampling(index, max_new_tokens)
                    self.engine.submit(id, prompt, sampling, answer.emit(index))
                yield answer
            finally:
                answer.close()
                self._answers.discard(answer)
                for id in ids:
                    self.engine.cancel(id)
                self._count(answer, arrived, submitted)

    async def _in_time(self, work: Coroutine[Any, Any, T], deadline: Deadline) -> T:
        try:
            return await asyncio.wait_for(work, deadline.remaining_s)
        except asyncio.TimeoutError:
            raise deadline.error() from None

    async def _prompt(self, conversation: Conversation, tenant: str) -> Prompt:
        """Decode, tokenize, encode and project."""
        items = conversation.media
        prepared = await self._prepared(items)
        sample = await asyncio.get_running_loop().run_in_executor(
            self._tokenizing, self._sample, conversation, prepared
        )
        self._max_new_tokens(len(sample.input_ids), 1)  # too long is told before it is encoded
        began = time.monotonic()
        prompt = await self.projection.prompt(sample, tenant=tenant)
        if items:
            self.metrics.encoder.observe(time.monotonic() - began)
        return prompt

    async def _prepared(self, items: Sequence[Media]) -> list[Prepared]:
        """All items, decoded at once; if one is refused, the others are given up."""
        totals = MediaTotals(self.settings.media_totals, len(items))
        sent = [item.source for item in items if isinstance(item.source, bytes)]
        totals.add(Size(bytes=sum(map(len, sent))))
        tasks = [asyncio.ensure_future(self._one_prepared(item, totals)) for item in items]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _one_prepared(self, item: Media, totals: MediaTotals) -> Prepared:
        began = time.monotonic()
        prepared = await self.pool.prepare(item, totals)
        num_tokens = self.modalities[item.modality].num_tokens(prepared.num_features)
        totals.add(Size(tokens=num_tokens))
        label = self.metrics.modality(item.modality)
        self.metrics.media_decode.labels(label).observe(time.monotonic() - began)
        return prepared

    def _sample(self, conversation: Conversation, prepared: Sequence[Prepared]) -> Sample:
        """The prompt as numbers. Spelled special tokens are letters in it. Raises ServeError."""
        cut = self._literals.cut(conversation)
        media = iter(prepared)
        num_tokens = [
            len(self._literals.ids(item.source))
            if item.modality == LITERAL
            else self.modalities[item.modality].num_tokens(next(media).num_features)
            for item in cut.media
        ]
        try:
            sample = self.reader.chat.tokenize(cut, num_tokens, prompt_only=True)
        except ChatTemplateError as error:
            raise ServeError(str(error), param="messages", code="chat_template") from error
        sample = self._literals.fill(sample, cut.media)
        sample.media = list(prepared)
        return sample

    def _max_new_tokens(self, num_prompt: int, asked: int | None) -> int:
        """How long an answer may be. Raises ServeError where the prompt leaves no room for it."""
        limit = self.engine.max_tokens
        room = None if limit is None else limit - num_prompt
        if room is not None and room < (asked or 1):
            raise ServeError(
                f"the prompt has {num_prompt} tokens"
                + (f" and asks for {asked} more" if asked and asked > 1 else "")
                + f", and this model takes {limit} for both",
                param="messages",
                code="context_length_exceeded",
            )
        if asked is not None:
            return asked
        default = self.settings.default_max_tokens
        return default if room is None else min(default, room)

    def _usage(self, prompt: Prompt) -> Usage:
        media: dict[str, int] = {}
        for place in prompt.places:
            media[place.modality] = media.get(place.modality, 0) + place.length
        return Usage(len(prompt.input_ids), media, self._kinds)

    def refuse(self, num_answers: int = 1) -> None:
        """Raise ServeError, and count it, if so many answers would not be let in now."""
        try:
            self.admission.refuse(num_answers)
        except ServeError as error:
            self.metrics.rejections.labels(error.code or "other").inc()
            raise

    def _count(self, answer: Answer, arrived: float, submitted: float) -> None:
        """Metrics of an answer that has ended."""
        now = time.monotonic()
        usage = answer.usage()
        self.metrics.prompt_tokens.inc(usage["prompt_tokens"])
        self.metrics.generation_tokens.inc(usage["completion_tokens"])
        for name, number in usage["prompt_tokens_details"]["media_tokens"].items():
            self.metrics.media_tokens.labels(self.metrics.modality(name)).inc(number)
        self.metrics.latency.observe(now - arrived)
        if not answer.is_complete:
            self.metrics.aborted.labels(answer.failure or "client_gone").inc()
        if answer.first_token_at is not None:
            self.metrics.first_token.observe(answer.first_token_at - arrived)
            self.metrics.queue_time.observe(answer.first_token_at - submitted)
            if answer.num_tokens > answer.num_choices:
                seconds = now - answer.first_token_at
                per_choice = answer.num_tokens / answer.num_choices
                self.metrics.per_token.observe(seconds / max(1.0, per_choice - 1))

    def _watch_gauges(self) -> None:
        engine, admission, pool = self.engine, self.admission, self.pool
        watch = self.metrics.watch
        watch("num_requests_running", "Answers being written.", lambda: engine.num_running)
        watch("num_requests_waiting", "Prompts that wait.", lambda: engine.num_waiting)
        watch("num_requests_inside", "Places taken.", lambda: admission.num_inside)
        watch("num_media_waiting", "Items to be decoded.", lambda: pool.num_waiting)
        cache, total = self.projection, self.metrics.watch_total
        watch("media_cache_bytes", "Projected tokens that are kept.", lambda: cache.num_bytes)
        total("media_cache_queries", "Items that were asked for.", lambda: cache.num_queries)
        total("media_cache_hits", "Those that were kept already.", lambda: cache.num_hits)
        if isinstance(engine, HasCache):
            prefix = engine.prefix
            watch("kv_cache_usage_perc", "Part in use, 0 to 1.", lambda: engine.cache_usage)
            total("prefix_cache_queries", "Tokens of prompts.", lambda: prefix.num_queries)
            total("prefix_cache_hits", "Those computed before.", lambda: prefix.num_hits)
        if isinstance(engine, HasEngines):
            watch("engines_alive", "Engines that are used.", lambda: engine.num_engines)
            self.metrics.watch_totals(
                "engine_retries", "Prompts handed to another engine.", "reason", engine.retries
            )

    async def _watch(self) -> None:
        """Start a dead engine again, as often as it takes."""
        while True:
            await asyncio.sleep(_LOOK_S)
            if self.engine.is_alive:
                continue
            LOG.error("the engine %s has died and is started again", self.engine.name)
            self.metrics.engine_restarts.inc()
            try:
                await asyncio.to_thread(self.engine.start)
            except Exception as error:
                LOG.error("the engine does not start", exc_info=error)


def _max_characters(max_tokens: int | None) -> int:
    """Of all texts of a request: more than any prompt that fits, so that what never could is
    refused before it is tokenized."""
    if max_tokens is None:
        return MAX_CHARACTERS
    return min(MAX_CHARACTERS, max_tokens * _CHARACTERS_OF_A_TOKEN)


def build_engine(model: MultiTokenForConditionalGeneration, settings: ServeSettings) -> Engine:
    """The engine that the settings name. Raises MultiTokenError if the model cannot use it."""
    if settings.backend == "continuous":
        from multi_token.serve.engines.continuous import ContinuousEngine

        return ContinuousEngine(
            model, max_batch=settings.max_batch, num_cache_tokens=settings.num_cache_tokens
        )
    if settings.backend == "vllm":
        from multi_token.serve.engines.vllm.engine import build_vllm_engine

        return build_vllm_engine(model, settings)
    num_kept = settings.num_cache_tokens
    kept = {} if num_kept is None else {"num_cache_tokens": num_kept}
    return StaticEngine(model, max_batch=settings.max_batch, **kept)
