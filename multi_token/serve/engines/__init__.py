"""Engines: prompt -> tokens, for many requests at once.

    base       the contract: prompts, sampling parameters, events, prompt checks
    request    state and emitted tokens of one request
    scheduler  queue of waiting requests; who starts next
    sampler    logits -> token
    parity     startup checks against `generate`
    fallback   complete batches through `generate`; isolation of faults
    local/     in process: continuous batching over a left-padded KV cache
    vllm/      gateway to vLLM servers

Engines know neither text nor HTTP: media are embeddings already, and tokens leave as ids.
"""
