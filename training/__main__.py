"""python -m training: a recipe in, a run folder out. Without any argument, the quickstart: a comparison on digits."""

import sys
from collections.abc import Sequence
from pathlib import Path

from .command import guarded

QUICKSTART = Path(__file__).parent.parent / "hub_configs" / "quickstart" / "recipe.yaml"


def main(arguments: Sequence[str]) -> None:
    if not arguments:
        from . import compare

        arms = ["random", "proxy", "sslpp"]
        compare.main(["--config", str(QUICKSTART)], arms=arms, seeds=[3, 4, 5, 6, 7], grid=[1.0])
        return
    from .command import parse

    recipe = parse(arguments)  # before the imports, which --help and a mistyped field need not wait for
    from .launch import StopSignals
    from .run import run

    with StopSignals() as stop:
        run(recipe, stop)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
