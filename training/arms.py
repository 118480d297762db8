"""Arms: the ways to train that a comparison sets side by side, each a recipe with a few fields changed.

All see equally many images: views passed forward and backward count one, the forward passes of phase 2 a third, and an
arm that clusters less gets the difference as extra steps.
"""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from . import proxies
from .clusters import views_of
from .recipe import Proxy, Recipe, Schedule


@dataclass(frozen=True)
class Counts:
    """What budgets are counted from.

    Attributes:
        training: images that may be drawn.
        usable: images whose features are clustered, those held out included.
        seen: views of an image that a step of a proxy task counts.
        other: another task, for the arm of that name.
    """

    training: int
    usable: int
    seen: Callable[[Proxy], float]
    other: str | None = None


def images_of(schedule: Schedule, counts: Counts) -> float:
    """Views of images that a schedule passes forward and backward."""
    epoch = counts.training // schedule.batch_size
    views = counts.seen(schedule) if isinstance(schedule, Proxy) else 1.0
    return round(schedule.epochs * epoch) * schedule.batch_size * views


def clustering_images(recipe: Recipe, counts: Counts, number: int) -> float:
    """What the forward passes of a round's phase 2 count."""
    if recipe.clusters.source == "labels":
        return 0.0
    return counts.usable * len(views_of(recipe, number)) / 3


def budget(recipe: Recipe, counts: Counts) -> float:
    """Images that a recipe sees in all."""
    rounds = range(1, recipe.relearn.rounds + 1)
    relearned = sum(images_of(recipe.relearn, counts) + clustering_images(recipe, counts, number) for number in rounds)
    return images_of(recipe.proxy, counts) + relearned


