"""Medical volumes (NIfTI, DICOM) as slices through any image encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, ClassVar, Literal

from PIL import Image
from pydantic import PositiveInt, model_validator
from torch import Tensor

from multi_token.media.errors import require_package, undecodable
from multi_token.media.examples import example_volume
from multi_token.media.fetch import Fetch
from multi_token.media.frame_sampling import FrameSampling, pick_frames
from multi_token.media.image import MAX_PIXELS, as_rgb
from multi_token.media.sniff import FILE_KINDS, FileKind
from multi_token.media.volume import (
    AXES,
    MAX_VOXELS,
    Axis,
    read_volume,
    slices,
    volume_files,
    volume_shape,
)
from multi_token.modalities.base import PretrainedModality
from multi_token.modalities.image import ANY_SIZE, FeatureKind, ImageModality, Layers
from multi_token.modalities.parts import collate_parts, index_features
from multi_token.modalities.video import VideoEncoder
from multi_token.types import Prepared

Tissue = Literal["brain", "lung", "bone", "soft_tissue", "liver"]
WINDOWS: Mapping[Tissue, tuple[float, float]] = {
    "brain": (40, 80),
    "lung": (-600, 1500),
    "bone": (400, 1800),
    "soft_tissue": (50, 400),
    "liver": (30, 150),
}
"""Tissue -> centre and width of its CT window, in Hounsfield units."""


class VolumeModality(PretrainedModality):
    """A volume of CT, MR or PET: a NIfTI file, a DICOM series or one DICOM image.

    It is brought to the canonical orientation (RAS+). Slices are taken evenly along `axis`; each
    becomes one vector or one feature per patch (`features`) of an image encoder, as [length, dim].
    """

    requires: ClassVar[tuple[str, ...]] = ("nibabel", "pydicom")
    install_extra: ClassVar[str] = "multi_token[volume]"
    limit_fields: ClassVar[Mapping[str, str]] = {"max_voxels": "max_video_pixels"}
    kit_example: ClassVar[str] = "multi_token.testing.examples:volume_example"

    type: Literal["volume"] = "volume"  # type: ignore[reportIncompatibleVariableOverride]
    encoder: str
    """Hub name or folder of an image encoder (CLIP, SigLIP, DINOv2, BiomedCLIP, RAD-DINO, ...)."""
    axis: Axis = "axial"
    """View of the slices: `axial` from inferior to superior, `coronal` from posterior to anterior,
    `sagittal` from left to right."""
    num_slices: PositiveInt = 8
    """Largest number of slices, taken evenly along `axis`; a thinner volume gives all it has."""
    window: Tissue | tuple[float, float] | None = None
    """Values that become black to white: `[centre, width]` in the units of the file, or a CT window
    by name. Default: from the 0.5th to the 99.5th percentile of the volume."""
    features: FeatureKind = "pooled"
    """Features per slice. `pooled`: the model's own pooled vector; `mean`: the mean of the patches;
    `cls`: the CLS token; `patches`: one feature per patch; `all`: patches, CLS and registers."""
    layer: Layers = None
    """Hidden state to take, counted as transformers does (-1 is the last). A list takes several and
    joins them in each feature."""
    max_voxels: PositiveInt = MAX_VOXELS
    """Largest number of voxels. A larger volume is refused before it is decoded."""
    max_pixels: PositiveInt = MAX_PIXELS
    """Largest number of pixels in a slice."""

    @model_validator(mode="after")
    def _check_fields(self) -> VolumeModality:
        if self.projector.line_break:
            raise ValueError("`line_break` in the projector is for images with `tile_grids`")
        if isinstance(self.window, tuple) and self.window[1] <= 0:
            raise ValueError(f"`window` is [centre, width], and its width is {self.window[1]:g}")
        return self

    def load(self, source: Any, fetch: Fetch) -> list[Image.Image]:
        """Return the slices that are taken of a volume, as RGB images.

        | source | meaning |
        |---|---|
        | path, URL, bytes | NIfTI (.nii, .nii.gz), a DICOM file, or a ZIP of DICOM files |
        | path of a folder | a DICOM series |
        | nibabel image | as `datasets` decodes it |
        | array [x, y, z] | voxels in RAS+ order, 1 mm apart |

        Raises:
            MediaError: The source cannot be read, has no orientation, is 4-D or is over a limit.
        """
        volume = read_volume(_inner(source), fetch, max_voxels=self.max_voxels)
        places = self._places(volume.voxels.shape[AXES[self.axis]])
        images = slices(volume, places, axis=self.axis, window=self._window_ends())
        return [as_rgb(image, name="a slice", max_pixels=self.max_pixels) for image in images]

    def _places(self, depth: int) -> list[int]:
        """Slices that are taken of `depth`."""
        return pick_frames(range(depth), FrameSampling(min(self.num_slices, depth)))

    def _window_ends(self) -> tuple[float, float] | None:
        window = WINDOWS[self.window] if isinstance(self.window, str) else self.window
        if window is None:
            return None
        centre, width = window
        return centre - width / 2, centre + width / 2

    def size_from_header(self, source: Any, fetch: Fetch) -> int:
        """Return the number of slices that `load` takes; headers alone are read."""
        shape = volume_shape(_inner(source), fetch, max_voxels=self.max_voxels)
        return len(self._places(shape[AXES[self.axis]]))

    def count_features(self, size: int) -> int | None:
        """Return the number of features of `size` slices; None if it depends on their size."""
        image = self._image
        num_each = image.count_features(ANY_SIZE) if image.tower.has_patches else 1
        return None if num_each is None else size * num_each

    def prepare(self, raw: Sequence[Image.Image]) -> Prepared:
        """Run the encoder's own image processor on the slices.

        Returns:
            `pixel_values` [slices, ...], `part`, `feature` int64 [length].
        """
        # Once, since building it validates its fields.
        image = self._image
        items = [image.prepare(one) for one in raw]
        inputs = image.collate(items) | index_features([item.num_features for item in items])
        return Prepared(inputs, num_features=len(inputs["part"]))

    def collate(self, items: Sequence[Prepared]) -> dict[str, Tensor]:
        """Join items into one batch, in which all slices are encoded together."""
        return collate_parts(items)

    def content(self, source: Any, fetch: Fetch) -> bytes:
        """Return bytes that are equal only for equal items; a folder counts by its files."""
        source = _inner(source)
        if hasattr(source, "dataobj"):
            return repr(source.affine.tolist()).encode() + bytes(source.to_bytes())
        if files := volume_files(source, fetch):
            return b"files" + b"".join(sha256(fetch.read(file)).digest() for file in files)
        return super().content(source, fetch)

    def example_sources(self) -> Sequence[bytes]:
        """Return a small NIfTI file."""
        # Loaded here too, so that a server's processes have it before they fork.
        require_package("pydicom", "volume")
        return [example_volume()]

    def file_kinds(self) -> Sequence[FileKind]:
        """Return files of volumes."""
        return [FILE_KINDS["volume"]]

    def build_encoder(self) -> VideoEncoder:
        """Return the image encoder, which encodes the slices of all items together."""
        return VideoEncoder(self._image.build_encoder(), normalize=False).eval()

    @property
    def _image(self) -> ImageModality:
        """The modality of one slice."""
        return ImageModality(
            encoder=self.encoder,
            revision=self.revision,
            features=self.features,
            layer=self.layer,
            micro_batch=self.micro_batch,
            max_pixels=self.max_pixels,
        )


def _inner(source: Any) -> Any:
    """The path or bytes of a mapping, as tables of `datasets` hold files; others unchanged."""
    if not isinstance(source, Mapping):
        return source
    given = {key: value for key, value in source.items() if value is not None}
    if not given or not given.keys() <= {"path", "bytes"}:
        raise undecodable(
            f'expected a volume as a path or {{"path": ...}}, got the keys '
            f"{', '.join(map(str, source)) or 'none'}"
        )
    return given.get("bytes", given.get("path"))
