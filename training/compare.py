"""python -m training.compare --config RECIPE --arms … --seeds …: is SSL++ worth it, against what, by how much?

Every arm is a recipe with a few fields changed (`arms.py`) and sees equally many images. Its learning rate is chosen
from the same small grid, on the held-out part of train, with seed 0. What exists is not done again, so that arms and
seeds can be added later.
"""

import copy
import math
import shutil
import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from . import alike, costs, launch, peaks, proxies, records, report, setup, verdict
from . import arms as A
from . import backbone as B
from .command import Parser, asked, from_values, guarded, parser
from .files import Diverged, Refused, lock_folder, nothing_left, refuse_kind, whole_folder, write_text
from .limits import NonNegativeInt, PositiveFloat
from .loop import Context
from .recipe import Recipe, to_yaml
from .run import run

GRID_SEED = 0
GRID = (0.25, 1.0, 4.0)
WIDENED = 2  # times that an arm's grid goes a step further, where the best lies at its edge


ABOUT = "Compare SSL++ with its controls at an equal budget."


def command(arguments: Sequence[str], prog: str = "python -m training.compare", about: str = ABOUT) -> Parser:
    """The command line of a comparison."""
    if list(asked(arguments, "--seed")):
        raise Refused("--seed: a comparison has --seeds, a list such as [0, 1].")
    made = parser(arguments, prog, about, skip={"seed"})
    made.add_argument("--seed", default=0, type=NonNegativeInt, help=SUPPRESS)  # of the recipe of a run, which has one
    usual = [arm for arm in A.ARMS if arm != "other_proxy"]
    made.add_argument("--arms", type=list[str], default=usual, help="Arms to compare.")
    made.add_argument("--other_proxy", help="The task of the arm other_proxy, a file of training/proxies.")
    made.add_argument("--seeds", type=list[NonNegativeInt], default=[0, 1, 2], help="Seeds of every arm.")
    made.add_argument(
        "--grid", type=list[PositiveFloat], default=list(GRID), help="Factors of the learning rate that each arm tries."
    )
    made.usual = ("config", "data.path", "run", "arms", "seeds", "grid", "other_proxy", "precision")
    return made


def main(arguments: Sequence[str], **defaults: Any) -> None:
    """The command; `defaults` are other values of its options."""
    made = command(arguments)
    made.set_defaults(defaults)
    requested = request(made.read(arguments), made)
    with launch.StopSignals() as stop:
        compare(**requested, stop=stop)


def request(values: Namespace, made: Parser) -> dict[str, Any]:
    """What `compare` is asked for by the values that a command line's parser read, but for `stop`.

    Raises:
        Refused: it is wrong.
    """
    arms, seeds, grid, other = (values.pop(name) for name in ("arms", "seeds", "grid", "other_proxy"))
    if ("other_proxy" in arms) != (other is not None):
        raise Refused("--other_proxy: it names the task of the arm other_proxy; give both, or neither.")
    for arm in arms:
        if arm not in A.ARMS:
            raise Refused(f"--arms: there is no arm {arm!r}; there are {', '.join(A.ARMS)}.")
    if not arms or not seeds or not grid:
        raise Refused("--arms, --seeds and --grid need at least one value each.")
    del values["seed"]
    recipe, arms = from_values(values, made), [a for a in A.ARMS if a in arms]
    seeds, grid = list(dict.fromkeys(seeds)), list(dict.fromkeys(grid))
    return {"recipe": recipe, "arms": arms, "seeds": seeds, "grid": grid, "other": other}


def setting(lr: float, variant: str | None) -> str:
    """What of the grid was tried, as records and the screen name it."""
    return f"lr x{lr:g}" + (f", {variant}" if variant else "")


