"""What is measured, a function for each part: its rows, one after the other."""

import itertools
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .. import backbone as B
from .. import launch, loop, proxies, views
from ..batches import ahead
from ..evaluate import knn, linear
from ..kmeans import kmeans
from ..launch import Key
from ..operations import suited
from ..recipe import Model, Views
from . import TINY, Row, Size, devices, features, pictures, row, seconds, side_by_side

ROOT = Path(__file__).parent.parent.parent
NETWORKS = [
    ("mobilenetv3_small_100", 96),
    ("tf_efficientnet_lite0", 96),
    ("convnext_atto", 96),
    ("resnet18", 96),
    ("vit_tiny_patch16_224", 224),
]


def step(size: Size) -> Iterator[Row]:
    for model, side in [("resnet18", side) for side in size.sides] + [("vit_tiny_patch16_224", 224)] * (size != TINY):
        for device in devices():
            kind = "ViT" if model.startswith("vit") else "CNN"
            yield row(f"loop over a bare step, {kind} {side} px", _steps(model, side, size, device), device)
    for model, side in NETWORKS[:1] if size == TINY else NETWORKS:
        for device in devices():
            name = f"chosen precision and format over the best, {model}"
            yield row(name, _choices(model, side, size, device), device)


def _steps(model: str, side: int, size: Size, device: str) -> list:
    """Times of a bare step on ready views and of the loop's, in turn, after two of each that do not count."""
    count = max(4, size.images * 32**2 // side**2)
    images, settings = pictures(2 * count, round(1.15 * side), side), proxies.settings("rotation", batch_size=count)
    network = B.create(Model(model), side)
    with tempfile.TemporaryDirectory() as folder:
        accelerator = launch.start("fp32", None, folder)
        task = proxies.build(settings, network, images).to(device).train()
        task.to(memory_format=task.memory_format)
        model, optimizer = accelerator.prepare(task, loop.make_optimizer(task, settings))
        drawn, times = ahead(images, images.train, settings, Key(0, "proxy"), 0, 10**6, accelerator), []
        batch = next(drawn)
        made, ready = task.see, task.see(batch)
        for _ in range(size.rounds + 2):
            task.see = lambda batch: ready
            peer = seconds(device, lambda: loop.take_step(model, optimizer, [batch], settings, accelerator))
            task.see = made
            ours = seconds(device, lambda: loop.take_step(model, optimizer, [next(drawn)], settings, accelerator))
            times.append((peer, ours))
        drawn.close()
    return times[2:]


def _choices(model: str, side: int, size: Size, device: str) -> list:
    """Times of a bare step in the best of fp32 and bf16, contiguous and channels last, and in what a run chooses."""
    count = max(4, size.images * 32**2 // side**2)
    x, network = torch.rand(count, 3, side, side, device=device), B.create(Model(model), side).to(device).train()
    layout, served = suited(network, side)
    chosen = launch.resolve_precision("auto", served), layout
    ways = list(itertools.product(("fp32", "bf16"), (torch.contiguous_format, torch.channels_last)))
    times: dict[tuple, list] = {way: [] for way in {*ways, chosen}}

    def bare(precision: str, layout: torch.memory_format) -> None:
        half = torch.float16 if precision == "fp16" else torch.bfloat16
        with torch.autocast(device, half, enabled=precision != "fp32"):
            loss = network(x.contiguous(memory_format=layout)).float().square().mean()
        loss.backward()

    for _ in range(size.rounds + 1):
        for way in times:
            network.to(memory_format=way[1])
            times[way].append(seconds(device, partial(bare, *way)))
    best = min(times, key=lambda way: np.median([wall for _, wall in times[way][1:]]))
    return list(zip(times[best][1:], times[chosen][1:], strict=True))


def gathering(size: Size) -> Iterator[Row]:
    from torch.utils.data import DataLoader, TensorDataset

    side, batch = size.sides[-1], max(4, size.images // 4)
    images, settings = pictures(4 * batch, side, side), proxies.settings("rotation", batch_size=batch)
    with tempfile.TemporaryDirectory() as folder:
        accelerator = launch.start("fp32", None, folder)
        loader = DataLoader(TensorDataset(images.pixels.stacked), batch, shuffle=True)

        def ours() -> None:
            for _ in ahead(images, images.train, settings, Key(0, "proxy"), 0, 4, accelerator):
                pass

        yield side_by_side(f"batches over DataLoader, {side} px", lambda: list(loader), ours, size.rounds)


def random_views(size: Size) -> Iterator[Row]:
    """On one core, since that is what one of lightly's workers has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for side in size.sides:
            yield from _views(side, size)
    finally:
        torch.set_num_threads(threads)


def _views(side: int, size: Size) -> Iterator[Row]:
    """The views of SimCLR: crop, flip, jitter, grey, blur."""
    import kornia.augmentation as K
    from lightly.transforms import SimCLRTransform
    from torchvision.transforms import v2
    from torchvision.transforms.functional import to_pil_image

    kind, count = Views(blur=0.5), max(4, size.images * 32 // side)
    stored = side if side <= 64 else round(1.15 * side)
    pixels = pictures(count, stored, side).pixels.stacked
    pil, sizes = [to_pil_image(picture) for picture in pixels], torch.full((count, 2), stored)
    width, jitter = 2 * views.blur_radius(side) + 1, (0.4, 0.4, 0.4, 0.1)
    single = SimCLRTransform(input_size=side, min_scale=0.2, cj_strength=0.5, gaussian_blur=0.5).transforms[0]
    tensors = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomResizedCrop(side, (0.2, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(*jitter)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(width, (0.1, 2.0))], 0.5),
        ]
    )
    whole = K.AugmentationSequential(
        K.RandomResizedCrop((side, side), (0.2, 1.0)),
        K.RandomHorizontalFlip(),
        K.ColorJitter(*jitter, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((width, width), (0.1, 2.0), p=0.5),
    )

    def ours(on: torch.Tensor) -> torch.Tensor:
        return views.random_views(kind, on, sizes, views.Draws(0, count), side)

    peers = {"lightly": lambda: [single(x) for x in pil], "torchvision v2": lambda: [tensors(x) for x in pixels]}
    for peer, work in peers.items():
        yield side_by_side(f"views over {peer}, {side} px", work, partial(ours, pixels), size.rounds)
    for device in devices():
        here = pixels.to(device)
        work = partial(lambda x: whole(x.float() / 255), here)
        yield side_by_side(f"views over kornia, {side} px", work, partial(ours, here), size.rounds, device)


def clusters(size: Size) -> Iterator[Row]:
    for k in size.k:
        rows = features(size.rows * k)
        for device in devices():
            found = [_clusters(rows, k, seed, device) for seed in range(max(1, size.rounds // 3))]
            told = {"iterations": [own for *_, own, _ in found], "inertia_ratio": [ratio for *_, ratio in found]}
            yield row(f"k-means over faiss, k {k}", [one[:2] for one in found], device, **told)


def _clusters(rows: torch.Tensor, k: int, seed: int, device: str) -> tuple:
    """What faiss and ours, on a device, spend; the iterations of ours that reach its inertia, and by how much."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    peer = faiss.Kmeans(rows.shape[1], k, niter=25, spherical=True, seed=seed + 1, min_points_per_centroid=1)
    spent = seconds("cpu", lambda: peer.train(rows.numpy()))
    goal = float((1 - peer.index.search(rows.numpy(), 1)[0]).mean(dtype=np.float64))
    accelerator, here, found = launch.start("fp32", None, "."), rows.to(device), []
    for iterations in (4, 6, 8, 10, 12, 14, 16, 20, 25, 50):
        own = seconds(device, lambda n=iterations: found.extend(kmeans(here, k, seed, n, accelerator)))
        if found[-1].inertia <= goal:
            break
    return spent, own, iterations, found[-1].inertia / goal


def protocols(size: Size) -> Iterator[Row]:
    import faiss
    from sklearn.linear_model import LogisticRegression

    faiss.omp_set_num_threads(torch.get_num_threads())
    rows = features(size.bank + size.bank // 4)
    bank, asked = rows[: size.bank], rows[size.bank :]
    labels = (rows[:, :10] + 0.05 * torch.randn(len(rows), 10, generator=torch.Generator().manual_seed(1))).argmax(1)
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(bank.numpy())
    neighbours = min(200, size.bank)

    def near() -> None:
        knn.classify(bank, labels[: size.bank], asked, 10, [neighbours], 0.07)

    yield side_by_side("kNN over faiss", lambda: index.search(asked.numpy(), neighbours), near, size.rounds)
    scaled = ((bank - bank.mean(0)) / bank.std(0)).numpy()
    theirs = LogisticRegression(C=0.1, max_iter=1000)
    yield side_by_side(
        "linear probe over scikit-learn",
        lambda: theirs.fit(scaled, labels[: size.bank].numpy()),
        lambda: linear.fit(bank, labels[: size.bank], 10, 0.1),
        size.rounds,
    )


def growth(size: Size) -> Iterator[Row]:
    accelerator, k = launch.start("fp32", None, "."), size.k[0]
    rows = features(2 * size.rows * k)

    def fit(count: int, clusters: int) -> Callable[[], Any]:
        return lambda: kmeans(rows[:count], clusters, 0, 8, accelerator)

    once, twice = size.rows * k, 2 * size.rows * k
    for name, more in (("rows", fit(twice, k)), ("k", fit(once, 2 * k))):
        found = side_by_side(f"k-means, linear growth in {name}", fit(once, k), more, size.rounds)
        yield {**found, **{key: 2 * found[key] for key in ("ratio", "low", "high")}}


def write_pictures(folder: Path, count: int, side: int) -> None:
    for i, picture in enumerate(pictures(count, side, side).pixels.stacked):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")


def spent(*command: str) -> tuple[float, float]:
    """CPU seconds and seconds of a command."""
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.perf_counter() - wall


def commands(size: Size) -> Iterator[Row]:
    peer = shutil.which("lightly-train")
    if peer is None:
        print("train: not measured, since there is no lightly-train on the PATH", file=sys.stderr)
        return
    steps, side, batch = (8, 64, 64) if size != TINY else (2, 32, 8)
    with tempfile.TemporaryDirectory() as data, tempfile.TemporaryDirectory() as out:
        write_pictures(Path(data), steps * batch + 8, 2 * side)  # eight are held out, by ours

        def theirs(epochs: int) -> list[str]:
            own = "method=simclr model=torchvision/resnet18 accelerator=cpu precision=32-true overwrite=True"
            told = f"batch_size={batch} transform_args.image_size=[{side},{side}] epochs={epochs} num_workers=0"
            return [peer, "pretrain", f"data={data}", f"out={out}/peer", *own.split(), *told.split()]

        def ours(epochs: int) -> list[str]:
            own = "--proxy.name simclr --model.name resnet18 --precision fp32 --relearn.rounds 0 --evaluate.every 0"
            told = f"--proxy.batch_size {batch} --data.size {side} --proxy.epochs {epochs}"
            held = f"--data.val_fraction {8 / (steps * batch + 8)} --run {tempfile.mkdtemp(dir=out)}"
            return [sys.executable, "-m", "training", "--data.path", data, *f"{own} {told} {held}".split()]

        def epoch(command: Callable[[int], list[str]]) -> tuple[float, float]:
            three, one = spent(*command(3)), spent(*command(1))
            return (three[0] - one[0]) / 2, (three[1] - one[1]) / 2

        times = [(epoch(theirs), epoch(ours)) for _ in range(1 + size.rounds // 3)]
    yield row(f"an epoch of SimCLR over LightlyTrain's, {side} px", times)


def first_step(folder: Path, out: Path, count: int) -> float:
    """Seconds of a run on `count` images of 32 px until its first step is done; then it is killed."""
    write_pictures(folder, count, 32)
    told = f"--data.path {folder} --run {out} --data.size 32 --log.every 1"
    arguments = f"--model.name resnet18 --clusters.k [10] --relearn.batch_size 8 --proxy.batch_size 8 {told}"
    began, log = time.perf_counter(), out / "metrics.jsonl"
    command, quiet = [sys.executable, "-m", "training", *arguments.split()], subprocess.DEVNULL
    with subprocess.Popen(command, cwd=ROOT, stdout=quiet, stderr=quiet) as run:
        while run.poll() is None and not (log.exists() and log.stat().st_size):
            time.sleep(0.01)
        wall = time.perf_counter() - began
        run.kill()
    return wall


def start(size: Size) -> Iterator[Row]:
    imports = sys.executable, "-c", "import torch, timm, accelerate, datasets"
    told = sys.executable, "-m", "training", "--help"
    yield row("imports over --help", [(spent(*imports), spent(*told)) for _ in range(size.rounds)])
    times = []
    for _ in range(1 + size.rounds // 3):
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as out:
            goal, own = spent(*imports)[1] + 5, first_step(Path(folder), Path(out), size.bank // 2)
            times.append(((goal, goal), (own, own)))  # what somebody waits for
    yield row("imports and 5 s over the first step", times)
