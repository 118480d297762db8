"""What the arms and seeds of a comparison have in common, without which their figures could not stand side by side."""

from collections.abc import Collection
from pathlib import Path

from . import records
from .files import Refused, read_json, write_json
from .markers import first_difference
from .measure import classes_fingerprint
from .recipe import Recipe, phase_fields
from .setup import Splits


def check(folder: Path, recipe: Recipe, other: str | None, splits: Splits, asked: Collection[tuple[str, int]]) -> None:
    """Refuse arms and seeds that would be made or measured otherwise than those that are there.

    Args:
        folder: of the comparison, which gets comparison.json.
        recipe: of the method.
        other: task of the arm other_proxy.
        splits: the images.
        asked: arms and seeds to run, or to measure anew.

    Raises:
        Refused: naming what differs.
    """
    path, (train, test) = folder / "comparison.json", splits
    begun = path.exists() and any(next(folder.glob(name), None) for name in ("seed_*", "grid"))
    before = read_json(path, "made", "measured") if begun else {"made": {}, "measured": {}}
    made = {"images": train.fingerprint, **({"--other_proxy": other} if other else {})}
    for phase in ("proxy", "clusters", "relearn"):
        made |= phase_fields(recipe, phase)
    measured = {name: value for name, value in phase_fields(recipe, "evaluate").items() if name not in made}
    measured |= {"labels": classes_fingerprint(train), "test": test.fingerprint if test else None}
    made["relearn.rounds"] = recipe.relearn.rounds
    del made["seed"]
    if begun:
        if found := first_difference(before["made"], made):
            raise Refused(f"{found[0]}: {folder} {found[1]}; choose another --run.")
        rows = [row for row in records.read(folder / "records.jsonl") if not row.get("variant")]
        there = {(row["arm"], row["seed"]) for row in rows}
        if there - set(asked) and (found := first_difference(before["measured"], measured, "measured")):
            arms, seeds = (", ".join(map(str, sorted(set(names)))) for names in zip(*there, strict=True))
            raise Refused(
                f"{found[0]}: {folder} {found[1]}; ask for --arms [{arms}] and --seeds [{seeds}], too, so that all are "
                "measured alike, or choose another --run."
            )
    write_json(path, {"made": {**before["made"], **made}, "measured": measured})
