"""python -m training.benchmark [PART ...]: ours and a peer, one after the other, and what of the goals is reached.

A ratio is the peer's CPU seconds over ours (on a GPU, seconds), the median over rounds with its quartiles; goals are in
hub_configs/goals.yaml. The peers are in the extra `benchmark`.

step      the loop, with its views, over a bare step on ready ones; a run's precision and memory format over the best.
input     batches gathered from pixels over torch's DataLoader.
views     over lightly's, torchvision's and kornia's.
kmeans    over faiss: equal rows, and as many iterations as reach faiss's inertia.
evaluate  nearest neighbours over faiss, the linear probe over scikit-learn.
growth    twice the rows or clusters over once.
start     what --help imports over --help; imports and five seconds over a run's first step, on 10,000 images.
"""

import itertools
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from PIL import Image
from torch.nn.functional import normalize

from . import backbone as B
from . import launch, loop, proxies, records, report, views
from .batches import ahead
from .command import Parser, guarded
from .evaluate import knn, linear
from .files import Failed, Refused
from .images import Images
from .kmeans import kmeans
from .launch import Key
from .operations import suited
from .pixels import Pixels
from .recipe import Model, Views

GOALS = Path(__file__).parent.parent / "hub_configs" / "goals.yaml"
GPU = "python -m training.benchmark step views kmeans"  # what has rows for a GPU


@dataclass
class Size:
    """How much is measured.

    Attributes:
        rounds: of ours and the peer.
        images: of a batch of views at 32 px; fewer where they are larger.
        rows: rows a centroid.
        k: numbers of clusters.
        bank: rows that neighbours are looked for among.
        sides: px.
    """

    rounds: int = 7
    images: int = 256
    rows: int = 32
    k: tuple[int, ...] = (1000, 10000)
    bank: int = 20000
    sides: tuple[int, ...] = (32, 64, 224)


NETWORKS = [
    ("mobilenetv3_small_100", 96),
    ("tf_efficientnet_lite0", 96),
    ("convnext_atto", 96),
    ("resnet18", 96),
    ("vit_tiny_patch16_224", 224),
]
TINY = Size(rounds=2, images=4, rows=8, k=(20,), bank=300, sides=(32,))
Row = dict[str, Any]


