"""The Hugging Face face: Auto classes, processor and `generate(**inputs)` for runs.

    import multi_token.hf
    processor = AutoProcessor.from_pretrained("runs/demo")
    model = AutoModelForMultimodalLM.from_pretrained("runs/demo")

Importing this package registers its classes; importing `multi_token` registers nothing.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer

from multi_token.checkpoint.save import MODEL_TYPE
from multi_token.hf.model import MultiTokenForMultimodalLM
from multi_token.hf.processor import ChatProcessor, RowCollator, RunTokenizer
from multi_token.model import MultiTokenConfig

__all__ = ["ChatProcessor", "MultiTokenForMultimodalLM", "RowCollator"]

AutoConfig.register(MODEL_TYPE, MultiTokenConfig)
AutoProcessor.register(MultiTokenConfig, ChatProcessor)
AutoTokenizer.register(MultiTokenConfig, fast_tokenizer_class=RunTokenizer)
AutoModelForMultimodalLM.register(MultiTokenConfig, MultiTokenForMultimodalLM)
