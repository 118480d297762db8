"""Recipes: what a run does, as nested dataclasses, read from YAML and the command line by jsonargparse.

The defaults are for photographs at 224 px. Limits stand in the types where a type can hold them, in `command.check`
where two fields meet; what needs the images or the network is checked in `setup.py`, still before anything is trained.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import set_parsing_settings

from .limits import (
    BelowOne,
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    Several,
    Stage,
)
from .markers import since_ever

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Tracker = Literal["tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "aim", "clearml", "dvclive", "swanlab"]


@dataclass
class Model:
    """The network, as timm.create_model takes it"""

    name: str = "resnet50"
    """An architecture of timm, or weights: arch.tag, local-dir:FOLDER, hf-hub:ORG/NAME (with pretrained)."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for timm.create_model, e.g. {output_stride: 8}."""
    pretrained: bool = False
    """Start from the weights that the name stands for instead of random ones."""


@dataclass
class Data:
    """The images"""

    path: list[str] | str | None = None
    """Folder of images, or a list of such; folder of parquet files; file (parquet, arrow, webdataset); name of a data
    set of the Hub; or "digits"."""
    name: str | None = None
    """Configuration of a Hub data set that has several."""
    split: str | None = None
    """Split to train on; without one "train"."""
    test_split: str | None = None
    """Split to test on; without one "test", or "validation" where that is not held out; "none" for none."""
    splits: Literal["auto", "none"] = "auto"
    """Whether top-level folders called train, test, validation or alike are splits; none: all of it is one split."""
    labels: str | None = None
    """Table of file and label for folders of images: CSV, TSV, JSONL or parquet."""
    image_column: str | None = None
    """Column of images; without one the only column of images."""
    label_column: str | None = None
    """Column of labels; without one "label", "labels", "fine_label", "class" or "cls" if it is there."""
    size: PositiveInt = 224
    """Working size, px: side of the square that the network sees."""
    limit: PositiveInt | None = None
    """Use that many images of the split, drawn by split_seed; without it all."""
    val_fraction: OpenUnitInterval | None = None
    """Share of the split held out from all training, on which settings may be chosen; without it a tenth, unless a
    validation split beside a test split is what is held out."""
    split_seed: NonNegativeInt = 0
    """Draws limit and the held-out part; never the run's seed, so that all runs hold out the same."""
    max_bad_fraction: ClosedUnitInterval = 0.01
    """Share of images that may fail to decode before the run stops."""
    white: PositiveFloat | None = None
    """Value of grey images of more than 8 bits that is white; without it the first of 255, 1023, 4095, 16383 and 65535
    that a sample of them does not exceed (1 for floats below 2)."""
    memory_gb: NonNegativeFloat | None = None
    """Decoded images and the features that are clustered stay in memory up to this size, GB, in files beside the run
    beyond it; without it half of what is free."""

    @property
    def held_out(self) -> float:
        """Share of the split that is held out where no other split is."""
        return 0.1 if self.val_fraction is None else self.val_fraction

    @property
    def paths(self) -> list[str]:
        """Where the data are, each place by itself."""
        return [self.path] if isinstance(self.path, str) else self.path or []

    @property
    def called(self) -> str:
        """What to call the data: the last part of where they are."""
        places = (Path(path) for path in self.paths)
        return "+".join((place.resolve() if place.name in ("", "..") else place).name for place in places)


@dataclass
class Views:
    """Random views of an image"""

    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.2, 1.0)
    """Area of the crop as a share of the image, lower and upper limit, at most 1."""
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 4 / 3)
    """Width over height of the crop, lower and upper limit."""
    flip: ClosedUnitInterval = 0.5
    """Probability of a horizontal flip."""
    jitter: ClosedUnitInterval = 0.8
    """Probability of colour jitter."""
    brightness: ClosedUnitInterval = 0.4
    """Strength: factors from 1 - x to 1 + x."""
    contrast: ClosedUnitInterval = 0.4
    """Strength: factors from 1 - x to 1 + x."""
    saturation: ClosedUnitInterval = 0.4
    """Strength: factors from 1 - x to 1 + x."""
    hue: ClosedUnitInterval = 0.1
    """Strength: shifts from -x to x of the colour circle, at most 0.5."""
    grey: ClosedUnitInterval = 0.2
    """Probability of grey."""
    blur: ClosedUnitInterval = 0.0
    """Probability of a Gaussian blur, its kernel a tenth of the image."""
    blur_sigma: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)
    """Standard deviation of the blur, px, lower and upper limit."""
    solarize: ClosedUnitInterval = 0.0
    """Probability of solarisation at 0.5."""
    turn: ClosedUnitInterval = 0.0
    """Probability of a quarter turn, to any of the three other sides."""


