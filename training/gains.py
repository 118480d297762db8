"""What a run gained or lost over what it started from, in sentences, and which of its backbones is the better."""

from typing import Any

from . import longer
from .evaluate.label_free import LEADING
from .records import Records, last_round, split_of

# What pooled features are judged by: the probes, and where there are no labels the score that agrees best with them.
PROBES = {"linear": ("linear", "top1"), "nearest neighbours": ("knn", "top1")}
WITHOUT_LABELS = {LEADING: ("label_free", LEADING)}
RETRIEVAL = (
    "it is how often a strong view of a held-out image finds another view of the same image, and the one of such "
    "scores that agrees best with what labels say."
)


def pooled(records: Records, arm: str, split: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Records of an arm's pooled features by protocol and metric; of several numbers of neighbours the first."""
    rows = [r for r in last_round(records, arm) if (r["stage"], r["split"]) == ("pooled", split)]
    return {(r["protocol"], r["metric"]): r for r in reversed(rows)}


def lost(records: Records, before: str, after: str) -> str | None:
    """By how much an arm is worse than another on held-out images, by what pooled features are judged by; else None."""
    one, other = (pooled(records, name, "val") for name in (before, after))
    both = one.keys() & other.keys()
    judged = PROBES if both & set(PROBES.values()) else WITHOUT_LABELS
    values = {name: (one[key]["value"], other[key]["value"]) for name, key in judged.items() if key in both}
    if sum(now - then for then, now in values.values()) >= 0:
        return None
    told = ", ".join(f"{name} {100 * then:.1f} -> {100 * now:.1f}" for name, (then, now) in values.items())
    count = next(other[key].get("count") for key in judged.values() if key in both)
    if count:  # records of earlier versions do not tell
        error = max(sum(p * (1 - p) for p in pair) for pair in values.values()) / count
        told += f"; of {count:,} images, where chance alone moves such a difference by up to "
        told += f"{200 * error**0.5:.1f} points"
    return told


def worse(records: Records, arm: str, export: str) -> str | None:
    """One sentence if an arm is worse, on held-out images, than the backbone that it started from; None if not."""
    told = lost(records, "proxy_short", arm)
    if told is None:
        return None
    held = {
        "better": "hub/ holds the backbone that relearning started from, proxy_short; the relearned one would be there "
        "with relearn.export: always",
        "always": "hub/ holds the relearned one all the same, as relearn.export asks for",
    }[export]
    return f"Relearning made it worse on held-out images ({told}): {held}."


def cautions(records: Records, arm: str, export: str) -> list[str]:
    """What is to be read first: that relearning, or all of the training, made it worse."""
    found = [told] if (told := worse(records, arm, export)) else []
    best = "proxy_short" if found and export == "better" else arm
    if told := lost(records, "random", best):
        better = f"The untrained network does better than what became of it ({told})"
        found.append(f"{better}: it needs more images, or more steps.")
    return [" ".join(found)] if found else []


def gain(records: Records, arm: str) -> str:
    """What the result gained over the backbone it started from, or why there is no figure."""
    start, called = "proxy_short", "the backbone that it started from"
    if arm == start:  # which nothing was relearned from
        start, called = "random", "the untrained network"
    split = split_of([r for r in records if r["metric"] == "top1"])
    before, after = (pooled(records, name, split) for name in (start, arm))
    labelled = before.keys() & after.keys() & set(PROBES.values())
    if not labelled:  # the scores without labels are of held-out images
        split, before, after = "val", *(pooled(records, name, "val") for name in (start, arm))
    shown = {**(PROBES if labelled else WITHOUT_LABELS), "residue": ("residue", "top1")}
    pairs = {name: (before[key], after[key]) for name, key in shown.items() if key in before and key in after}
    if not pairs:
        return "There is nothing to compare yet."
    values = {name: (100 * then["value"], 100 * now["value"]) for name, (then, now) in pairs.items()}
    parts = [f"{name} {then:.1f} -> {now:.1f} ({now - then:+.1f})" for name, (then, now) in values.items()]
    one, other = next(iter(pairs.values()))
    where = {"val": "the held-out part of train", "test": "the test split"}[split]
    how = "" if labelled else f"{LEADING.capitalize()} needs no labels: {RETRIEVAL} "
    told = f"{arm} over {called}, pooled features, on {where}, seed {other['seed']}: {'; '.join(parts)}. {how}"
    if start == "random":
        return f"{told}It had seen {other['images_seen']:,} images.{longer.words(other)}"
    return (
        f"{told}That had seen {one['images_seen']:,} images here, {arm} {other['images_seen']:,}: a comparison at "
        f"equal budget, over several seeds, is what training.compare makes.{longer.words(other)}"
    )
