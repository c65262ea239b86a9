"""For tests of this library and of plug-ins: the conformance kit, and tiny real parts."""

from multi_token.testing.conformance import Result, assert_conforms, check_modality, check_named
from multi_token.testing.encoders import LLAVA_TEMPLATE, tiny_image_encoder, tiny_llava
from multi_token.testing.language_models import TEMPLATES, tiny_language_model, tiny_tokenizer

__all__ = [
    "LLAVA_TEMPLATE",
    "TEMPLATES",
    "Result",
    "assert_conforms",
    "check_modality",
    "check_named",
    "tiny_image_encoder",
    "tiny_language_model",
    "tiny_llava",
    "tiny_tokenizer",
]
