"""Anyres (LLaVA-NeXT): an image as its small whole and a grid of tiles, read line by line.

The rules are those of LLaVA-NeXT (https://llava-vl.github.io/blog/2024-01-30-llava-next) as
transformers' LlavaNext follows them, so that its checkpoints give the same numbers here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from multi_token.types import Features, Prepared

NEWLINE = -1
"""In place of a tile's number: here a line ends."""
NOTHING = -2
"""In place of a tile's number: padding behind a shorter item."""

Grid = tuple[int, int]
"""Rows and columns of tiles."""


def best_grid(height: int, width: int, grids: Sequence[Grid], side: int) -> Grid:
    """The grid of tiles (`side` pixels each way) that keeps most pixels of an image.

    Among equals the one with the least empty space, then the first.
    """

    def kept_and_waste(grid: Grid) -> tuple[int, int]:
        rows, columns = grid[0] * side, grid[1] * side
        scale = min(columns / width, rows / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - rows * columns

    return max(grids, key=kept_and_waste)


def crop_tiles(
    picture: Image.Image, grid: Grid, side: int, resample: Image.Resampling
) -> list[Image.Image]:
    """The whole image squeezed into one square, then its tiles in reading order.

    For the tiles it keeps its proportions and lies centred on black.
    """
    height, width = grid[0] * side, grid[1] * side
    by_width, by_height = width / picture.width, height / picture.height
    if by_width < by_height:
        size = width, min(math.ceil(picture.height * by_width), height)
    else:
        size = min(math.ceil(picture.width * by_height), width), height
    canvas = Image.new("RGB", (width, height))
    canvas.paste(picture.resize(size, resample), ((width - size[0]) // 2, (height - size[1]) // 2))
    corners = [(x, y) for y in range(0, height, side) for x in range(0, width, side)]
    tiles = [canvas.crop((x, y, x + side, y + side)) for x, y in corners]
    return [picture.resize((side, side), resample), *tiles]


def reading_order(height: int, width: int, grid: Grid, patches: int) -> tuple[Tensor, Tensor]:
    """Which patch of which tile each feature of an item is, int64 [length] each.

    Tiles have `patches` x `patches` patches; tile 0 is the whole image. First all of its patches,
    then the lines of the grid from end to end, each closed by LINE_END. Lines and columns that hold
    only the black around the image are left out.
    """
    rows, columns = grid[0] * patches, grid[1] * patches
    top = left = 0
    # rounded as LlavaNext does, or an image of the grid's own shape would lose a line to floats
    if width / height > columns / rows:
        top = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        left = (columns - int(round(width * (rows / height), 7))) // 2
    y = torch.arange(top, rows - top)[:, None]
    x = torch.arange(left, columns - left)[None]
    tile = 1 + (y // patches) * grid[1] + x // patches
    patch = (y % patches) * patches + x % patches
    whole = torch.arange(patches * patches)
    return (
        torch.cat([torch.zeros_like(whole), _with_line_ends(tile, NEWLINE)]),
        torch.cat([whole, _with_line_ends(patch, 0)]),
    )


def _with_line_ends(lines: Tensor, end: int) -> Tensor:
    return nn.functional.pad(lines, (0, 1), value=end).flatten()


def collate_tiles(items: Sequence[Prepared]) -> dict[str, Tensor]:
    """All tiles of all items in one batch, and which feature is which.

    pixel_values [tiles, channels, height, width]; tile, patch int64 [items, longest].
    """
    pixels = [item.inputs["pixel_values"] for item in items]
    tiles, num_before = [], 0
    for item, own in zip(items, pixels, strict=True):
        tile = item.inputs["tile"]
        tiles.append(torch.where(tile >= 0, tile + num_before, tile))
        num_before += len(own)
    patches = [item.inputs["patch"] for item in items]
    pad = nn.utils.rnn.pad_sequence
    return {
        "pixel_values": torch.cat(pixels),
        "tile": pad(tiles, batch_first=True, padding_value=NOTHING),
        "patch": pad(patches, batch_first=True),
    }


def arrange(values: Tensor, tile: Tensor, patch: Tensor) -> Features:
    """Patches of all tiles [tiles, patches, dim] -> Features of the items, line by line."""
    index = tile.clamp(min=0) * values.shape[1] + patch
    arranged = values.flatten(0, 1)[index] * (tile >= 0)[..., None]
    return Features(arranged, mask=tile != NOTHING, newlines=tile == NEWLINE)