@dataclass
class Comparison:
    """What the arms of a comparison share.

    Attributes:
        recipe: of the method, precision resolved.
        folder: runs/NAME.
        grid: factors of the learning rate.
        counts: what budgets are counted from.
        read: the splits, and other data sets.
        context: processes and requests to end.
    """

    recipe: Recipe
    folder: Path
    grid: list[float]
    counts: A.Counts
    read: setup.Read
    context: Context

    def keep(self, rows: list[dict[str, Any]]) -> None:
        """Add to the comparison's records."""
        if self.context.main:
            records.write(self.folder / "records.jsonl", rows)
        self.context.accelerator.wait_for_everyone()

    def grid_folder(self, arm: str, lr: float, variant: str | None) -> Path:
        """Where an arm with a setting of the grid is run."""
        name = f"{arm}.x{lr:g}" + (f".{variant}" if variant else "")
        return self.folder / "grid" / name.replace(", ", "_").replace(" ", "_")

    def recipe_of(self, folder: Path, arm: str, seed: int, lr: float, variant: str | None) -> Recipe:
        """The recipe of an arm that is run in `folder`."""
        made = A.build(arm, self.recipe, self.counts, lr, variant)
        made.run, made.seed = str(folder), seed
        return made

    def run(
        self, folder: Path, arm: str, seed: int, lr: float, variant: str | None, test: bool
    ) -> list[dict[str, Any]]:
        """Run an arm in `folder`, unless it is done; its records."""
        made = self.recipe_of(folder, arm, seed, lr, variant)
        made.evaluate.test = made.evaluate.test and test
        self.context.say(f"-- {arm}, seed {seed}, {setting(lr, variant)}")
        read = self.read if test else (self.read[0], {})  # other data sets are not what settings are chosen by
        run(made, self.context.stop, read, arm, self.folder / f"seed_{seed}" / "shared")
        return [r for r in records.read(folder / "records.jsonl") if r["arm"] == arm]

    def planned(self, arms: list[str], seeds: list[int]) -> list[Recipe]:
        """The recipes of all runs, but for rates beyond the grid."""
        made = []
        for arm in arms:
            tried = [] if arm in A.UNTUNED or len(self.grid) == 1 else [(lr, None) for lr in self.grid]
            if tried and arm == "proxy":
                tried += [(1.0, variant) for variant in A.variants(self.recipe.proxy)]
            places = [(self.grid_folder(arm, *one), GRID_SEED, *one) for one in tried]
            # What is chosen by the first seed was run with it.
            rest = [seed for seed in seeds if not (tried and seed == GRID_SEED)]
            places += [(self.folder / f"seed_{seed}" / arm, seed, self.grid[0], None) for seed in rest]
            made += [self.recipe_of(place, arm, *setting) for place, *setting in places]
        return made

    def tried(self, arm: str, lr: float, variant: str | None) -> float:
        """Pooled linear accuracy on the held-out part of an arm with a setting, which the records keep."""
        try:
            rows = self.run(self.grid_folder(arm, lr, variant), arm, GRID_SEED, lr, variant, test=False)
        except Diverged as error:  # a rate that is too large loses; the others are still to be tried
            self.context.say(f"{arm}, {setting(lr, variant)}: {error}")
            return -math.inf
        self.keep([{**row, "variant": setting(lr, variant)} for row in rows])
        pooled = records.value(rows, protocol="linear", stage="pooled", split="val", metric="top1")
        # Without labels nothing can be chosen by accuracy: the recipe's own setting stays.
        return -abs(lr - 1.0) if pooled is None else pooled

    def choose(self, arm: str) -> tuple[float, str | None]:
        """The arm's learning-rate factor, and for the proxy its variant, that do best on the held-out part."""
        if arm in A.UNTUNED or len(self.grid) == 1:
            return self.grid[0], None
        by_lr = {lr: self.tried(arm, lr, None) for lr in sorted(self.grid)}
        for _ in range(WIDENED):
            lr, known = max(by_lr, key=by_lr.get), sorted(by_lr)
            if lr not in (known[0], known[-1]):
                break
            beyond = lr * lr / known[1 if lr == known[0] else -2]  # one more step of the grid
            by_lr[beyond] = self.tried(arm, beyond, None)
        lr = max(by_lr, key=by_lr.get)
        if arm != "proxy":
            return lr, None
        variants = A.variants(self.recipe.proxy)
        by_variant = {None: by_lr[lr], **{name: self.tried(arm, lr, name) for name in variants}}
        return lr, max(by_variant, key=by_variant.get)


