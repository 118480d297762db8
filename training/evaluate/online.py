"""Is it learning? What the live features tell while a phase trains; nothing of the training depends on it."""

import torch.nn.functional as F
from torch import Tensor, nn

from .. import recipe
from ..extraction import extract
from ..images import Images
from ..loop import Context, steps_of
from . import knn, label_free, linear, rankme

FITTED, MEASURED = 2000, 1000  # most training images that probes are fitted on, most held-out ones they are measured on
COLLAPSED = {"spread": 0.05, "rank": 1.5}  # below, features are (nearly) the same for all images
ADVICE = "a lower learning rate, larger batches or weaker views usually help; so does an MLP before the head"


class Online:
    """Looks at a phase's network every few epochs: called with (network, steps done), tells what the log is to have.

    Args:
        settings: of evaluation.
        schedule: of the phase.
        images: the training split.
        count: images that an epoch draws from.
        views: strong views, which scores without labels are of.
        context: the run.
    """

    def __init__(
        self,
        settings: recipe.Evaluate,
        schedule: recipe.Schedule,
        images: Images,
        count: int,
        views: recipe.Views,
        context: Context,
    ) -> None:
        self.settings, self.images, self.views, self.context = settings, images, views, context
        self.interval = settings.every * steps_of(schedule, count)[0]
        self.fitted, self.measured = images.sample(images.train, FITTED), images.sample(images.val, MEASURED)

    def __call__(self, network: nn.Module, step: int) -> dict[str, float]:
        """Accuracies on the held-out part where there are labels, else label-free scores; nothing between two looks."""
        if not self.interval or step % self.interval:
            return {}
        held = self._features(network, self.measured)
        unit = F.normalize(held, dim=1)
        told = {"spread": label_free.spread(unit), "rank": rankme.rankme(held)}
        if self.images.labels is not None:
            told |= self._probes(network, held)
        else:
            one, other = (F.normalize(self._features(network, self.measured, seed), dim=1) for seed in (1, 2))
            told["retrieval"] = label_free.retrieval(one, other)
        epoch = step * self.settings.every // self.interval
        self.context.say(f"after {epoch} epochs: " + ", ".join(f"{name} {value:.3f}" for name, value in told.items()))
        if any(told[name] < least for name, least in COLLAPSED.items()):
            self.context.say(f"warning: the features are nearly the same for all images (collapse); {ADVICE}.")
        return told

    def _features(self, network: nn.Module, indices: Tensor, seed: int | None = None) -> Tensor:
        views = None if seed is None else (self.views, seed)
        accelerator, batch = self.context.accelerator, self.settings.batch_size
        return extract(network, self.images, indices, accelerator, batch, random=views)["pooled"]

    def _probes(self, network: nn.Module, held: Tensor) -> dict[str, float]:
        labels, classes = self.images.labels, len(self.images.label_names)
        rows = self._features(network, self.fitted)
        known = [labels[indices] >= 0 for indices in (self.fitted, self.measured)]
        rows, held = rows[known[0]], held[known[1]]
        targets = [labels[i][k] for i, k in zip((self.fitted, self.measured), known, strict=True)]
        if not len(rows) or not len(held):
            return {}
        k = min(self.settings.knn_k[0], len(rows))
        guess = knn.classify(rows, targets[0], held, classes, [k], self.settings.knn_temperature)[k]
        grid = sorted(self.settings.linear_c)
        probe = linear.fit(rows, targets[0], classes, grid[len(grid) // 2])
        return {"knn": (guess == targets[1]).double().mean().item(), "linear": probe.top1(held, targets[1])}
