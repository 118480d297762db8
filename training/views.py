"""Random views of a batch, on its device, different for every sample.

Each view first draws its parameters, a row per sample (`draw`), then applies them (`apply`). Applying a row by itself
gives what torchvision's functional transforms give for it; the tests hold the two together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .recipe import Views

View = Callable[[Tensor], Tensor]  # [B, 3, H, W] to the same

JITTER = ("brightness", "contrast", "saturation", "hue")
LUMA = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale


class Draws:
    """A step's random stream: every number is drawn for the whole global batch, of which a process takes its rows.

    So views do not depend on the number of processes or micro-batches. Numbers are drawn on the CPU, the same on every
    device.

    Args:
        seed: of the step.
        total: rows of the global batch.
        start, stop: this process's rows.
    """

    def __init__(self, seed: int, total: int, start: int = 0, stop: int | None = None) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.total, self.start, self.stop = total, start, total if stop is None else stop

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """[rows, *shape] float64, uniform in [low, high)."""
        drawn = torch.rand(self.total, *shape, generator=self.generator, dtype=torch.float64)
        return low + (high - low) * drawn[self.start : self.stop]

    def integers(self, high: int, *shape: int) -> Tensor:
        """[rows, *shape] int64, uniform in [0, high)."""
        return torch.randint(high, (self.total, *shape), generator=self.generator)[self.start : self.stop]


@dataclass
class Rows:
    """Parameters of a batch of views, a row per sample, on the CPU.

    Attributes:
        box: [B, 4] int64, top, left, height and width of the crop, px of the stored image.
        flip: [B] bool.
        order: [B, 4] int64, the order in which the four colour changes are made.
        factor: [B, 4] float64, of brightness, contrast, saturation and hue; 1, 1, 1, 0 change nothing.
        jitter: [B] bool, whether they are made.
        grey, solarize: [B] bool.
        sigma: [B] float64, px; 0 where nothing is blurred.
        turn: [B] int64, quarter turns counter-clockwise.
    """

    box: Tensor
    flip: Tensor
    order: Tensor
    factor: Tensor
    jitter: Tensor
    grey: Tensor
    solarize: Tensor
    sigma: Tensor
    turn: Tensor


def draw(views: Views, sizes: Tensor, draws: Draws) -> Rows:
    """Draw the parameters of a view of each image, whose [B, 2] heights and widths are given in px."""
    strength = torch.tensor([views.brightness, views.contrast, views.saturation, views.hue], dtype=torch.float64)
    centre = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    sigma = draws.uniform(low=views.blur_sigma[0], high=views.blur_sigma[1])
    return Rows(
        box=_draw_boxes(views, sizes.cpu(), draws),
        flip=draws.uniform() < views.flip,
        order=draws.uniform(4).argsort(1),
        factor=centre + strength * draws.uniform(4, low=-1.0, high=1.0),
        jitter=draws.uniform() < views.jitter,
        grey=draws.uniform() < views.grey,
        solarize=draws.uniform() < views.solarize,
        sigma=torch.where(draws.uniform() < views.blur, sigma, 0.0),
        turn=torch.where(draws.uniform() < views.turn, 1 + draws.integers(3), 0),
    )


def _draw_boxes(views: Views, sizes: Tensor, draws: Draws, attempts: int = 10) -> Tensor:
    """Crops of random area and aspect ratio (Szegedy et al. 2015), as torchvision's RandomResizedCrop draws them.

    Where no attempt fits, it is the largest centre crop whose ratio is allowed.
    """
    tall, wide = sizes.unbind(1)
    area = draws.uniform(attempts, low=views.crop_scale[0], high=views.crop_scale[1]) * (tall * wide).unsqueeze(1)
    low, high = math.log(views.crop_ratio[0]), math.log(views.crop_ratio[1])
    ratio = draws.uniform(attempts, low=low, high=high).exp()
    width = (area * ratio).sqrt().round().long()
    height = (area / ratio).sqrt().round().long()
    fits = (width > 0) & (height > 0) & (width <= wide.unsqueeze(1)) & (height <= tall.unsqueeze(1))
    first = fits.to(torch.int8).argmax(1, keepdim=True)
    found = fits.any(1)
    width = torch.where(
        found, width.gather(1, first).squeeze(1), torch.minimum(wide, _share(tall, views.crop_ratio[1]))
    )
    height = torch.where(
        found, height.gather(1, first).squeeze(1), torch.minimum(tall, _share(wide, 1 / views.crop_ratio[0]))
    )
    place = draws.uniform(2)
    top = torch.where(found, (place[:, 0] * (tall - height + 1)).long(), (tall - height) // 2)
    left = torch.where(found, (place[:, 1] * (wide - width + 1)).long(), (wide - width) // 2)
    return torch.stack([top, left, height, width], 1)


def _share(lengths: Tensor, factor: float) -> Tensor:
    return (lengths * factor).round().long().clamp(min=1)


def as_float(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to float32 in [0, 1]."""
    return pixels.to(torch.float32) / 255


