"""Families of chat templates: their special tokens and the text to supervise."""

from __future__ import annotations

from dataclasses import dataclass

THINK = "<think>\n\n</think>\n\n"
SHUT = "\n\n</think>\n\n"  # of a think block that the generation prompt has opened


@dataclass(frozen=True)
class Family:
    """One template and its tokenizer's special tokens.

    `end`: tokens that close an assistant turn; `last_end`: those that close a last one, where they
    are others. `head`: what the model writes before an answer, by the template; `last_head`: before
    the last one, where it is another.

    `more`: what TRL's hand-made twin marks beside that, before and after a turn: a part of the
    generation prompt, and the text after the end of turn; `last_more`: after the last one.
    `twin_head`: what the twin writes before every answer but the last, and the template does not.
    `system`: a system message is accepted; `closes`: turns have an end.

    `kind`: of the tokenizer (see trials.py); `rstrip`: special tokens swallow blanks after them.
    """

    name: str
    bos: str
    end: str
    special: str = ""
    eos: str = ""  # the first token of `end`, where not named
    last_end: str = ""
    head: str = ""
    last_head: str = ""
    more: tuple[str, str] = ("", "")
    last_more: str = ""
    twin_head: str = ""
    system: bool = True
    closes: bool = True
    kind: str = "bytes"
    rstrip: bool = False


_IM = "<|im_start|> <|im_end|> <|endoftext|>"
_CHATML = ("<|endoftext|>", "<|im_end|>", _IM)
_COHERE = (
    "<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> "
    "<|SYSTEM_TOKEN|> <|START_RESPONSE|> <|END_RESPONSE|>"
)
_DEEPSEEK = "<｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜>"
_HARMONY = "<|start|> <|message|> <|channel|> <|end|> <|return|> <|call|>"
_HEADERS = "<|start_header_id|> <|end_header_id|> <|eot_id|>"
_TURN = "<|turn> <turn|> <|channel> <channel|>"
_GLM = "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>"
_PHI = "<|system|> <|user|> <|assistant|> <|end|>"
_NO_BOS = ""

