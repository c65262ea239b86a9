"""Anyres (LLaVA-NeXT): a downscaled image and a grid of tiles, read line by line.

The rules are those of LLaVA-NeXT (https://llava-vl.github.io/blog/2024-01-30-llava-next) as
transformers' LlavaNext follows them, so that its checkpoints give the same numbers here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

NEWLINE = -1
"""Value of `part` where a line ends; the projector writes its `line_break` embedding there."""

Grid = tuple[int, int]
"""Rows and columns of tiles."""


def best_grid(height: int, width: int, grids: Sequence[Grid], side: int) -> Grid:
    """Return the grid of tiles (`side` pixels each way) that keeps most pixels of an image.

    Ties go to the grid with the least empty space, then to the first.
    """

    def kept_and_waste(grid: Grid) -> tuple[int, int]:
        rows, columns = grid[0] * side, grid[1] * side
        scale = min(columns / width, rows / height)
        # Upscaling adds no pixels, so an image smaller than the grid keeps its own number.
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - rows * columns

    return max(grids, key=kept_and_waste)


def crop_tiles(
    image: Image.Image, grid: Grid, side: int, resample: Image.Resampling
) -> list[Image.Image]:
    """Return the complete image squeezed into one square, then its tiles in reading order.

    The tiles show the image in its own proportions, centred on black.
    """
    height, width = grid[0] * side, grid[1] * side
    by_width, by_height = width / image.width, height / image.height
    # Rounded up, as LlavaNext does: rounding down would shift the tiles by a pixel.
    if by_width < by_height:
        size = width, min(math.ceil(image.height * by_width), height)
    else:
        size = min(math.ceil(image.width * by_height), width), height
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(size, resample), ((width - size[0]) // 2, (height - size[1]) // 2))
    corners = [(x, y) for y in range(0, height, side) for x in range(0, width, side)]
    tiles = [canvas.crop((x, y, x + side, y + side)) for x, y in corners]
    return [image.resize((side, side), resample), *tiles]


def reading_order(height: int, width: int, grid: Grid, patches: int) -> tuple[Tensor, Tensor]:
    """Return tile and patch of each feature of an image, int64 [length] each.

    Tiles have `patches` x `patches` patches; tile 0 is the complete image. Its patches come first,
    then the lines of the grid from end to end, each closed by NEWLINE. Lines and columns that hold
    only the black around the image are left out.
    """
    rows, columns = grid[0] * patches, grid[1] * patches
    top = left = 0
    # Rounded as LlavaNext does: an image of the grid's own shape would else lose a line to floats.
    if width / height > columns / rows:
        top = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        left = (columns - int(round(width * (rows / height), 7))) // 2
    y = torch.arange(top, rows - top)[:, None]
    x = torch.arange(left, columns - left)[None]
    tile = 1 + (y // patches) * grid[1] + x // patches
    patch = (y % patches) * patches + x % patches
    first = torch.arange(patches * patches)
    return (
        torch.cat([torch.zeros_like(first), _with_line_ends(tile, NEWLINE)]),
        torch.cat([first, _with_line_ends(patch, 0)]),
    )


def _with_line_ends(lines: Tensor, end: int) -> Tensor:
    return nn.functional.pad(lines, (0, 1), value=end).flatten()
