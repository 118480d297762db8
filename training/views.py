"""Random views of a batch, on its device, different for every sample.

Each view first draws its parameters, a row per sample (`draw`), then applies them (`apply`). Applying a row by itself
gives what torchvision's functional transforms give for it; the tests hold the two together.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .recipe import Views

View = Callable[[Tensor], Tensor]  # [B, 3, H, W] to the same

JITTER = ("brightness", "contrast", "saturation", "hue")
NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # factors of these that change nothing
LUMA = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale
CACHED = 2**19  # values that a CPU changes at once: 2 MiB of float32
LARGE = 2**15  # values of an image from which on a CPU makes views of one after another
BAND = 32  # px that a blur makes at once


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

    def __getitem__(self, part: slice) -> "Rows":
        return Rows(*(getattr(self, field.name)[part] for field in dataclasses.fields(self)))


def draw(views: Views, sizes: Tensor, draws: Draws) -> Rows:
    """Draw the parameters of a view of each image, whose [B, 2] heights and widths are given in px."""
    strength = torch.tensor([views.brightness, views.contrast, views.saturation, views.hue], dtype=torch.float64)
    centre = torch.tensor(NEUTRAL, dtype=torch.float64)
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
    # On a CPU, as many at a time as its cache holds while one change after another is made to them.
    step, values = max(1, len(pixels)), 3 * size * size
    if pixels.device.type == "cpu":
        step = 1 if values >= LARGE else CACHED // values
    with torch.autocast(pixels.device.type, enabled=False):
        parts = [_apply(pixels[i : i + step], rows[i : i + step], size) for i in range(0, len(pixels), step)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def _apply(pixels: Tensor, rows: Rows, size: int) -> Tensor:
    images = _jitter(resized_crop(pixels, rows.box, size, rows.flip), rows)
    _change(images, rows.grey, lambda part, _: luma(part).expand_as(part))
    _change(images, rows.sigma > 0, lambda part, which: blur(part, rows.sigma[which]))
    _change(images, rows.solarize, lambda part, _: torch.where(part >= 0.5, 1 - part, part))
    return turn(images, rows.turn)


def plain(pixels: Tensor, sides: Tensor, crop_pct: float, size: int) -> Tensor:
    """Un-augmented squares: their centre, crop_pct of the side, at `size`; what timm's evaluation transform shows."""
    sides = sides.cpu()
    side = (sides * crop_pct).round().long().clamp(min=1)
    top = (sides - side) // 2
    return resized_crop(pixels, torch.stack([top, top, side, side], 1), size)


def random_views(views: Views, pixels: Tensor, sizes: Tensor, draws: Draws, size: int) -> Tensor:
    """A random view of each image: `draw`, then `apply`."""
    return apply(pixels, draw(views, sizes, draws), size)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """[0, 1] to zero mean and unit deviation."""
    return (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def resized_crop(images: Tensor, box: Tensor, size: int, flip: Tensor | None = None) -> Tensor:
    """Crop each image to its box and bring it to `size` by antialiased bilinear interpolation, then flip some.

    Interpolation is linear in the image and separable: for boxes that differ, a small matrix for the rows of each image
    and one for the columns; for one box, torch's own.

    Args:
        images: [B, 3, H, W], uint8 or float32 in [0, 1].
        box: [B, 4] int64, top, left, height and width, px, on the CPU.
        size: px.
        flip: [B] bool, on the CPU.
    """
    first, last = box[:, :2].amin(0), (box[:, :2] + box[:, 2:]).amax(0)
    (top, left), (bottom, right) = first.tolist(), last.tolist()
    images = images[:, :, top:bottom, left:right]  # what no box holds is not computed with
    images = as_float(images) if images.dtype == torch.uint8 else images
    if bool((box == box[0]).all()):
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True).clamp_(0, 1)
        _change(images, torch.zeros(1) if flip is None else flip, lambda part, _: part.flip(3))
        return images
    start, length = (x.to(images.device, non_blocking=True) for x in (box[:, :2] - first, box[:, 2:]))
    down = _interpolation(start[:, 0], length[:, 0], bottom - top, size)
    across = _interpolation(start[:, 1], length[:, 1], right - left, size)
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