# With a twin by which TRL marks the assistant's text, or with marks in the template itself.
_TRL = [
    Family("cohere", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", _COHERE),
    Family("cohere2", "<BOS_TOKEN>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", _COHERE),
    Family(
        "deepseek_r1_distill",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        _DEEPSEEK,
        more=("<｜Assistant｜>", ""),
    ),
    Family(
        "deepseekv3",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        _DEEPSEEK,
        more=("<｜Assistant｜>", ""),
    ),
    *(
        Family(name, "<bos>", "<turn|>", _TURN, more=("", "\n"), kind="gemma")
        for name in ("diffusion_gemma", *(f"gemma4{v}" for v in ("", "_v2", "_v3", "_v4", "_v5")))
    ),
    *(
        Family(
            name,
            "<bos>",
            "<end_of_turn>",
            "<start_of_turn>",
            more=("", "\n"),
            system=name != "gemma",
            kind="gemma",
        )
        for name in ("gemma", "gemma3")
    ),
    Family(
        "glm4moe",
        _NO_BOS,
        "<|user|>",
        f"{_GLM} <|endoftext|>",
        eos="<|endoftext|>",
        head="\n<think></think>\n",
    ),
    Family(
        "gptoss",
        "<|startoftext|>",
        "<|end|>",
        _HARMONY,
        eos="<|return|>",
        last_end="<|return|>",
        head="<|channel|>final<|message|>",
        more=("<|start|>assistant", ""),
    ),
    Family(
        "idefics3",
        "<|begin_of_text|>",
        "<end_of_utterance>",
        "<end_of_utterance>",
        head=" ",
        more=("", "\n"),
    ),
    *(
        Family(name, "<|startoftext|>", "<|im_end|>", _IM, more=("", "\n"))
        for name in ("lfm2", "lfm2_v2", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl")
    ),
    *(
        Family(name, "<|begin_of_text|>", "<|eot_id|>", _HEADERS)
        for name in ("llama3", "llama3_1", "llama3_2")
    ),
    Family("llava_next", "<s>", "</s>", head=" ", kind="llama"),
    Family(
        "muse_glimmer",
        "<|begin_of_text|>",
        "<|eot|>",
        "<|start|> <|message|> <|eot|>",
        head=" to=user<|message|>",
        more=("<|start|>assistant", ""),
    ),
    *(
        Family(name, *_CHATML, head="</think>", more=("<think>", "\n"))
        for name in (
            "nemotron_3_nano",
            "nemotron_3_super",
            "nemotron_3_ultra",
            "nemotron_3_5_lightning",
        )
    ),
    *(
        Family(
            name,
            "<s>",
            "<|end|>",
            _PHI,
            eos="<|endoftext|>",
            more=("", "\n"),
            last_more="\n<|endoftext|>",
            kind="llama",
            rstrip=True,
        )
        for name in ("phi3", "phi3_5")
    ),
    Family("qwen2_5", *_CHATML, more=("\n", "\n"), kind="nfc"),
    *(
        Family(name, *_CHATML, more=("", "\n"), kind="nfc")
        for name in ("qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl")
    ),
    Family("qwen3", *_CHATML, last_head=THINK, more=("", "\n"), twin_head=THINK, kind="nfc"),
    Family("qwen3_5_nothink", *_CHATML, more=(THINK, "\n"), twin_head=THINK, kind="nfc"),
    *(
        Family(name, *_CHATML, last_head=SHUT, more=("<think>", "\n"), twin_head=THINK, kind="nfc")
        for name in ("qwen3_5_think", "qwen3_6")
    ),
    Family("qwen3_8", *_CHATML, head=SHUT, more=("<think>", "\n"), kind="nfc"),
    Family("smolvlm", "<|im_start|>", "<end_of_utterance>", head=" ", more=("", "\n")),
]

_OURS = [
    Family("chatml", *_CHATML),
    Family("smollm2", *_CHATML),
    Family("smollm3", *_CHATML),
    Family("llama2", "<s>", "</s>", head=" ", kind="llama"),
    Family("mistral_v1", "<s>", "</s>", head=" ", system=False, kind="llama"),
    Family("mistral_v3", "<s>", "</s>", "[INST] [/INST] [TOOL_RESULTS]", head=" ", kind="llama"),
    Family("mistral_tekken", "<s>", "</s>", "[INST] [/INST]"),
    Family(
        "mistral_v7", "<s>", "</s>", "[INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]", head=" "
    ),
    Family("phi4", _NO_BOS, "<|im_end|>", f"{_IM} <|im_sep|>"),
    Family("zephyr", "<s>", "</s>", kind="llama"),
    Family("vicuna", "<s>", "</s>", head=" ", kind="llama"),
    Family("alpaca", "<s>", "</s>", kind="unigram"),
    Family("granite", "<|end_of_text|>", "<|end_of_text|>", "<|start_of_role|> <|end_of_role|>"),
    Family("olmo2", "<|endoftext|>", "<|endoftext|>"),
    Family("falcon3", _NO_BOS, "<|endoftext|>"),
    Family("deepseek_v2", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", head=" "),
    Family(
        "nemotron_mini",
        _NO_BOS,
        "<extra_id_1>",
        "<extra_id_0> </s>",
        eos="</s>",
        kind="unigram",
    ),
    Family("exaone", "[BOS]", "[|endofturn|]", "[|system|] [|user|] [|assistant|]"),
    Family("falcon_180b", _NO_BOS, "", "<|endoftext|>", eos="<|endoftext|>", closes=False),
    Family("default", _NO_BOS, "<|endoftext|>", head=" "),
    Family("default_bos", "<s>", "</s>", head=" ", kind="llama"),
]

FAMILIES = {family.name: family for family in [*_TRL, *_OURS]}
