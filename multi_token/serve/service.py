"""Service: one model that generates for many concurrent requests, without HTTP.

    Conversation -> PromptBuilder (decode, tokenize, encode, project) -> engine -> RequestOutput

`Service` admits requests and applies deadlines and context limits; its watchdog restarts what died.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from multi_token.chat.format import ChatFormat
from multi_token.chat.named import template_variables
from multi_token.errors import ChatTemplateError
from multi_token.generate import eos_token_ids
from multi_token.media.safe_http import UrlPolicy
from multi_token.serve.admission import Admission, Deadline
from multi_token.serve.detokenizer import IncrementalDetokenizer
from multi_token.serve.engines.base import Prompt
from multi_token.serve.engines.engine import Engine
from multi_token.serve.engines.local.engine import LocalEngine
from multi_token.serve.errors import ServeError
from multi_token.serve.media.limits import MediaLimits, RequestMediaBudget
from multi_token.serve.media.memory import MediaMemory, RequestMemory, Stage
from multi_token.serve.media.pool import MediaPool
from multi_token.serve.media_embeddings import EmbeddedItem, MediaEmbedder
from multi_token.serve.metrics import Metrics
from multi_token.serve.openai.messages import (
    LITERAL,
    MAX_CHARACTERS,
    MessageParser,
    SpecialTokenEscaper,
)
from multi_token.serve.openai.output import RequestOutput
from multi_token.serve.openai.protocol import RequestParams, invalid_field
from multi_token.serve.openai.responses import TokenText, Usage
from multi_token.serve.settings import ServeSettings
from multi_token.serve.watchdog import Watchdog
from multi_token.types import Conversation, Media, Sample

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration

LOG = logging.getLogger("multi_token.serve")
_MAX_CHARACTERS_PER_TOKEN = 64


class PromptBuilder:
    """Builds engine prompts: decodes media, tokenizes, encodes and projects."""

    def __init__(
        self, model: MultiTokenForConditionalGeneration, settings: ServeSettings, metrics: Metrics
    ) -> None:
        self.processor = model.require_processor()
        self.modalities = model.modalities
        self.media_memory = MediaMemory(
            settings.media_memory_bytes, is_shared=len(settings.api_keys) > 1
        )
        self.media_pool = MediaPool(
            model.modalities,
            num_workers=settings.num_workers,
            timeout_s=settings.media_timeout_s,
            limits=MediaLimits(max_bytes=settings.max_body_bytes),
            urls=UrlPolicy(allowed_hosts=settings.allowed_url_hosts),
            memory=self.media_memory,
        )
        self.media_embedder = MediaEmbedder(model, cache_bytes=settings.media_cache_bytes)
        self._request_limits = settings.media_totals
        self._metrics = metrics
        self._escaper = SpecialTokenEscaper(self.processor.tokenizer)
        # One thread: tokenizers of transformers are not thread-safe ("Already borrowed").
        self._tokenizer_thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    def start(self) -> None:
        """Start the media workers. Raises MultiTokenError."""
        if self.modalities:
            self.media_pool.start()

    async def stop(self) -> None:
        """Stop the workers and threads; waiting items fail."""
        await asyncio.to_thread(self.media_embedder.stop)
        if self.modalities:
            await asyncio.to_thread(self.media_pool.stop)
        self._tokenizer_thread.shutdown(wait=False, cancel_futures=True)

    def check_kwargs(self, template_kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Return a request's values of template variables, and names that the template lacks.

        Raises ServeError for a text that would bring a special token into the prompt.
        """
        known = template_variables(self.processor.chat.source)
        kept = {name: value for name, value in template_kwargs.items() if name in known}
        for name, value in kept.items():
            if isinstance(value, str) and not self._escaper.is_plain(value):
                at = f"chat_template_kwargs.{name}"
                raise invalid_field(f"{at} holds a special token of the model, {value[:40]!r}", at)
        return kept, [name for name in template_kwargs if name not in known]

    async def chat_for(self, template_kwargs: Mapping[str, Any]) -> ChatFormat:
        """Return the chat format with a request's values of template variables."""
        if not template_kwargs:
            return self.processor.chat
        return await asyncio.get_running_loop().run_in_executor(
            self._tokenizer_thread, self._format_with, template_kwargs
        )

    def _format_with(self, template_kwargs: Mapping[str, Any]) -> ChatFormat:
        chat = self.processor.chat.with_kwargs(template_kwargs)
        try:
            chat.decode([])  # renders the template once, which would delay the event loop later
        except ChatTemplateError as error:
            raise _template_error(error) from error
        return chat

    async def build(
        self,
        conversation: Conversation,
        chat: ChatFormat,
        tenant: str,
        check_length: Callable[[int], object],
        memory: RequestMemory | None = None,
    ) -> Prompt:
        """Build the prompt of a conversation. Raises ServeError.

        `check_length` gets the number of tokens as it grows item by item, and raises if the prompt
        is too long. `memory`: leases of the items' sources, released once these are not needed.
        """
        embedded = await self._embed_media(conversation.media, tenant, check_length)
        num_tokens = [len(item.embeds) for item in embedded]
        sample = await asyncio.get_running_loop().run_in_executor(
            self._tokenizer_thread, self._tokenize, conversation, chat, num_tokens
        )
        del conversation
        if memory is not None:
            memory.release()
        check_length(len(sample.input_ids))
        return Prompt(
            sample.input_ids,
            tuple(sample.media_spans),
            tuple(item.embeds for item in embedded),
            tuple(item.key for item in embedded),
            tenant,
        )

    async def _embed_media(
        self, items: Sequence[Media], tenant: str, check_length: Callable[[int], object]
    ) -> list[EmbeddedItem]:
        """Decode and embed all items in parallel; if one is refused, the others are cancelled."""
        budget = RequestMediaBudget(self._request_limits, len(items))
        sent = [item.source for item in items if isinstance(item.source, bytes)]
        budget.add(bytes=sum(map(len, sent)))
        tasks = [
            asyncio.ensure_future(self._embed_item(item, budget, tenant, check_length))
            for item in items
        ]
        # gather leaves the other tasks running when one raises.
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _embed_item(
        self,
        item: Media,
        budget: RequestMediaBudget,
        tenant: str,
        check_length: Callable[[int], object],
    ) -> EmbeddedItem:
        # An item is embedded as soon as it is decoded. If it waited for the others of its request,
        # requests that hold a part of their items each could fill the memory and wait for ever.
        memory = self.media_memory.lease(Stage.PREPARED, tenant)
        began = time.monotonic()
        try:
            prepared = await self.media_pool.prepare(item, budget, tenant=tenant, memory=memory)
            num_tokens = self.modalities[item.modality].num_tokens(prepared.num_features)
            budget.add(tokens=num_tokens)
            check_length(budget.num_tokens)
        except BaseException:
            memory.release()
            raise
        decoded = time.monotonic()
        label = self._metrics.modality_label(item.modality)
        self._metrics.media_decode.labels(label).observe(decoded - began)
        embedding = self.media_embedder.embed_item(
            item.modality, prepared, tenant=tenant, memory=memory
        )
        del prepared
        embedded = await embedding
        self._metrics.encoder.observe(time.monotonic() - decoded)
        return embedded

    def _tokenize(
        self, conversation: Conversation, chat: ChatFormat, num_tokens: Sequence[int]
    ) -> Sample:
        """Tokenize a conversation; special tokens in its texts stay text. Raises ServeError."""
        escaped = self._escaper.escape(conversation)
        media = iter(num_tokens)
        lengths = [
            len(self._escaper.letter_ids(item.source)) if item.modality == LITERAL else next(media)
            for item in escaped.media
        ]
        try:
            sample = chat.tokenize(escaped, lengths, prompt_only=True)
        except ChatTemplateError as error:
            raise _template_error(error) from error
        return self._escaper.restore(sample, escaped.media)


