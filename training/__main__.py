"""python -m training: a recipe in, a run folder out. Without any argument, the quickstart: a comparison on digits."""

import sys
from collections.abc import Sequence
from pathlib import Path

from .command import guarded

QUICKSTART = Path(__file__).parent.parent / "hub_configs" / "quickstart" / "recipe.yaml"


def main(arguments: Sequence[str]) -> None:
    if not arguments:
        _greet("The quickstart: SSL++ beside two other ways to train, on digits. torch and timm are loaded first …")
        from . import compare

        arms = ["random", "proxy", "sslpp"]
        compare.main(["--config", str(QUICKSTART)], arms=arms, seeds=[3, 4, 5, 6, 7], grid=[1.0])
        return
    from .command import parse

    recipe = parse(arguments)  # before the imports, which --help and a mistyped field need not wait for
    _greet(
        f"{recipe.model.name} on {recipe.data.called}, in {recipe.run}. torch and timm are loaded, then the images …"
    )
    from .launch import StopSignals
    from .run import run

    with StopSignals() as stop:
        run(recipe, stop)


def _greet(text: str) -> None:
    """A line for who waits at a terminal, until there is more to say."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
