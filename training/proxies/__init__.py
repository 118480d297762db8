"""Proxy tasks: labels made from the images themselves. `proxy.py` says what one is."""

import dataclasses
from typing import Any

from torch import nn

from .. import recipe
from ..files import Refused
from ..images import Images
from ..views import View
from .barlow_twins import BarlowTwins
from .byol import BYOL
from .distill import Distill
from .jigsaw import Jigsaw
from .moco import MoCo
from .npid import NPID
from .proxy import Proxy
from .relative_location import RelativeLocation
from .rotation import Rotation
from .simclr import SimCLR
from .simmim import SimMIM

PROXIES: dict[str, type[Proxy]] = {
    "rotation": Rotation,
    "jigsaw": Jigsaw,
    "relative_location": RelativeLocation,
    "npid": NPID,
    "simclr": SimCLR,
    "moco": MoCo,
    "byol": BYOL,
    "barlow_twins": BarlowTwins,
    "simmim": SimMIM,
    "distill": Distill,
}


def find(name: str, field: str = "proxy.name") -> type[Proxy]:
    """The class of a task that `field` names.

    Raises:
        Refused: there is no such task.
    """
    if name not in PROXIES:
        raise Refused(f"{field}: there is no task {name!r}; there are {', '.join(PROXIES)}.")
    return PROXIES[name]


def defaults(task: type[Proxy]) -> dict[str, Any]:
    """A task's defaults by dotted name below ``proxy``, views field by field."""
    own = dict(task.defaults)
    views = own.pop("views", None)
    return own | ({f"views.{f.name}": getattr(views, f.name) for f in dataclasses.fields(views)} if views else {})


def settings(name: str, **fields: Any) -> recipe.Proxy:
    """A task's settings as published, but for `fields`."""
    task = find(name)
    return recipe.Proxy(**{"name": name, "options": task.Options(), **task.defaults, **fields})


def options(proxy: recipe.Proxy) -> Any:
    """The task's options, those of its dataclass where the recipe has none."""
    return proxy.options if proxy.options is not None else find(proxy.name).Options()


def nuisance(proxy: recipe.Proxy) -> tuple[View, ...]:
    """What the task is covariant with; none for a task that is not."""
    return find(proxy.name).nuisance(options(proxy))


def residue(proxy: recipe.Proxy) -> tuple[View, ...]:
    """What of the task may be left in features; none for a task without."""
    return find(proxy.name).residue(options(proxy))


def seen(proxy: recipe.Proxy, backbone: nn.Module, size: int) -> float:
    """Views of an image that a step counts."""
    return find(proxy.name).seen(options(proxy), backbone, size)


def side(proxy: recipe.Proxy, size: int) -> int:
    """Side, px, of what the backbone is given of an image of `size` px."""
    return find(proxy.name).side(options(proxy), size)


def check(proxy: recipe.Proxy) -> None:
    """Refuse settings that the task cannot be trained with.

    Raises:
        Refused: naming the field.
    """
    task = find(proxy.name)
    for name in task.asked:
        if proxy.epochs and getattr(proxy.views, name):
            raise Refused(f"proxy.views.{name}: {proxy.name} asks about it, so that its views must not; set it to 0.")
    if proxy.mlp_layers and not task.pooled:
        raise Refused(f"proxy.mlp_layers: {proxy.name} reads maps, behind which there is no MLP; set it to 0.")
    if task.whole_batch and proxy.accumulate > 1:
        raise Refused(f"proxy.accumulate: the loss of {proxy.name} needs a step's images at once; set it to 1.")


def build(proxy: recipe.Proxy, backbone: nn.Module, images: Images) -> Proxy:
    """The recipe's proxy task over a backbone.

    Raises:
        Refused: the task cannot serve this backbone or size.
    """
    task = find(proxy.name)(backbone, proxy, images, options(proxy))
    task.seen = seen(proxy, backbone, images.size)
    return task