def weak_views() -> Views:
    """Crop and flip, as the proxy tasks were published with."""
    return Views(crop_scale=(0.4, 1.0), jitter=0.0, grey=0.0)


@dataclass
class Schedule:
    """How the parameters of a phase are trained"""

    epochs: NonNegativeFloat = 100.0
    """Passes over the training images; parts of one are allowed."""
    batch_size: PositiveInt = 256
    """Images of a step, over all processes and accumulated micro-batches."""
    accumulate: PositiveInt = 1
    """Micro-batches that a process splits its share of a step into."""
    optimizer: str = "sgd"
    """Optimiser, a name of timm.optim.list_optimizers() (sgd has Nesterov momentum)."""
    lr: PositiveFloat = 0.1
    """Highest learning rate, reached after warm-up; a cosine leads to 0."""
    warmup: NonNegativeFloat = 1.0
    """Linear warm-up, epochs; never more than a tenth of the phase."""
    momentum: BelowOne = 0.9
    """Momentum of the optimisers that take one, as sgd; Adam and its like keep their betas."""
    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay of weights; biases and norms have none."""
    clip_grad: NonNegativeFloat = 0.0
    """Largest norm of the gradient; 0 clips nothing."""
    mlp_layers: NonNegativeInt = 0
    """Layers of a disposable MLP between the backbone and the head."""
    mlp_dim: PositiveInt = 2048
    """Width of the disposable MLP."""
    ema: BelowOne = 0.0
    """Decay per step of averaged weights that become the result; 0 averages nothing."""
    norm: Literal["batch", "stored"] = "batch"
    """What the batch norms of weights that were there before normalise by: each batch's statistics, which become
    theirs, or the stored ones that they came with, which few images of one kind make worse."""
    views: Views = field(default_factory=Views)


@dataclass
class Proxy(Schedule):
    """Phase 1: the proxy task"""

    name: str = "rotation"
    """Task, a file of training/proxies, with options and defaults of its own."""
    options: Any = None
    """Options of the task, its own dataclass; None: as published."""
    views: Views = field(default_factory=weak_views)


@dataclass
class Clusters:
    """Phase 2: features to pseudo-labels"""

    source: Literal["backbone", "random", "labels"] = "backbone"
    """What is clustered: the backbone's features; an untrained network's; or nothing, the true labels are taken."""
    stage: Stage | Literal["auto"] = -2
    """Stage whose features are clustered, an index into timm's feature_info; auto: the one that does best by a score
    that needs no labels, the retrieval of an image by another view of it."""
    average: Literal["auto", "nuisance", "familiar", "none"] = "auto"
    """Views that features are averaged over: the proxy's nuisance views; flips and crops, which relearning makes
    familiar; auto: nuisance where the proxy was trained in this run and nothing is relearned yet, else familiar."""
    whiten: NonNegativeInt = 256
    """Dimensions kept by PCA whitening, at most the features'; 0 leaves them as they are."""
    whiten_power: ClosedUnitInterval = 0.5
    """Power of its standard deviation that each dimension is divided by: 1 makes all equal, 0 leaves the spectrum."""
    k: list[PositiveInt] = field(default_factory=lambda: [1000, 3000, 10000])
    """Numbers of clusters, a clustering each."""
    restarts: Several = 2
    """Runs of k-means, the best of which counts; at least 2, which also tells how much the seed matters."""
    iterations: PositiveInt = 50
    """Most iterations of a run of k-means."""


@dataclass
class Relearn(Schedule):
    """Phase 3: the high part from the pseudo-labels"""

    rounds: NonNegativeInt = 1
    """Passes of phases 2 and 3; 0 ends with the proxy's backbone."""
    split: Stage | Literal["auto"] = -3
    """Last stage of the low part, an index into timm's feature_info; auto: the one that does best by that score, but
    the last."""
    reinit: Literal["high", "all", "none"] = "none"
    """Which part starts from new random weights: high, as we read the paper, gained little, and not in each network."""
    keep: BelowOne = 0.0
    """Share of the old weights that stays in what starts anew; more is gentler to good weights."""
    drop: BelowOne = 0.0
    """Share of each cluster, the images farthest from its centroid, that is not learned from."""
    settle: ClosedUnitInterval = 0.1
    """Share of the phase during which the low part is frozen."""
    low_lr: NonNegativeFloat = 1.0
    """Learning rate of the low part after that, as a share of lr; 0 keeps it frozen."""
    low_norm: Literal["eval", "train"] = "eval"
    """Normalisation of a frozen low part: by its stored statistics, or by each batch's."""
    mlp_layers: NonNegativeInt = 2
    """Layers of a disposable MLP between the backbone and the head."""
    label_smoothing: BelowOne = 0.0
    """Share of the target spread over all clusters."""
    export: Literal["better", "always"] = "better"
    """What hub/ holds: the better, on held-out images, of the relearned backbone and the one that relearning started
    from; or the relearned one in any case."""


