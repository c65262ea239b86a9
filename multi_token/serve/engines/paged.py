"""transformers' continuous batching, with our own choice of each token.

Border: the only file that touches `transformers.generation.continuous_batching`, whose insides
change between releases (written for 5.23); continuous.py imports it when it starts, and refuses
what it does not find.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.logits_process import LogitsProcessorList

from multi_token.errors import LanguageModelError, first_line

Choose = Callable[[list[str], Tensor], Tensor]
"""Numbers of the prompts and logits [rows, vocabulary] of a step -> scores whose maximum is the
choice. What it raises ends the loop."""
Read = Callable[[str, int], None]
"""Number of a prompt, and how many of its tokens are in the cache before a step."""


class Paged:
    """One run of the manager's loop, from `start` to the end of its thread."""

    def __init__(
        self,
        language_model: Any,
        *,
        num_cache_tokens: int,
        page_size: int,
        max_step_tokens: int,
        max_batch: int,
        choose: Choose,
        on_read: Read,
    ) -> None:
        """`num_cache_tokens`: keys and values that are kept for all prompts together, in pages of
        `page_size`. `max_step_tokens`: of all prompts in one forward; longer ones are read in
        pieces. `on_read`: told of each prompt in each step. Raises LanguageModelError for a model
        that cannot be answered so.
        """
        name = type(language_model).__name__
        if not hasattr(language_model, "init_continuous_batching"):
            raise LanguageModelError(f"{name} has no continuous batching in transformers")
        fields = {
            "page_size": page_size,
            "num_blocks": -(-num_cache_tokens // page_size),
            "max_batch_tokens": max_step_tokens,
            "max_requests_per_batch": max_batch,
            "max_blocks_per_request": 0,
            # each row's own choice is Python: it cannot be recorded, nor run one step ahead
            "use_cuda_graph": False,
            "use_async_batching": False,
            "auto_switch_to_flash": False,  # it may fetch kernels from a hub
        }
        missing = fields.keys() - {f.name for f in dataclasses.fields(ContinuousBatchingConfig)}
        if missing:
            raise LanguageModelError(
                "this release of transformers has no "
                f"{', '.join(sorted(missing))} in its ContinuousBatchingConfig"
            )
        try:
            self._manager: ContinuousBatchingManager = language_model.init_continuous_batching(
                generation_config=greedy_config(language_model),
                continuous_batching_config=ContinuousBatchingConfig(**fields),
            )
            processors = _Processors(
                LogitsProcessorList([_ChooseEach(choose)])  # type: ignore[list-item]
            )
            processors.on_read = on_read
            processors.tensors_required = 1
            self._manager.logit_processor = processors
            self._manager.warmup()  # without graphs it makes the cache and nothing else
            cache = self._manager.batch_processor.cache  # type: ignore[union-attr]
            self.max_tokens = infer_max_single_request_tokens(cache)
        except (AttributeError, MemoryError, NotImplementedError, TypeError, ValueError) as error:
            self._restore_attention()
            raise LanguageModelError(
                f"{name} has no continuous batching: {first_line(error)}; serve it with the static "
                "engine"
            ) from error

    max_tokens: int
    """Of one prompt and its answer: what the cache holds when nothing else is in it."""

    @property
    def cache_usage(self) -> float:
        """The part of the cache that prompts hold, 0 to 1; for gauges, from any thread.

        Pages of prompts that have ended count as free, though they are kept for others that begin
        alike: they are given up as soon as somebody needs them.
        """
        processor = self._manager.batch_processor
        if processor is None:
            return 0.0
        cache = processor.cache
        num_free = cache.compute_free_capacity(relative=False) + sum(
            len(allocator.ledger.cached_blocks) * allocator.bytes_per_block
            for allocator in cache.cache_allocators.values()
        )
        return min(1.0, max(0.0, 1.0 - num_free / (cache.num_sectors * cache.bytes_per_sector)))

    def start(self) -> None:
        """Begin the loop, in a thread of its own."""
        self._manager.start()

    def add(
        self, number: str, ids: Sequence[int], *, max_new_tokens: int, end_ids: Sequence[int]
    ) -> None:
        """Queue a prompt; never blocks, since the manager's queue has no limit."""
        self._manager.add_request(
            list(ids),
            request_id=number,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(end_ids) or -1,  # None would be the model's own
        )

    def cancel(self, number: str) -> None:
        """Drop a prompt and free its pages, before the next step."""
        self._manager.cancel_request(number)

    def wait(self, on_failed: Callable[[str, str], None]) -> Exception | None:
        """Until the loop has ended -> what ended it, None if it was asked to stop.

        `on_failed`: told the number of a prompt that the manager itself gives up, and why.
        """
        manager = self._manager
        while manager.is_running():
            result = manager.get_result(timeout=0.1)
            status = manager.background_thread_status
            if result is not None and result.error and status.can_accept_new_requests() is None:
                on_failed(result.request_id, result.error)
        return manager.background_thread_status.fatal_error

    def request_stop(self) -> None:
        """Have the loop end after its step; returns at once."""
        status = self._manager.background_thread_status
        status.request_stop(status.HARD_STOP, 0)
        self._manager._wake_up_loop.set()

    def close(self) -> None:
        """Free the cache and give the model its attention back; the loop has ended or ends now."""
        if self._manager._generation_thread is not None:
            self._manager.stop(block=True, hard_stop=True)
        self._restore_attention()

    def _restore_attention(self) -> None:
        manager = getattr(self, "_manager", None)
        if manager is not None and manager._original_attn_impl is not None:
            manager.model.set_attn_implementation(manager._original_attn_impl)
            manager._original_attn_impl = None


def greedy_config(language_model: Any) -> Any:
    """The model's own generation config without sampling, which is ours.

    Raises LanguageModelError if it asks for more than that (a penalty of repetition, say).
    """
    config = copy.deepcopy(language_model.generation_config)
    config.do_sample = False
    config.num_beams = config.num_return_sequences = 1
    for field in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
        setattr(config, field, None)
    trial = copy.deepcopy(config)
    language_model._prepare_special_tokens(trial, device=language_model.device)
    processors = language_model._get_logits_processor(trial, input_ids_seq_length=1)
    if processors:
        kinds = ", ".join(type(processor).__name__ for processor in processors)
        raise LanguageModelError(
            f"the generation config of {type(language_model).__name__} asks for {kinds}, which "
            "continuous batching leaves out; serve it with the static engine"
        )
    config.eos_token_id = -1  # each prompt brings its own
    return config


class _Processors(ContinuousBatchingLogitsProcessorList):
    """The manager shows it all prompts of a step, also those that are read in pieces."""

    on_read: Read

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Tensor) -> Tensor:
        for request in requests_in_batch:  # what the step itself reads is counted already
            state = request.state
            self.on_read(state.request_id, state.position_offset - request.query_length)
        return super().prepare_tensor_args(requests_in_batch, arg_storage)


class _ChooseEach(ContinuousBatchingLogitsProcessor):
    """Chooses the token of each row; the manager's greedy choice then finds it."""

    supported_kwargs: ClassVar[dict[str, type]] = {}  # type: ignore[misc]
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, choose: Choose) -> None:
        self._choose = choose
        self._numbers: list[str] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> Tensor:
        self._numbers = [request.state.request_id for request in requests_with_new_token]
        return torch.zeros(len(self._numbers), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        num_rows = len(self._numbers)
        if len(scores) < num_rows:
            raise LanguageModelError(
                f"continuous batching gave logits of {len(scores)} rows for {num_rows} prompts"
            )
        if num_rows == 0:  # of prompts that are read in pieces; one row that is nobody's
            return scores
        chosen = self._choose(self._numbers, scores[:num_rows])
        return chosen if len(scores) == num_rows else torch.cat([chosen, scores[num_rows:]])
