"""Views: a batch against torchvision's functional transforms, row by row."""

import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from training import views as V
from training.recipe import Views

ALL = Views(crop_scale=(0.2, 1.0), jitter=0.9, hue=0.3, grey=0.3, blur=0.5, solarize=0.3, turn=0.5)


def pixels(count=24, side=37):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def drawn(views, count=24, side=37, seed=0):
    return V.draw(views, torch.full((count, 2), side), V.Draws(seed, count))


def reference(image, rows, i, size):
    """Row i of a batch of views, by torchvision."""
    top, left, height, width = rows.box[i].tolist()
    image = F.resized_crop(
        image / 255, top, left, height, width, [size, size], InterpolationMode.BILINEAR, antialias=True
    )
    if rows.flip[i]:
        image = F.hflip(image)
    if rows.jitter[i]:
        for number in rows.order[i].tolist():
            adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[number]
            image = adjust(image, rows.factor[i, number].item())
    if rows.grey[i]:
        image = F.rgb_to_grayscale(image, 3)
    if rows.sigma[i] > 0:
        image = F.gaussian_blur(image, [2 * V.blur_radius(size) + 1] * 2, [rows.sigma[i].item()] * 2)
    if rows.solarize[i]:
        image = F.solarize(image, 0.5)
    return torch.rot90(image, int(rows.turn[i]), (1, 2))


def without(**changes):
    calm = dict(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grey=0.0)
    return Views(**{**calm, **changes})


@pytest.mark.parametrize(
    ("views", "tolerance"),
    [
        (without(crop_scale=(0.1, 1.0), crop_ratio=(0.5, 2.0)), 1e-5),
        (without(flip=0.5), 1e-5),
        (without(jitter=1.0, contrast=0.0, saturation=0.0, hue=0.0), 1e-3),
        (without(jitter=1.0, brightness=0.0, saturation=0.0, hue=0.0), 1e-3),
        (without(jitter=1.0, brightness=0.0, contrast=0.0, hue=0.0), 1e-3),
        (without(jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.5), 1e-2),
        (without(grey=0.5), 1e-3),
        (without(blur=0.7), 1e-3),
        (without(solarize=0.5), 1e-3),
        (without(turn=0.8), 1e-3),
    ],
    ids=["crop", "flip", "brightness", "contrast", "saturation", "hue", "grey", "blur", "solarize", "turn"],
)
@pytest.mark.parametrize("size", [32, 48, 112])  # the last are made one after another
def test_each_view_is_torchvisions(views, tolerance, size):
    rows, batch = drawn(views), pixels()
    got = V.apply(batch, rows, size)
    for i in range(len(batch)):
        assert (got[i] - reference(batch[i], rows, i, size)).abs().max() <= tolerance


def test_all_views_together_are_torchvisions():
    rows, batch = drawn(ALL), pixels()
    rows.solarize &= False  # a step at 0.5 makes any difference in rounding a large one
    got = V.apply(batch, rows, 32)
    for i in range(len(batch)):
        assert (got[i] - reference(batch[i], rows, i, 32)).abs().max() <= 1e-2


def test_each_kind_of_view_is_drawn_about_as_often_as_asked():
    rows = drawn(ALL, count=4000)
    for chosen, expected in [
        (rows.flip, 0.5),
        (rows.jitter, 0.9),
        (rows.grey, 0.3),
        (rows.sigma > 0, 0.5),
        (rows.solarize, 0.3),
        (rows.turn > 0, 0.5),
    ]:
        assert abs(chosen.double().mean() - expected) < 0.04
    area = (rows.box[:, 2] * rows.box[:, 3]) / 37**2
    assert area.min() > 0.15
    assert area.max() <= 1
    assert 0.5 < area.mean() < 0.65
    assert set(map(tuple, rows.order.tolist())).__len__() == 24


def test_jitter_brightens_as_often_as_it_darkens():
    factor = drawn(ALL, 4000).factor
    for number, strength in enumerate((0.4, 0.4, 0.4)):
        values = factor[:, number]
        assert abs(values.mean() - 1) < 0.02
        assert (values.min() < 1 - 0.95 * strength) & (values.max() > 1 + 0.95 * strength)
    hue = factor[:, 3]
    assert (abs(hue.mean()) < 0.02) & (hue.min() < -0.28) & (hue.max() > 0.28)


def test_crops_are_upright_as_often_as_wide_and_of_every_area():
    for size, square in (((40, 40), True), ((40, 60), False), ((60, 40), False)):
        rows = V.draw(Views(crop_scale=(0.2, 0.6)), torch.tensor([size]).expand(6000, 2), V.Draws(0, 6000))
        top, left, height, width = rows.box.double().T
        area = height * width / (size[0] * size[1])
        assert (area.min() < 0.23) & (area.max() > 0.57) & (abs(area.mean() - 0.4) < 0.02)
        ratio = (width / height).log()
        assert (ratio.min() < -0.25) & (ratio.max() > 0.25)
        assert abs((height > width).double().mean() - (width > height).double().mean()) < (0.05 if square else 0.1)
        assert (top + height).max() == size[0]
        assert (left + width).max() == size[1]
        assert top.min() == left.min() == 0