def _template_error(error: ChatTemplateError) -> ServeError:
    return ServeError(str(error), param="messages", code="chat_template")


class Service:
    """One model, generating for many requests."""

    def __init__(
        self,
        model: MultiTokenForConditionalGeneration,
        settings: ServeSettings,
        *,
        engine: Engine | None = None,
    ) -> None:
        """`engine`: overrides the engine of the settings."""
        self.settings = settings
        self.engine = engine or build_engine(model, settings)
        self.admission = Admission(
            settings.max_batch, settings.max_waiting, is_shared=len(settings.api_keys) > 1
        )
        self.metrics = Metrics(list(model.modalities))
        self.message_parser = MessageParser(
            model.modalities,
            allow_urls=bool(settings.allowed_url_hosts),
            max_media=settings.max_media,
            max_messages=settings.max_messages,
            # More than fits the context, so a long text is refused before it is tokenized.
            max_characters=min(
                MAX_CHARACTERS,
                _MAX_CHARACTERS_PER_TOKEN * (self.engine.max_tokens or MAX_CHARACTERS),
            ),
        )
        self.prompts = PromptBuilder(model, settings, self.metrics)
        self.metrics.watch(
            self.engine, self.admission, self.prompts.media_pool, self.prompts.media_embedder
        )
        self._token_text = TokenText(self.prompts.processor.tokenizer)
        self._end_ids = frozenset(eos_token_ids(model))
        # OpenAI counts image and audio tokens; a modality of several kinds belongs to neither.
        self._openai_kinds = {
            name: modality.openai_kinds[0]
            for name, modality in model.modalities.items()
            if modality.openai_kinds in (("image",), ("audio",))
        }
        self._created = int(time.time())
        self._outputs: set[RequestOutput] = set()
        self.watchdog = Watchdog(
            self.engine,
            self.prompts.media_embedder,
            self.metrics,
            step_timeout_s=settings.engine_step_timeout_s,
            on_give_up=self._fail_all,
        )
        self._watching: asyncio.Task[None] | None = None
        self._request_numbers = itertools.count()
        self.start_error: Exception | None = None
        """Error of a failed start."""

    async def start(self) -> None:
        """Start the engine and the media workers. Raises MultiTokenError if one fails."""
        starting = [asyncio.to_thread(self.engine.start), asyncio.to_thread(self.prompts.start)]
        # With return_exceptions: stop() must not run while the other one still starts.
        for result in await asyncio.gather(*starting, return_exceptions=True):
            if isinstance(result, Exception):
                self.start_error = result
                await self.stop()
                raise result
        self._watching = asyncio.create_task(self.watchdog.watch())

    async def stop(self) -> None:
        """Stop everything; running requests fail with 503."""
        self.admission.drain()
        if self._watching is not None:
            self._watching.cancel()
        self._fail_all()
        # A thread that hangs on the device would never be joined.
        if not self.watchdog.is_stalled:
            await asyncio.to_thread(self.engine.stop)
            await self.prompts.stop()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and let running ones finish; after `timeout_s` they fail with 503."""
        LOG.warning("draining: %d running requests", self.admission.num_admitted)
        self.admission.drain()
        if not await self.admission.wait_until_empty(timeout_s):
            self._fail_all()

    def _fail_all(self) -> None:
        # A copy: a failed output removes itself from the set.
        for output in list(self._outputs):
            output.fail(
                ServeError(
                    "the server shut down before the response was complete",
                    status=503,
                    code="shutting_down",
                    retry=True,
                )
            )

    @property
    def is_healthy(self) -> bool:
        return self.watchdog.is_healthy

    @property
    def is_ready(self) -> bool:
        """True if new requests are accepted."""
        return self.is_healthy and not self.admission.is_draining

    def count_request(self, status: int) -> None:
        """Count a finished HTTP request; status 0: its client disconnected first."""
        self.metrics.requests.labels(str(status) if status else "client_gone").inc()

    def model_card(self) -> dict[str, Any]:
        """Entry of the model in `/v1/models`."""
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self._created,
            "owned_by": "multi_token",
            "max_model_len": self.engine.max_tokens,
            "modalities": dict(self.message_parser.type_names),
        }

    @asynccontextmanager
    async def submit(
        self,
        conversation: Conversation,
        params: RequestParams,
        *,
        request_id: str,
        tenant: str = "",
        deadline: Deadline,
        arrived: float | None = None,
        memory: RequestMemory | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Start generating for a conversation; leaving the context cancels what still runs.

        `tenant`: separates cached media and prefixes. `arrived`: `time.monotonic` at the request's
        arrival. `memory`: leases of the conversation, which is not kept once its prompt is built.
        Raises ServeError if the request cannot start.
        """
        arrived = time.monotonic() if arrived is None else arrived
        self.check_capacity(params.n, tenant)
        with self.admission.admit(params.n, tenant):
            chat = await deadline.wait_for(self.prompts.chat_for(params.chat_template_kwargs))
            building = self.prompts.build(
                conversation, chat, tenant, lambda length: self._max_new_tokens(length, 1), memory
            )
            # Generating may take minutes, and its media may have megabytes.
            del conversation
            prompt = await deadline.wait_for(building)
            max_new_tokens = self._max_new_tokens(len(prompt.input_ids), params.max_tokens)
            # A client chooses X-Request-Id, so two requests may have the same.
            ids = [f"{request_id}-{next(self._request_numbers)}" for _ in range(params.n)]
            output = RequestOutput(
                [IncrementalDetokenizer(chat, params.stop) for _ in ids],
                self._usage(prompt),
                deadline,
                end_ids=frozenset() if params.ignore_eos else self._end_ids,
                cancel=lambda index: self.engine.cancel(ids[index]),
                token_text=None if params.num_logprobs is None else self._token_text,
            )
            self._outputs.add(output)
            submitted = time.monotonic()
            try:
                for index, id in enumerate(ids):
                    sampling = params.sampling_params(index, max_new_tokens)
                    self.engine.submit(id, prompt, sampling, output.emit(index))
                yield output
            finally:
                # Also after a disconnect or an error: the engine must not go on generating.
                output.close()
                self._outputs.discard(output)
                for id in ids:
                    self.engine.cancel(id)
                self.metrics.record_output(output, arrived=arrived, submitted=submitted)
                if output.is_complete:
                    self.watchdog.num_restarts = 0

    def _max_new_tokens(self, num_prompt: int, asked: int | None) -> int:
        """Maximum number of new tokens. Raises ServeError if they do not fit the context."""
        limit = self.engine.max_tokens
        num_left = None if limit is None else limit - num_prompt
        if num_left is not None and num_left < (asked or 1):
            raise ServeError(
                f"the prompt has {num_prompt} tokens"
                + (f" and asks for {asked} more" if asked and asked > 1 else "")
                + f", and the context length of this model is {limit} for both",
                param="messages",
                code="context_length_exceeded",
            )
        if asked is not None:
            return asked
        default = self.settings.default_max_tokens
        return default if num_left is None else min(default, num_left)

    def _usage(self, prompt: Prompt) -> Usage:
        media: Counter[str] = Counter()
        for span in prompt.media_spans:
            media[span.modality] += span.length
        return Usage(len(prompt.input_ids), media, self._openai_kinds)

    def check_capacity(self, num_choices: int = 1, tenant: str = "") -> None:
        """Raise ServeError, and count it, if a request with N choices would be refused now."""
        try:
            if self.watchdog.is_stalled:
                raise ServeError(
                    "the model makes no progress; try again later",
                    status=503,
                    code="engine_stalled",
                    retry=True,
                )
            self.admission.check_capacity(num_choices, tenant)
        except ServeError as error:
            self.metrics.rejections.labels(error.code or "other").inc()
            raise


def build_engine(model: MultiTokenForConditionalGeneration, settings: ServeSettings) -> Engine:
    """Build the engine of the settings. Raises MultiTokenError if the model does not support it."""
    if settings.engine_urls:
        from multi_token.serve.engines.vllm.engine import build_vllm_engine

        return build_vllm_engine(model, settings)
    num_tokens = settings.prefix_cache_tokens
    options = {} if num_tokens is None else {"prefix_cache_tokens": num_tokens}
    return LocalEngine(model, max_batch=settings.max_batch, **options)
