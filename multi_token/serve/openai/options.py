"""What a request asks of an answer, in the engine's words.

Border: numbers; which of them a client may write is schema.py's to say.
"""

from __future__ import annotations

from dataclasses import dataclass

from multi_token.serve.engines.base import SamplingParams
from multi_token.serve.errors import ServeError
from multi_token.serve.openai.protocol import MAX_INT, ChatRequest
from multi_token.serve.settings import ServeSettings


@dataclass(frozen=True)
class RequestParams:
    """Of all choices of one request."""

    max_tokens: int | None = None
    """None: the server's default, or what the prompt leaves."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    num_logprobs: int | None = None
    ignore_eos: bool = False

    def sampling_params(self, index: int, max_new_tokens: int) -> SamplingParams:
        """Of one choice. Each has a seed of its own, or they would all say the same."""
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=None if self.seed is None else (self.seed + index) % (MAX_INT + 1),
            num_logprobs=self.num_logprobs,
            ignore_eos=self.ignore_eos,
        )


def request_params(request: ChatRequest, settings: ServeSettings) -> RequestParams:
    """A checked request -> its options. Raises ServeError for more tokens than the server gives."""
    max_tokens = request.max_completion_tokens or request.max_tokens
    if max_tokens is not None and max_tokens > settings.max_tokens:
        raise ServeError(
            f"max_tokens is {max_tokens}, and the limit is {settings.max_tokens}",
            param="max_tokens",
            code="invalid_value",
        )
    top_p = 1.0 if request.top_p is None else request.top_p
    temperature = request.temperature
    if top_p == 0:  # in words that every engine takes: vLLM refuses a top_p of 0
        top_p, temperature = 1.0, 0.0
    top_k = max(0, request.top_k or 0)
    n = request.n or 1
    varied = top_p < 1 or top_k > 1 or n > 1
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    return RequestParams(
        max_tokens=max_tokens,
        temperature=(1.0 if varied else 0.0) if temperature is None else temperature,
        top_p=top_p,
        top_k=top_k,
        seed=request.seed,
        stop=stop,
        n=n,
        num_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        ignore_eos=bool(request.ignore_eos),
    )
