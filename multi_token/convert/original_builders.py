"""The modality builders of sshh12/multi_token (commit 6eb9813), and the fields of each here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class OriginalBuilder:
    """One entry of the original's `modality_builder`. All its projectors have two linear layers."""

    modality: str
    """The original's name of the modality: its projector is `<modality>_lmm_projector`."""
    name: str
    """The slot in a text, without brackets, and the name of the instance in an imported run."""
    rows_key: str
    """The field of a row that held the items."""
    encoder: str
    """Hub name of the encoder, fixed in the original's code."""
    features: str
    """Features that the original took from the encoder."""
    in_dim: int
    """Width of a feature, with that encoder."""
    num_tokens: int
    """Tokens of one item, with that encoder."""
    modality_type: str
    """Type of the modality in an imported run."""
    fields: dict[str, Any] | None = None
    """Fields of that modality, or None for a builder that cannot be imported."""
    reason: str = ""
    """Reason why the builder cannot be imported."""
    projector: Literal["mlp", "expand"] = "expand"
    """`mlp`: each feature a token. `expand`: a perceptron for each token, all of one feature."""

    @property
    def projector_fields(self) -> dict[str, Any]:
        """The projector's part of a recipe. The original did not standardize features."""
        factor = {"factor": self.num_tokens} if self.projector == "expand" else {}
        return {"type": self.projector, **factor, "num_layers": 2, "standardize": False}


_CLIP = "openai/clip-vit-large-patch14-336"
# The original cut documents at 512 tokens; as chunks of that size, the rest is read too.
_GTE = OriginalBuilder(
    modality="document_gte",
    name="document",
    rows_key="documents",
    encoder="thenlper/gte-large",
    features="mean of the last layer",
    in_dim=1024,
    num_tokens=4,
    modality_type="document",
    fields={"chunk_tokens": 512, "strings": "text"},
)

BUILDERS: dict[str, OriginalBuilder] = {
    "vision_clip": OriginalBuilder(
        modality="vision_clip",
        name="image",
        rows_key="images",
        encoder=_CLIP,
        features="patches of layer -2, CLS left out",
        in_dim=1024,
        projector="mlp",
        num_tokens=576,
        modality_type="image",
        fields={"features": "patches", "layer": -2},
    ),
    "vision_clip_pool": OriginalBuilder(
        modality="vision_clip",
        name="image",
        rows_key="images",
        encoder=_CLIP,
        features="pooled vector of the vision tower",
        in_dim=1024,
        num_tokens=10,
        modality_type="image",
        fields={"features": "pooled"},
    ),
    "audio_whisper": OriginalBuilder(
        modality="audio_whisper",
        name="speech",
        rows_key="speech_audios",
        encoder="openai/whisper-small",
        features="decoder's last layer at the start token",
        in_dim=768,
        num_tokens=10,
        modality_type="speech",
        fields={"features": "start"},
    ),
    "audio_clap": OriginalBuilder(
        modality="audio_clap",
        name="sound",
        rows_key="sounds",
        encoder="laion/clap-htsat-fused",
        features="audio embedding",
        in_dim=512,
        num_tokens=5,
        modality_type="sound",
        fields={"features": "pooled", "long_audio": "fusion"},
    ),
    "video_xclip": OriginalBuilder(
        modality="video_xclip",
        name="video",
        rows_key="videos",
        encoder="microsoft/xclip-base-patch32",
        features="video embedding of 8 frames",
        in_dim=512,
        num_tokens=10,
        modality_type="video",
        fields={"read_as": "clip", "num_frames": 8, "features": "pooled", "normalize": True},
    ),
    "imagebind": OriginalBuilder(
        modality="imagebind",
        name="imagebind",
        rows_key="imagebinds",
        encoder="imagebind_huge",
        features="joint embedding",
        in_dim=1024,
        num_tokens=4,
        modality_type="joint",
        reason="its encoder, ImageBind, is neither part of transformers nor an installable package "
        "(its code and weights are under CC BY-NC-SA 4.0), so no encoder folder can be named for "
        "it; a modality of your own can bring it (docs/add-a-modality.md), and the tensors of "
        "`imagebind_lmm_projector` then fit a projector `{type: expand, factor: 4}`",
    ),
    "document_gte": _GTE,
    "document_gte_x16": OriginalBuilder(**{**vars(_GTE), "num_tokens": 32}),
}
"""Every builder that the original has. The names are its own."""
