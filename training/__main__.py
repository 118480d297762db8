"""python -m training: a recipe in, a run folder out. Without any argument, the quickstart: a comparison on digits."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .command import guarded

CONFIGS = Path(__file__).parent.parent / "hub_configs"
QUICKSTART = CONFIGS / "quickstart" / "recipe.yaml"


def main(arguments: Sequence[str]) -> None:
    if not arguments:
        _greet("The quickstart: SSL++ beside two other ways to train, on digits. torch and timm are loaded first …")
        from . import compare

        arms = ["random", "proxy", "sslpp"]
        compare.main(["--config", str(QUICKSTART)], arms=arms, seeds=[3, 4, 5, 6], grid=[1.0])
        return
    from .command import parse

    recipe = parse(fitting(arguments))  # before the imports, which --help and a mistyped field need not wait for
    _greet(
        f"{recipe.model.name} on {recipe.data.called}, in {recipe.run}. torch and timm are loaded, then the images …"
    )
    from .launch import StopSignals
    from .run import run

    with StopSignals() as stop:
        run(recipe, stop)


def fitting(arguments: Sequence[str]) -> list[str]:
    """A command line, with a recipe for photographs where it names none: over weights that exist, the one for these;
    with neither network nor task, one that fits the machine."""
    from .command import asked

    if any(asked(arguments, "--config")) or any(argument in ("-h", "--help", "--help_all") for argument in arguments):
        return list(arguments)
    lent = [value for _, value in asked(arguments, "--model.pretrained")]
    if lent and lent[-1].lower() == "true":
        name, why = "photos_adapt", "is for weights that exist"
    elif any(asked(arguments, "--model.name", "--model.pretrained", "--proxy.name")):
        return list(arguments)
    else:
        import torch

        name, why = "photos_resnet50" if torch.cuda.is_available() else "photos_small", "fits this machine"
    if os.environ.get("RANK", "0") == "0":
        print(f"no --config: {name} is taken, which {why}; {CONFIGS.name}/ has others", flush=True)
    return ["--config", str(CONFIGS / name / "recipe.yaml"), *arguments]


def _greet(text: str) -> None:
    """A line for who waits at a terminal, until there is more to say."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