def test_where_no_crop_fits_it_is_the_largest_of_an_allowed_ratio_in_the_middle():
    for size, expected in (((10, 60), [0, 23, 10, 13]), ((60, 10), [23, 0, 13, 10])):
        rows = V.draw(Views(crop_scale=(1.0, 1.0)), torch.tensor([size]).expand(8, 2), V.Draws(0, 8))
        assert rows.box.tolist() == [expected] * 8
        theirs = RandomResizedCrop.get_params(torch.zeros(3, *size), [1.0, 1.0], [0.75, 4 / 3])
        assert [*theirs] == expected


def test_turns_are_of_every_side():
    turns = drawn(ALL, 4000).turn
    counts = torch.bincount(turns, minlength=4).tolist()
    assert len(counts) == 4
    assert min(counts[1:]) > 550 < max(counts[1:]) < 780


def test_draws_do_not_depend_on_how_the_batch_is_split():
    whole = V.Draws(5, 12)
    parts = [V.Draws(5, 12, start, start + 3) for start in range(0, 12, 3)]
    assert torch.equal(whole.uniform(2), torch.cat([part.uniform(2) for part in parts]))
    assert torch.equal(whole.integers(9), torch.cat([part.integers(9) for part in parts]))


def test_plain_view_is_what_timm_evaluates_on():
    stored = pixels(1, 37)
    got = V.plain(stored, torch.tensor([37]), 32 / 37, 32)[0]
    transform = create_transform((3, 32, 32), interpolation="bilinear", crop_pct=32 / 37, mean=(0, 0, 0), std=(1, 1, 1))
    expected = transform(Image.fromarray(stored[0].permute(1, 2, 0).numpy()))
    assert (got - expected).abs().max() <= 1e-6


def test_small_images_of_a_batch_are_cropped_within_their_own_side():
    batch = pixels(2, 20)
    batch[1, :, 10:] = 255
    batch[1, :, :, 10:] = 255
    batch[1, :, :10, :10] = 7
    sizes = torch.tensor([[20, 20], [10, 10]])
    rows = V.draw(without(crop_scale=(0.2, 1.0)), sizes, V.Draws(0, 2))
    assert torch.allclose(V.apply(batch, rows, 16)[1], torch.tensor(7 / 255))
    assert torch.allclose(V.plain(batch, sizes[:, 0], 0.9, 16)[1], torch.tensor(7 / 255))


def test_familiar_views_are_the_image_its_mirror_image_and_its_corners():
    images = torch.rand(3, 3, 20, 20)
    same, flipped, *corners = (view(images) for view in V.FAMILIAR)
    assert torch.equal(same, images)
    assert torch.equal(flipped, images.flip(3))
    for found, (down, across, mirrored) in zip(corners, [(0, 0, 0), (0, 4, 1), (4, 0, 1), (4, 4, 0)], strict=True):
        cut = images[:, :, down : down + 16, across : across + 16]
        expected = F.resize(cut, [20, 20], InterpolationMode.BILINEAR, antialias=True)
        assert torch.allclose(found, expected.flip(3) if mirrored else expected, atol=1e-5)


def test_tiles_lie_in_their_cells_apart_from_each_other():
    images = torch.arange(36.0 * 36).view(1, 1, 36, 36).expand(5, 3, 36, 36)
    draws = V.Draws(0, 5)
    cut = V.tiles(images, 3, 9, draws)
    assert cut.shape == (5, 9, 3, 9, 9)
    assert torch.allclose(cut.mean((2, 3, 4)), torch.zeros(5, 9), atol=1e-5)
    assert torch.allclose(cut.std((2, 3, 4)), torch.ones(5, 9), atol=1e-3)
    place = (V.Draws(0, 5).uniform(9, 2) * (12 - 9 + 1)).long()
    for sample in range(5):
        for tile in range(9):
            top, left = tile // 3 * 12 + place[sample, tile, 0], tile % 3 * 12 + place[sample, tile, 1]
            piece = images[sample, :, top : top + 9, left : left + 9]
            assert torch.allclose(cut[sample, tile], (piece - piece.mean()) / piece.std(), atol=1e-4)
    assert len({tuple(x) for x in place.view(-1, 2).tolist()}) > 8


def test_shuffled_cells_are_where_the_order_says():
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(V.shuffled((0, 1, 2, 3), 2)(image), image)
    turned = V.shuffled((3, 0, 1, 2), 2)(image)[0, 0]
    assert turned[:2, :2].tolist() == [[10, 11], [14, 15]]
    assert turned[:2, 2:].tolist() == [[0, 1], [4, 5]]
