"""Engines: prompt -> tokens, for many requests at once.

    base       types: prompts, sampling parameters, events
    engine     base class: prompt checks, requests from `submit` to their last event
    request    state and emitted tokens of one request
    sampler    logits -> token
    parity     startup checks against `generate`
    fallback   complete batches through `generate`; isolation of faults
    local/     in process: scheduler, continuous batching over a left-padded KV cache
    vllm/      gateway to vLLM servers

Engines know neither text nor HTTP: media are embeddings already, and tokens leave as ids.
"""