def apply(pixels: Tensor, rows: Rows, size: int) -> Tensor:
    """uint8 [B, 3, H, W] to views [B, 3, size, size], float32 in [0, 1], on the device of `pixels`."""
    with torch.autocast(pixels.device.type, enabled=False):
        images = resized_crop(as_float(pixels), rows.box, size, rows.flip)
        images = _jitter(images, rows)
        images = _change(images, rows.grey, lambda part, _: _luma(part).expand_as(part))
        images = _change(images, rows.sigma > 0, lambda part, which: blur(part, rows.sigma[which]))
        images = _change(images, rows.solarize, lambda part, _: torch.where(part >= 0.5, 1 - part, part))
        return turn(images, rows.turn)


def plain(pixels: Tensor, sides: Tensor, crop_pct: float, size: int) -> Tensor:
    """Un-augmented squares: their centre, crop_pct of the side, at `size`; what timm's evaluation transform shows."""
    sides = sides.cpu()
    side = (sides * crop_pct).round().long().clamp(min=1)
    top = (sides - side) // 2
    return resized_crop(as_float(pixels), torch.stack([top, top, side, side], 1), size)


def random_views(views: Views, pixels: Tensor, sizes: Tensor, draws: Draws, size: int) -> Tensor:
    """A random view of each image: `draw`, then `apply`."""
    return apply(pixels, draw(views, sizes, draws), size)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """[0, 1] to zero mean and unit deviation."""
    return (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def resized_crop(images: Tensor, box: Tensor, size: int, flip: Tensor | None = None) -> Tensor:
    """Crop each image to its box and bring it to `size` by antialiased bilinear interpolation, then flip some.

    Interpolation is linear in the image and separable: a small matrix for the rows and one for the columns.
    """
    box = box.to(images.device, non_blocking=True)
    down = _interpolation(box[:, 0], box[:, 2], images.shape[2], size)
    across = _interpolation(box[:, 1], box[:, 3], images.shape[3], size)
    if flip is not None:
        flip = flip.to(images.device, non_blocking=True).view(-1, 1, 1)
        across = torch.where(flip, across.flip(1), across)
    return (down.unsqueeze(1) @ images @ across.transpose(1, 2).unsqueeze(1)).clamp_(0, 1)


def _interpolation(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """[B, size, source] weights of antialiased bilinear interpolation of `length` pixels from `start` on."""
    scale = (length / size).view(-1, 1, 1)
    centre = (torch.arange(size, device=start.device).view(1, -1, 1) + 0.5) * scale
    place = torch.arange(source, device=start.device).view(1, 1, -1) - start.view(-1, 1, 1)
    weight = (1 - (place + 0.5 - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weight = weight * ((place >= 0) & (place < length.view(-1, 1, 1)))
    return weight / weight.sum(2, keepdim=True)


def _change(images: Tensor, chosen: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Apply `change(part, which)` to the chosen samples; the choice is on the CPU, so the device need not wait."""
    which = chosen.nonzero().flatten()
    if len(which) == 0:
        return images
    index = which.to(images.device, non_blocking=True)
    return images.index_copy(0, index, change(images.index_select(0, index), which))


def _jitter(images: Tensor, rows: Rows) -> Tensor:
    for place in range(len(JITTER)):
        for number, name in enumerate(JITTER):
            chosen = rows.jitter & (rows.order[:, place] == number) & (rows.factor[:, number] != (name != "hue"))

            def change(part: Tensor, which: Tensor, name: str = name, number: int = number) -> Tensor:
                return adjust(part, name, rows.factor[which, number])

            images = _change(images, chosen, change)
    return images


def adjust(images: Tensor, name: str, factor: Tensor) -> Tensor:
    """Change brightness, contrast, saturation (factor 1: nothing) or hue (factor 0: nothing) of images in [0, 1]."""
    factor = factor.float().to(images.device, non_blocking=True).view(-1, 1, 1, 1)
    if name == "hue":
        return _shift_hue(images, factor)
    if name == "brightness":
        other = torch.zeros_like(images)
    elif name == "contrast":
        other = _luma(images).mean((1, 2, 3), keepdim=True)
    else:
        other = _luma(images)
    return (factor * images + (1 - factor) * other).clamp(0, 1)


def _luma(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(1)


def _shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the colour circle by `shift` of a full turn, through hue, saturation and value (Smith 1978)."""
    high, low = images.amax(1), images.amin(1)
    chroma = high - low
    red, green, blue = images.unbind(1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    sector = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    sector = torch.remainder(sector + 6 * shift.squeeze(1), 6)
    # A channel is V - C max(0, min(k, 4 - k, 1)) with k = (n + sector) mod 6 and n = 5, 3, 1 for red, green, blue.
    k = torch.remainder(torch.stack([sector + n for n in (5, 3, 1)], 1), 6)
    return high.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(k, 4 - k).clamp(0, 1)


def blur_radius(size: int) -> int:
    """Radius of the blur's kernel, px: the kernel is about a tenth of the image (SimCLR), at least 3 wide."""
    return max(1, round(size * 0.1) // 2)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with a standard deviation for each sample, borders reflected."""
    size = images.shape[-1]
    radius = min(blur_radius(size), size - 1)
    taps = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weight = torch.exp(-0.5 * (taps / sigma.cpu().double().view(-1, 1)) ** 2)
    weight = weight / weight.sum(1, keepdim=True)
    source = (torch.arange(size).view(-1, 1) + taps.long()).abs()
    source = torch.where(source >= size, 2 * (size - 1) - source, source)
    matrix = torch.zeros(len(sigma), size, size, dtype=torch.float64)
    matrix.scatter_add_(2, source.expand(len(sigma), -1, -1), weight.unsqueeze(1).expand(-1, size, -1).contiguous())
    matrix = matrix.float().to(images.device, non_blocking=True).unsqueeze(1)
    return matrix @ images @ matrix.transpose(2, 3)


def turn(images: Tensor, quarters: Tensor) -> Tensor:
    """Turn each image by that many quarter turns, counter-clockwise as torch.rot90."""
    for quarter in (1, 2, 3):
        images = _change(images, quarters == quarter, lambda part, _, q=quarter: torch.rot90(part, q, (2, 3)))
    return images


def tiles(images: Tensor, grid: int, side: int, draws: Draws) -> Tensor:
    """Cut images into cells, and a tile out of each at a random place: [B, 3, S, S] to [B, grid^2, 3, side, side].

    A gap between tiles and the jitter of their places leave no line to be followed from one into the next. Each tile is
    brought to zero mean and unit deviation, so that its brightness does not tell where it was (Noroozi & Favaro 2016,
    section 3.3).
    """
    cell = images.shape[2] // grid
    place = (draws.uniform(grid * grid, 2) * (cell - side + 1)).long()
    place += torch.cartesian_prod(torch.arange(grid), torch.arange(grid)) * cell
    corner = place.to(images.device, non_blocking=True)
    along = torch.arange(side, device=images.device)
    rows, columns = (corner[..., axis, None] + along for axis in (0, 1))  # [B, grid^2, side]
    which = torch.arange(len(images), device=images.device).view(-1, 1, 1, 1)
    cut = images.permute(0, 2, 3, 1)[which, rows[..., :, None], columns[..., None, :]].permute(0, 1, 4, 2, 3)
    mean, deviation = cut.mean((2, 3, 4), keepdim=True), cut.std((2, 3, 4), keepdim=True)
    return (cut - mean) / deviation.clamp(min=1e-3)


def shuffled(order: Sequence[int], grid: int) -> View:
    """A view whose grid x grid cells are rearranged: the cell at place i is the one that was at order[i]."""

    def view(images: Tensor) -> Tensor:
        cell = images.shape[2] // grid
        result = images.clone()
        for place, source in enumerate(order):
            (to_row, to_column), (row, column) = (divmod(number, grid) for number in (place, source))
            result[:, :, to_row * cell : (to_row + 1) * cell, to_column * cell : (to_column + 1) * cell] = images[
                :, :, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell
            ]
        return result

    return view


def _corner(bottom: bool, right: bool, flipped: bool, side: float = 0.8) -> View:
    def view(images: Tensor) -> Tensor:
        size = images.shape[2]
        length = round(side * size)
        start = torch.tensor([size - length if far else 0 for far in (bottom, right)], dtype=torch.float32)
        box = torch.cat([start, start.new_full((2,), length)]).expand(len(images), 4)
        return resized_crop(images, box, size, torch.full((len(images),), flipped))

    return view


def _same(images: Tensor) -> Tensor:
    return images


def _flipped(images: Tensor) -> Tensor:
    return images.flip(3)


# What random views make a network familiar with: the image, its mirror image, its corners (every other one mirrored).
FAMILIAR: tuple[View, ...] = (
    _same,
    _flipped,
    *(_corner(bottom, right, bottom != right) for bottom in (False, True) for right in (False, True)),
)