def seconds(device: str, work: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds and seconds of some work."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() - cpu, time.perf_counter() - wall


def side_by_side(name: str, peer: Callable, ours: Callable, rounds: int, device: str = "cpu", **told: Any) -> Row:
    """A row: peer and ours in turn, after one of each that does not count."""
    times = [(seconds(device, peer), seconds(device, ours)) for _ in range(rounds + 1)][1:]
    return row(name, times, device, **told)


def row(name: str, times: list, device: str = "cpu", **told: Any) -> Row:
    """A row from ((CPU seconds, seconds) of the peer, of ours) of each round."""
    table = np.array(times)  # [rounds, peer or ours, CPU or wall]
    counted = table[:, :, 0 if device == "cpu" else 1]
    low, middle, high = np.quantile(counted[:, 0] / counted[:, 1], [0.25, 0.5, 0.75]).tolist()
    means = {"cpu": table[:, 1, 0], "wall": table[:, 1, 1], "peer_cpu": table[:, 0, 0], "peer_wall": table[:, 0, 1]}
    spent = {key: float(np.median(value)) for key, value in means.items()}
    name = name if device == "cpu" else f"{name}, GPU"
    return {"name": name, "ratio": middle, "low": low, "high": high, "rounds": len(times), **spent, **told}


def pictures(count: int, side: int, size: int) -> Images:
    """Made-up images, smooth with some noise, as photographs are."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, side // 8 + 1, side // 8 + 1, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear") * 200
    pixels = (smooth + 55 * torch.rand(count, 3, side, side, generator=generator)).to(torch.uint8)
    half = torch.arange(count) < 0
    statistics = (0.5,) * 3, (0.25,) * 3
    return Images(
        Pixels.of(pixels), None, None, [str(i) for i in range(count)], half, "0" * 64, *statistics, size / side, size
    )


def features(count: int, width: int = 128) -> torch.Tensor:
    """Made-up unit rows: many groups of unequal size, variances that fall as those of networks' features do."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, width + 1) ** -0.25
    centres = torch.randn(max(10, count // 100), width, generator=generator)
    drawn = (torch.rand(count, generator=generator) ** 2 * len(centres)).long()
    return normalize((centres[drawn] + 1.2 * torch.randn(count, width, generator=generator)) * spectrum, dim=1)


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


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
    for side in size.sides:
        yield from _views(side, size)


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


def first_step(folder: Path, out: Path, count: int) -> float:
    """Seconds of a run on `count` images of 32 px until its first step is done; then it is killed."""
    for i, picture in enumerate(pictures(count, 32, 32).pixels.stacked):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    told = f"--data.path {folder} --run {out} --data.size 32 --log.every 1"
    arguments = f"--model.name resnet18 --clusters.k [10] --relearn.batch_size 8 --proxy.batch_size 8 {told}"
    began, log = time.perf_counter(), out / "metrics.jsonl"
    command, quiet = [sys.executable, "-m", "training", *arguments.split()], subprocess.DEVNULL
    with subprocess.Popen(command, cwd=GOALS.parent.parent, stdout=quiet, stderr=quiet) as run:
        while run.poll() is None and not (log.exists() and log.stat().st_size):
            time.sleep(0.01)
        wall = time.perf_counter() - began
        run.kill()
    return wall


def start(size: Size) -> Iterator[Row]:
    def spent(*command: str) -> tuple[float, float]:
        before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=GOALS.parent.parent)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.perf_counter() - wall

    imports = "-c", "import torch, timm, accelerate, datasets"
    yield row("imports over --help", [(spent(*imports), spent("-m", "training", "--help")) for _ in range(size.rounds)])
    times = []
    for _ in range(1 + size.rounds // 3):
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as out:
            goal, own = spent(*imports)[1] + 5, first_step(Path(folder), Path(out), size.bank // 2)
            times.append(((goal, goal), (own, own)))  # what somebody waits for
    yield row("imports and 5 s over the first step", times)


PARTS: dict[str, Callable[[Size], Iterator[Row]]] = {
    "step": step,
    "input": gathering,
    "views": random_views,
    "kmeans": clusters,
    "evaluate": protocols,
    "growth": growth,
    "start": start,
}


def command() -> Parser:
    made = Parser(
        prog="python -m training.benchmark",
        description="Ours and a peer, one after the other, and what of the goals is reached.",
        usage="%(prog)s [PART ...] [--OPTION VALUE ...]",
        allow_abbrev=False,
    )
    made.add_argument("parts", nargs="*", help=f"What is measured, of {', '.join(PARTS)}; all without any.")
    made.add_argument("--size", type=Literal["whole", "tiny"], default="whole", help="Tiny only shows that it runs.")
    made.add_argument("--goals", help="YAML file of the least ratio by a row's name; by default the package's.")
    made.add_argument("--out", help="File of records to add the rows to.")
    return made


def main(arguments: Sequence[str]) -> None:
    given = command().read(arguments)
    if wrong := [part for part in given.parts if part not in PARTS]:
        raise Refused(f"there is no part {wrong[0]!r}; there are {', '.join(PARTS)}.")
    if given.out:
        records.check_out(Path(given.out))
    try:
        goals = yaml.safe_load(Path(given.goals or GOALS).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        goals = error
    if not isinstance(goals, dict):
        raise Refused(f"--goals: {given.goals} is no YAML file of ratios by name.")
    size = TINY if given.size == "tiny" else Size()
    device, found = records.device_name("cuda" if torch.cuda.is_available() else "cpu"), []
    for part in given.parts or PARTS:
        try:
            for made in PARTS[part](size):
                found.append({**made, "goal": goals.get(made["name"])})
                print(f"{made['name']}: {made['ratio']:.2f}", file=sys.stderr)
        except ModuleNotFoundError as error:
            raise Refused(f"{part} is measured against {error.name}: pip install -e '.[benchmark]'") from error
    head = ["", "ratio", "quartiles", "goal", "CPU s", "peer's", "s", "peer's"]
    spent = ("cpu", "peer_cpu", "wall", "peer_wall")
    lines = [
        [r["name"], f"{r['ratio']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}", str(r["goal"] or "")]
        + [f"{r[name]:.3g}" for name in spent]
        for r in found
    ]
    if not torch.cuda.is_available():
        lines.append(["on a GPU", "not measured", GPU, *[""] * 5])
    print(f"{device}; threads {torch.get_num_threads()}\n\n" + report.as_text([head, *lines]))
    if given.out:
        shared = {"arm": "benchmark", "protocol": "benchmark", "device": device, "versions": records.versions()}
        told = [{**shared, "metric": r["name"], "value": r["ratio"], "settings": r} for r in found]
        records.write(Path(given.out), told)
    if short := [r for r in found if r["goal"] and r["ratio"] < r["goal"]]:
        raise Failed("; ".join(f"{r['name']}: {r['ratio']:.2f}, the goal is {r['goal']}" for r in short))


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