def _change(images: Tensor, chosen: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Make the chosen samples `change(part, which)`; the choice is on the CPU, so the device need not wait.

    `part` may be changed in place.
    """
    which = chosen.nonzero().flatten()
    if len(which) == len(images):
        images.copy_(change(images, which))
    elif len(which):
        index = which.to(images.device, non_blocking=True)
        images.index_copy_(0, index, change(images.index_select(0, index), which))


def _jitter(images: Tensor, rows: Rows) -> Tensor:
    made = rows.jitter.view(-1, 1) & (rows.factor != torch.tensor(NEUTRAL))
    for place in torch.where(made.gather(1, rows.order), rows.order, -1).unbind(1):
        for number in set(place.tolist()) - {-1}:
            _change(images, place == number, lambda part, which, n=number: _adjust(part, n, rows.factor[which, n]))
    return images


def _adjust(images: Tensor, number: int, factor: Tensor) -> Tensor:
    """Make a change of `JITTER` to images in [0, 1], in place."""
    factor = factor.float().to(images.device, non_blocking=True).view(-1, 1, 1, 1)
    if JITTER[number] == "hue":
        return _shift_hue(images, factor)
    if JITTER[number] == "contrast":
        other = luma(images.mean((2, 3), keepdim=True)) * (1 - factor)
    elif JITTER[number] == "saturation":
        other = luma(images).mul_(1 - factor)
    else:
        return images.mul_(factor).clamp_(0, 1)
    return images.mul_(factor).add_(other).clamp_(0, 1)


def luma(images: Tensor) -> Tensor:
    """Brightness of images, [B, 1, H, W]."""
    red, green, blue = images.split(1, 1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the colour circle by `shift` of a full turn, through hue, saturation and value (Smith 1978), in place."""
    red, green, blue = images.split(1, 1)
    low = torch.minimum(red, green).minimum(blue)
    chroma = torch.maximum(red, green).maximum(blue).sub_(low)
    # In sixths of the circle, with one channel at 0 and one at 1, the distance from red is 1 + green + blue - red in
    # each of the six sectors, to one side where green is the larger of the two and to the other where blue is.
    hue = (green + blue).sub_(red).sub_(low).div_(chroma.clamp(min=1e-12)).add_(1)
    hue = torch.copysign(hue, green - blue).add_(6 * shift)
    hue.sub_((hue / 6).floor_(), alpha=6)
    for channel, centre in ((red, 3), (green, 2), (blue, 4)):
        torch.sub(hue, centre, out=channel).abs_()
        channel = channel.sub_(1) if centre == 3 else channel.neg_().add_(2)
        channel.clamp_(0, 1).mul_(chroma).add_(low)
    return images


def blur_radius(size: int) -> int:
    """Radius of the blur's kernel, px: the kernel is about a tenth of the image (SimCLR), at least 3 wide."""
    return max(1, round(size * 0.1) // 2)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with a standard deviation for each sample, borders reflected."""
    count, _, size, _ = images.shape
    radius, step = min(blur_radius(size), size - 1), min(size, BAND)
    taps = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weight = torch.exp(-0.5 * (taps / sigma.cpu().double().view(-1, 1)) ** 2)
    weight = (weight / weight.sum(1, keepdim=True)).float()
    # A band of `step` pixels is a matrix times them and their neighbours, the same for each band.
    width = step + 2 * radius
    place = torch.arange(2 * radius + 1).view(-1, 1) + torch.arange(step)
    matrix = torch.zeros(count, width, step)
    matrix.scatter_(1, place.expand(count, -1, -1), weight.unsqueeze(2).expand(-1, -1, step))
    matrix = matrix.to(images.device, non_blocking=True)
    for _ in range(2):  # along rows, then along columns
        padded = F.pad(F.pad(images, (radius, radius, 0, 0), mode="reflect"), (0, -size % step))
        bands = padded.unfold(3, width, step).reshape(count, -1, width)
        images = (bands @ matrix).view(count, 3, size, -1)[..., :size].transpose(2, 3)
    return images


def turn(images: Tensor, quarters: Tensor) -> Tensor:
    """Turn each image by that many quarter turns, counter-clockwise as torch.rot90; the choice is on the CPU."""
    turned = images.clone() if bool(quarters.any()) else images
    for quarter in (1, 2, 3):
        _change(turned, quarters == quarter, lambda part, _, q=quarter: torch.rot90(part, q, (2, 3)))
    return turned


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
        box = torch.tensor([*(size - length if far else 0 for far in (bottom, right)), length, length])
        box = box.expand(len(images), 4)
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