@dataclass
class Evaluate:
    """What is measured, on frozen features"""

    test: bool = True
    """Also measure on the test split; false while settings are being chosen."""
    batch_size: PositiveInt = 512
    """Images of a forward pass, over all processes; a CPU takes as many as its caches hold, and no more than these."""
    images: PositiveInt = 50_000
    """Most training images that a probe is fitted on, and most held-out ones that it is measured on."""
    linear_c: list[PositiveFloat] = field(default_factory=lambda: [0.001, 0.01, 0.1, 1.0])
    """Inverse regularisation of the linear probe, chosen on the held-out part."""
    knn_k: list[PositiveInt] = field(default_factory=lambda: [20, 200])
    """Neighbours that vote."""
    knn_temperature: PositiveFloat = 0.07
    """Temperature of their weights."""
    residue_images: PositiveInt = 2_000
    """Most images, each in all of the proxy's nuisance views, on which the residue is measured."""
    shots: list[PositiveInt] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    """Images of each class that the probe is fitted on, five draws each; none for an empty list."""
    transfer: list[str] = field(default_factory=list)
    """Other data sets with labels, as data.path names them, on which linear and knn are measured, too."""
    every: NonNegativeInt = 10
    """Epochs between two looks at the live features while phases 1 and 3 train; 0 for none."""


@dataclass
class Log:
    """What is said on the way"""

    every: PositiveInt = 20
    """Steps between two lines of metrics.jsonl; the host waits for the device only then."""
    tracker: Tracker | None = None
    """Also log there; its package is yours to install."""


@dataclass
class Card:
    """What the model card says that cannot be measured"""

    license: str | None = None
    """Licence of the weights, as the Hub names it, e.g. apache-2.0; "other" where the images are for research only."""
    dataset: str | None = None
    """The images, as the Hub names them, e.g. uoft-cs/cifar10."""
    about: str | None = None
    """Its first words, Markdown; without any those of README.md beside the recipe."""


@dataclass
class Running:
    """What every training has beside what is trained"""

    run: str | None = None
    """Run folder: a path, or a name under runs/; without one it is named after what is run."""
    seed: NonNegativeInt = 0
    """Seed of everything but the data's splits."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of training; auto: bf16 where the device does it well, else fp16 on CUDA, else fp32."""
    checkpoint_every: PositiveInt = 500
    """Steps between two checkpoints."""
    log: Log = field(default_factory=Log)


@dataclass
class Recipe(Running):
    """One run: phases 1 to 3, evaluation and export."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    proxy: Proxy = field(default_factory=Proxy)
    clusters: Clusters = field(default_factory=Clusters)
    relearn: Relearn = field(default_factory=Relearn)
    evaluate: Evaluate = field(default_factory=Evaluate)
    card: Card = field(default_factory=Card)

    @property
    def by_proxy(self) -> bool:
        """Whether the proxy task made the first backbone, and not weights from elsewhere, made by none that we know."""
        return self.proxy.epochs > 0 or not self.model.pretrained


# What each phase reads of a recipe: a field that is not here can change without the phase being done again.
COMMON = ("model", "seed", "precision", "data.size", "data.val_fraction", "data.split_seed")
READS = {
    "proxy": (*COMMON, "proxy"),
    "clusters": (*COMMON, "clusters", "proxy.name", "proxy.options"),
    "relearn": (*COMMON, "relearn"),
    "evaluate": (*COMMON, "evaluate", "proxy.name", "proxy.options", "relearn.views"),
}
IGNORED = ("relearn.rounds", "relearn.export", "evaluate.every", "evaluate.transfer")


def flatten(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as plain values by dotted name, the same before and after a journey through JSON."""

    def walk(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and not name.endswith((".args", ".options")):
            for key, item in value.items():
                yield from walk(item, f"{name}.{key}" if name else key)
        else:
            yield name, _plain(value)

    return dict(walk(dataclasses.asdict(settings), ""))


def phase_fields(recipe: Recipe, phase: str) -> dict[str, Any]:
    """The fields, by dotted name, that a phase reads."""

    def read(name: str) -> bool:
        return name not in IGNORED and any(name == part or name.startswith(f"{part}.") for part in READS[phase])

    return since_ever({name: value for name, value in flatten(recipe).items() if read(name)})


def to_yaml(recipe: Running, without: Collection[str] = ()) -> str:
    """The recipe as YAML that its command reads back as the same recipe, `without` the fields that it does not take."""
    values = _plain(dataclasses.asdict(recipe))
    for name in without:
        *groups, field = name.split(".")
        del functools.reduce(dict.__getitem__, groups, values)[field]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    return next((kind(value) for kind in (int, float, str) if isinstance(value, kind)), value)
