"""The model card: metadata that the Hub reads, and a page that tells the truth to whoever finds the model there."""

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCardData

from . import contrast, gains, proxies, report, verdict
from .command import short_name
from .recipe import Recipe, to_yaml
from .records import Records, last_round

INDEXED = ("linear", "knn")  # protocols whose pooled figures the model-index has, for a leaderboard to compare
REPOSITORY = "ORG/NAME"  # stands in the card for the repository, which push fills in
TAGS = ["timm", "transformers", "image-feature-extraction", "self-supervised-learning", "sslpp"]


def page(
    folder: Path,
    name: str,
    records: Records,
    compared: Records,
    recipe: Recipe,
    arm: str,
    images: tuple[int, int] | None = None,
    shipped: bool = False,
) -> str:
    """The whole card.

    Args:
        folder: where it is to stand, with figures in report/, recipe.yaml and records.jsonl.
        name: of the model.
        records: of the run.
        compared: of the comparison that the run is an arm of; none without one.
        recipe: that made the model.
        arm: what the last backbone of the run is called in the records.
        images: how many it was trained on, and how many were held out.
        shipped: it is a backbone of the package.
    """
    bad = gains.worse(records, arm, recipe.relearn.export)
    own, made = arm, recipe
    if bad and recipe.relearn.export == "better":  # the model is what relearning started from
        own, made = "proxy_short", dataclasses.replace(recipe, relearn=dataclasses.replace(recipe.relearn, rounds=0))
    shown = {name: caption for name, caption in report.PICTURES.items() if (folder / "report" / f"{name}.png").exists()}
    parts = [
        f"---\n{metadata(name, last_round(records, own), recipe)}\n---",
        f"# {report.plain(name)}",
        recipe.card.about,
        *gains.cautions(records, arm, recipe.relearn.export),
        "## Use it",
        usage(name.split(".")[0] if shipped else f"hf-hub:{REPOSITORY}", recipe.data.size, shipped),
        "## What it is",
        what(made, records, own, images),
        "## What was measured",
        *measured(records, arm, recipe),
        *comparison(compared),
        *(f"![{caption}](report/{name}.png)\n\n*{caption}.*" for name, caption in shown.items()),
        "## Limits",
        limits(recipe, records),
        "## Made by",
        MADE_BY,
        CITATION,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def portable(recipe: Recipe) -> str:
    """The recipe without the places of one machine."""
    here = copy.deepcopy(recipe)
    here.data.path = here.data.labels = here.run = here.card.about = None
    here.evaluate.transfer = []
    here.model.name = portable_name(recipe.model.name)
    return to_yaml(here)


def portable_name(model: str) -> str:
    """A MODEL without a place of one machine."""
    return "local-dir:FOLDER" if model.startswith("local-dir:") else model


def metadata(name: str, records: Records, recipe: Recipe) -> str:
    """YAML of the card's head, with the probes of the model's pooled features on the test split in its model-index."""
    indexed = [
        row
        for row in records
        if (row["stage"], row["split"], row["metric"]) == ("pooled", "test", "top1") and row["protocol"] in INDEXED
    ]
    return str(
        ModelCardData(
            model_name=name,
            library_name="timm",
            **licence_fields(recipe.card.license),
            base_model=hub_id(recipe.model.name) if recipe.model.pretrained else None,
            datasets=[recipe.card.dataset] if recipe.card.dataset else None,
            pipeline_tag="image-feature-extraction",
            tags=TAGS,
            eval_results=[result(row, recipe.card.dataset) for row in indexed] or None,
        )
    )


# The Hub's identifiers that are in use: https://huggingface.co/docs/hub/repositories-licenses
LICENCES = re.compile(
    r"apache-2\.0|mit|bsd|bsd-[23]-clause|bsd-3-clause-clear|isc|zlib|unlicense|mpl-2\.0|a?gpl-3\.0|gpl-2\.0"
    r"|lgpl-(2\.1|3\.0)|cc0-1\.0|cc-by(-nc)?-[234]\.0|cc-by-(sa|nd|nc-sa|nc-nd)-4\.0|odbl|odc-by|pddl|openrail|gemma"
    r"|unknown|other"
)


def licence_fields(licence: str | None) -> dict[str, str]:
    """A card's entries for a licence: the Hub takes its own identifiers alone, and the name of any other."""
    if not licence:
        return {}
    known = LICENCES.fullmatch(licence.lower())
    return {"license": licence.lower()} if known else {"license": "other", "license_name": licence}


def hub_id(model: str) -> str | None:
    """The repository of the Hub that holds the weights of what timm calls so; None for other weights."""
    if model.startswith("hf-hub:"):
        return model.removeprefix("hf-hub:").split("@")[0]
    told = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    return told.hf_hub_id if told else None


def result(record: dict[str, Any], dataset: str | None) -> EvalResult:
    """A record as huggingface_hub knows it; its protocol, layer and settings are arguments of the metric."""
    source, _, fingerprint = record["data"].rpartition("@")
    told = ", ".join(f"{key} {value}" for key, value in record["settings"].items() if key == "k")
    return EvalResult(
        task_type="image-classification",
        dataset_type=dataset or source,
        dataset_name=source,
        dataset_split=record["split"],
        dataset_args={"fingerprint": fingerprint},
        metric_type="accuracy",
        metric_name=", ".join(filter(None, (record["protocol"], str(record["stage"]), told))),
        metric_value=record["value"],
        metric_args={name: record[name] for name in ("protocol", "stage", "seed", "settings")},
    )


def in_words(args: dict[str, Any]) -> str:
    """Keywords of a network as people read them."""

    def word(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    return "; ".join(f"{key.replace('_', ' ')} {word(value)}" for key, value in args.items()) or "as timm has it"


def what(recipe: Recipe, records: Records, arm: str, counted: tuple[int, int] | None = None) -> str:
    """What the model is, and what it was trained on; `counted`, images trained on and held out."""
    images = report.plain(recipe.card.dataset or recipe.data.called)
    if counted:
        images = f"{counted[0]:,} images of {images}; {counted[1]:,} more were held out"
    name, args = report.plain(short_name(recipe.model.name)), report.plain(in_words(recipe.model.args))
    seen = next((f"{r['images_seen']:,}" for r in last_round(records, arm)), "no")
    new = {"high": "The high ones started from new weights here.", "all": "All started from new weights here."}
    source = recipe.clusters.source if recipe.relearn.rounds else "backbone"
    instead = "" if source == "backbone" else f"Here it was {report.SOURCES[source]} instead. "
    here = new.get(recipe.relearn.reinit if recipe.relearn.rounds else "none", "")
    return f"""A {name} backbone ({args}) without a head, for images of {recipe.data.size} px.
It was trained on {images}. It comes {report.origin(recipe, records)}. In all it has seen {seen} views of images.

The method is SSL++ (Chen et al., IEEE TIP 2022, [doi:10.1109/TIP.2021.3135470](https://doi.org/10.1109/TIP.2021.3135470);
our reading of the abstract): the low layers of a self-supervised network are generic, its high ones are not, so these
are relearned, from clusters of the network's own features. {instead}{here}""".rstrip()


def usage(model: str, size: int, shipped: bool) -> str:
    """How to load it, for one image, for feature maps, and to go on training."""
    code, install = report.usage(model, size), "plain timm loads it, no code of ours is needed (`pip install timm`)"
    also = f'\n\n`transformers.AutoModel.from_pretrained("{REPOSITORY}")` loads it as well.'
    if shipped:
        install, also = "the project's package has it (`pip install .` in a clone)", ""
        code = code.replace("import timm, torch", "import timm, torch, sslpp_models")
    return f"""Features of one image, with the transform that the model expects; {install}:

```python
{code}
maps = timm.create_model("{model}", pretrained=True, features_only=True)  # one map for each stage
```

`num_classes=10` adds a new head. With a clone of the project, one command trains it on labels of your own:

```bash
python -m training.finetune {model} --data.path DATA
```{also}"""


def measured(records: Records, arm: str, recipe: Recipe) -> list[str]:
    """What it gained, and the tables with what each of them shows."""
    arms, found = report.run_tables(records, arm, short=True)
    held = f"a held-out {recipe.data.held_out:.0%} of the training images"
    told = f"On frozen features, means over positions; what a protocol chooses, it chooses on {held}."
    asked = proxies.find(recipe.proxy.name).specific
    if recipe.by_proxy and asked:
        told += f" The proxy task's own answer is {asked}."
    return [gains.gain(records, arm), f"{told} {report.rows_explained(arms)}", *report.explained(found)]


def comparison(records: Records) -> list[str]:
    """The model beside its controls, in words; nothing where there are none."""
    told = verdict.verdict(records) if records else []
    return ["### Beside its controls", "\n".join(f"- {line}" for line in told)] if told else []


def limits(recipe: Recipe, records: Records) -> str:
    """What not to expect."""
    licence = {
        None: "No licence was chosen for these weights: ask before you use them.",
        "other": "The images are for research only, and so are these weights.",
    }.get(recipe.card.license, f"The weights are under {report.plain(recipe.card.license or '')}.")
    images = "the training images" + (" and in those that the given weights were made from" * recipe.model.pretrained)
    others = list(map(report.plain, contrast.others(records)))
    also = f"beside these on {verdict.listed(others)}" if others else "on nothing else"
    return f"""- The features know what is in {images}, with their biases, and were measured {also}.
- It was trained and measured at {recipe.data.size} px; photographs are shrunk to that, and lose what is small.
- Split, schedule, number of clusters and labelling are this project's choices, not the paper's.
- {licence}"""


MADE_BY = """SSL++ for timm (the package `sslpp-models`; `pip install -e '.[training]'` in a clone installs it), from
[recipe.yaml](recipe.yaml): `python -m training --config recipe.yaml --data.path DATA --run NAME` makes it again.
[records.jsonl](records.jsonl) has every figure, with its protocol, settings, budget and versions."""

CITATION = """## Citation

```bibtex
@article{chen2022sslpp,
  title   = {SSL++: Improving Self-Supervised Learning by Mitigating the Proxy Task-Specificity Problem},
  author  = {Chen, Song and Xue, Jing-Hao and Chang, Jianlong and Zhang, Jianzhong and Yang, Jufeng and Tian, Qi},
  journal = {IEEE Transactions on Image Processing},
  volume  = {31},
  pages   = {1134--1148},
  year    = {2022},
  doi     = {10.1109/TIP.2021.3135470}
}
```"""