def compare(
    recipe: Recipe,
    arms: list[str],
    seeds: list[int],
    grid: list[float],
    stop: launch.StopSignals,
    other: str | None = None,
) -> None:
    """Run every arm with every seed, and report.

    Args:
        recipe: of the method.
        arms: names of arms.
        seeds: of the runs.
        grid: factors of the learning rate; one alone is taken as it is.
        stop: requests to end.
        other: task of the arm other_proxy.
    """
    folder = Path(recipe.run)
    recipe = copy.deepcopy(recipe)
    network = B.create(recipe.model, recipe.data.size, pretrained=False)
    recipe.precision = setup.run_precision(recipe, network, proxies.settings(other) if other else None)
    accelerator = launch.start(recipe.precision, None, str(folder))
    context = Context(accelerator, folder, stop, recipe.log.every, recipe.checkpoint_every)
    with nothing_left(folder):
        refuse_kind(folder, "a comparison")
        lock = lock_folder(folder) if context.main else None
        read = setup.load_images(recipe, network, context)
        train = read[0][0]
        counts = costs.counts(recipe, train, network, other)
        same = [arm for arm in arms if "sslpp" in arms and A.repeats(arm, recipe, counts)]
        arms = [arm for arm in arms if arm not in same]
        for arm in arms:
            try:
                setup.refuse(A.build(arm, recipe, counts), train, network, accelerator)
            except Refused as error:
                raise Refused(f"arm {arm}: {error}") from error
        needs = peaks.check(recipe, read[0], network, accelerator)
        if context.main:
            alike.check(folder, recipe, other, read[0], [(arm, seed) for arm in arms for seed in seeds])
    accelerator.wait_for_everyone()
    setup.tell(context, read, recipe.evaluate, network)
    context.say(needs)
    if same:
        context.say(f"not run: {', '.join(same)}; by this recipe it is what sslpp is")
    if context.main:
        write_text(folder / "recipe.yaml", to_yaml(recipe))
    this = Comparison(recipe, folder, grid, counts, read, context)
    time = costs.told(this.planned(arms, seeds), 1, counts, read[0], network, accelerator)
    context.say(f"{len(arms)} arms, seeds {seeds}, {round(A.budget(recipe, counts)):,} images each; {time}")
    for arm in arms:
        lr, variant = this.choose(arm)
        for seed in seeds:
            place = folder / f"seed_{seed}" / arm
            tried = this.grid_folder(arm, lr, variant)
            if context.main and seed == GRID_SEED and tried.exists() and not place.exists():
                with whole_folder(place) as beside:  # the same run; only the test split was left alone there
                    shutil.copytree(
                        tried,
                        beside,
                        ignore=shutil.ignore_patterns("records.jsonl", "measured.json"),
                        dirs_exist_ok=True,
                    )
            accelerator.wait_for_everyone()
            this.keep(this.run(place, arm, seed, lr, variant, test=True))
    text = verdict.write(folder) if context.main else ""
    if "sslpp" in arms:  # whose backbone is worth having: with a report and hub/ of its own
        place = folder / f"seed_{seeds[0]}" / "sslpp"
        run(this.recipe_of(place, "sslpp", seeds[0], *this.choose("sslpp")), stop, read, comparison=folder)
        context.say(f"\nThe backbone of sslpp, seed {seeds[0]}, with a report of its own in {place / 'report.md'}:\n")
        context.say(report.usage(f"local-dir:{place / 'hub'}", recipe.data.size))
    context.say(text)
    if lock:
        lock.close()


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