def lengthen(schedule: Schedule, images: float, counts: Counts) -> None:
    """Set the epochs so that a schedule passes that many views of images, to within half a batch."""
    views = counts.seen(schedule) if isinstance(schedule, Proxy) else 1.0
    schedule.epochs = round(images / views / schedule.batch_size) / (counts.training // schedule.batch_size)


Change = Callable[[Recipe, Counts], None]
ARMS: dict[str, Change] = {}  # in the order in which they are run and shown
COLOURS: dict[str, str] = {}


def arm(colour: str) -> Callable[[Change], Change]:
    """Enter an arm under its function's name, with its colour in figures."""

    def enter(change: Change) -> Change:
        ARMS[change.__name__], COLOURS[change.__name__] = change, colour
        return change

    return enter


def title(arm: str) -> str:
    """What an arm is, in a line."""
    return ARMS[arm].__doc__.splitlines()[0].rstrip(".")


@arm("#8c8c8c")
def random(recipe: Recipe, counts: Counts) -> None:
    """The untrained network, its batch norms' statistics estimated."""
    recipe.model.pretrained, recipe.proxy.epochs, recipe.relearn.rounds = False, 0.0, 0


@arm("#8fb8de")
def proxy_short(recipe: Recipe, counts: Counts) -> None:
    """Phase 1 as SSL++ uses it."""
    recipe.relearn.rounds = 0


@arm("#3b75af")
def proxy(recipe: Recipe, counts: Counts) -> None:
    """The proxy task given the whole budget."""
    lengthen(recipe.proxy, budget(recipe, counts), counts)
    recipe.relearn.rounds = 0


@arm("#1f4e79")
def other_proxy(recipe: Recipe, counts: Counts) -> None:
    """Another proxy task from the same start, given the whole budget."""
    whole, same = budget(recipe, counts), {"batch_size": recipe.proxy.batch_size, "norm": recipe.proxy.norm}
    recipe.proxy = proxies.settings(counts.other, **same)
    lengthen(recipe.proxy, whole, counts)
    recipe.relearn.rounds = 0


@arm("#845b53")
def clusterfit(recipe: Recipe, counts: Counts) -> None:
    """Yan et al. 2020: last stage, no whitening, no averaging, one k, a linear head, every layer from random."""
    whole = budget(recipe, counts)
    clusters, relearn = recipe.clusters, recipe.relearn
    clusters.stage, clusters.whiten, clusters.average = -1, 0, "none"
    clusters.k = [sorted(clusters.k)[len(clusters.k) // 2]]
    relearn.rounds, relearn.reinit, relearn.norm, relearn.keep = 1, "all", "batch", 0.0
    relearn.settle, relearn.low_lr = 0.0, 1.0
    relearn.mlp_layers, relearn.ema, relearn.label_smoothing, relearn.drop = 0, 0.0, 0.0, 0.0
    lengthen(relearn, whole - images_of(recipe.proxy, counts) - clustering_images(recipe, counts, 1), counts)


@arm("#c03d3e")
def scratch(recipe: Recipe, counts: Counts) -> None:
    """sslpp's labels, head and views; every layer from random."""
    relearn = recipe.relearn
    relearn.reinit, relearn.norm, relearn.keep, relearn.settle, relearn.low_lr = "all", "batch", 0.0, 0.0, 1.0


@arm("#3a923a")
def finetune_all(recipe: Recipe, counts: Counts) -> None:
    """sslpp's labels, head and views; nothing re-initialised, one learning rate, the head alone while sslpp settles."""
    relearn = recipe.relearn
    relearn.reinit, relearn.keep, relearn.split, relearn.low_lr = "none", 0.0, -1, 1.0


@arm("#2ab7ca")
def keep_high(recipe: Recipe, counts: Counts) -> None:
    """Exactly sslpp, but the high part continues from the proxy: tests re-initialising alone."""
    recipe.relearn.reinit, recipe.relearn.keep = "none", 0.0


@arm("#b8a1cf")
def random_features(recipe: Recipe, counts: Counts) -> None:
    """Exactly sslpp, but the labels come from the untrained network: what strong views and stable labels give."""
    recipe.clusters.source = "random"


@arm("#e1812c")
def sslpp(recipe: Recipe, counts: Counts) -> None:
    """The method: high layers relearned, from clusters of the proxy's features."""


@arm("#333333")
def supervised(recipe: Recipe, counts: Counts) -> None:
    """True labels, strong views, the whole budget, every layer from random: the ceiling."""
    whole = budget(recipe, counts)
    recipe.clusters.source, recipe.proxy.epochs = "labels", 0.0
    relearn = recipe.relearn
    relearn.rounds, relearn.reinit, relearn.norm, relearn.keep, relearn.drop = 1, "all", "batch", 0.0, 0.0
    relearn.settle, relearn.low_lr = 0.0, 1.0
    lengthen(relearn, whole, counts)


def repeats(arm: str, recipe: Recipe, counts: Counts) -> bool:
    """Whether an arm changes nothing of a recipe, as `keep_high` of one that re-initialises nothing."""
    return arm != "sslpp" and build(arm, recipe, counts) == recipe


UNTUNED = ("random", "proxy_short")  # nothing of theirs has a learning rate of its own


def strong(recipe: Recipe) -> None:
    """Give the proxy the views of phase 3, but for what it asks about."""
    own = {name: getattr(recipe.proxy.views, name) for name in proxies.find(recipe.proxy.name).asked}
    recipe.proxy.views = dataclasses.replace(recipe.relearn.views, **own)


def head(recipe: Recipe) -> None:
    """Give the proxy the disposable MLP and the averaging of phase 3."""
    recipe.proxy.mlp_layers, recipe.proxy.mlp_dim = recipe.relearn.mlp_layers, recipe.relearn.mlp_dim
    recipe.proxy.ema = recipe.relearn.ema


def both(recipe: Recipe) -> None:
    """`strong` and `head`."""
    strong(recipe)
    head(recipe)


# What else the whole-budget proxy is tried with; the best on the held-out part counts.
PROXY_VARIANTS: dict[str, Callable[[Recipe], None]] = {"strong views": strong, "mlp": head, "strong views, mlp": both}


def variants(proxy: Proxy) -> list[str]:
    """Those that a task can be tried with: not the MLP, where it reads no pooled features."""
    return [name for name, change in PROXY_VARIANTS.items() if change is strong or proxies.find(proxy.name).pooled]


def build(arm: str, recipe: Recipe, counts: Counts, lr: float = 1.0, variant: str | None = None) -> Recipe:
    """The recipe of an arm.

    Args:
        arm: a name of ARMS.
        recipe: of the method.
        counts: what budgets are counted from.
        lr: factor of the learning rate of the arm's own phase.
        variant: of the proxy arm.
    """
    made = copy.deepcopy(recipe)
    ARMS[arm](made, counts)
    if arm in ("proxy", "other_proxy"):
        made.proxy.lr *= lr
        if variant:
            PROXY_VARIANTS[variant](made)
    elif arm not in UNTUNED:
        made.relearn.lr *= lr
    return made
