"""Proxy tasks: labels made from the images themselves.

A proxy is a `BackboneTask` made from (backbone, recipe.proxy, images) that also says, as class attributes,
    Options     a dataclass of its own settings, ``proxy.options`` in a recipe;
    nuisance    what it is covariant with: views, [B, 3, H, W] to the same, the first of which changes nothing; phase 2
                averages features over them;
    asked       fields of its views that change the answer to what it asks, and must be 0;
    residue     views of which the proxy itself tells one from another, by their position; the residue measures how well
                its features still do.
"""

import dataclasses

from jsonargparse import ArgumentError, ArgumentParser
from torch import nn

from .. import recipe
from ..files import Refused
from ..images import Images
from ..task import BackboneTask
from .rotation import Rotation

PROXIES: dict[str, type[BackboneTask]] = {"rotation": Rotation}


def find(proxy: recipe.Proxy) -> type[BackboneTask]:
    """The class of a recipe's proxy task.

    Raises:
        Refused: there is no such task.
    """
    if proxy.name not in PROXIES:
        raise Refused(f"proxy.name: there is no task {proxy.name!r}; there are {', '.join(PROXIES)}.")
    return PROXIES[proxy.name]


def options(proxy: recipe.Proxy) -> object:
    """The task's options, checked against its dataclass.

    Raises:
        Refused: an option is unknown or of the wrong type.
    """
    kind = find(proxy).Options
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        values = parser.parse_object(proxy.options)
    except ArgumentError as error:
        names = ", ".join(f.name for f in dataclasses.fields(kind)) or "none"
        raise Refused(f"proxy.options: {' '.join(str(error).split())} (options of {proxy.name}: {names})") from error
    return kind(**values.as_dict())


def check(proxy: recipe.Proxy) -> None:
    """Refuse views that change what the task asks about.

    Raises:
        Refused: naming the field.
    """
    for name in find(proxy).asked:
        if proxy.epochs and getattr(proxy.views, name):
            raise Refused(f"proxy.views.{name}: {proxy.name} asks about it, so that its views must not; set it to 0.")


def build(proxy: recipe.Proxy, backbone: nn.Module, images: Images) -> BackboneTask:
    """The recipe's proxy task over a backbone."""
    return find(proxy)(backbone, proxy, images, options(proxy))
