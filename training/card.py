"""The model card: metadata that the Hub reads, and a page that tells the truth to whoever finds the model there."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from . import contrast, proxies, report
from .command import short_name
from .recipe import Recipe, to_yaml

INDEXED = (*report.TITLES, "clusters")  # protocols whose records the model-index has
REPOSITORY = "ORG/NAME"  # stands in the card for the repository, which push fills in
TAGS = ["timm", "transformers", "image-feature-extraction", "self-supervised-learning", "sslpp"]


def page(folder: Path, name: str, records: report.Records, compared: report.Records, recipe: Recipe, arm: str) -> str:
    """The whole card.

    Args:
        folder: where it is to stand, with figures in report/.
        name: of the model.
        records: of the run.
        compared: of the comparison that the run is an arm of; none without one.
        recipe: that made the model.
        arm: what the last backbone of the run is called in the records.
    """
    bad = report.worse(records, arm, recipe.relearn.export)
    own, made = arm, recipe
    if bad and recipe.relearn.export == "better":  # the model is what relearning started from
        own, made = "proxy_short", dataclasses.replace(recipe, relearn=dataclasses.replace(recipe.relearn, rounds=0))
    shown = {name: caption for name, caption in report.PICTURES.items() if (folder / "report" / f"{name}.png").exists()}
    parts = [
        f"---\n{metadata(name, report.last_round(records, own), recipe)}\n---",
        f"# {report.plain(name)}",
        recipe.card.about,
        bad,
        what(made, records, own),
        "## Use it",
        usage(recipe.data.size),
        "## What was measured",
        protocols(recipe),
        report.gain(records, arm),
        *(report.as_markdown(lines) for _, lines in report.tables(records, ["random", "proxy_short", arm])),
        *comparison(compared),
        *(f"![{caption}](report/{name}.png)\n\n*{caption}.*" for name, caption in shown.items()),
        "## Limits",
        limits(recipe),
        "## Recipe",
        f"With `--data.path` and `--run` of your own it runs as it is:\n\n{report.fenced(portable(recipe), 'yaml')}",
        CITATION,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def portable(recipe: Recipe) -> str:
    """The recipe without the places of one machine."""
    here = copy.deepcopy(recipe)
    here.data.path = here.run = here.card.about = None
    if here.model.name.startswith("local-dir:"):
        here.model.name = "local-dir:FOLDER"
    return to_yaml(here)


def metadata(name: str, records: report.Records, recipe: Recipe) -> str:
    """YAML of the card's head, the model's records by stage and of its clusters in its model-index."""
    return str(
        ModelCardData(
            model_name=name,
            library_name="timm",
            license=recipe.card.license,
            datasets=[recipe.card.dataset] if recipe.card.dataset else None,
            pipeline_tag="image-feature-extraction",
            tags=TAGS,
            eval_results=[result(r, recipe.card.dataset) for r in records if r["protocol"] in INDEXED] or None,
        )
    )


def result(record: dict[str, Any], dataset: str | None) -> EvalResult:
    """A record as huggingface_hub knows it; its protocol, layer and settings are arguments of the metric."""
    source, _, fingerprint = record["data"].rpartition("@")
    layer = record["stage"] if record["stage"] == "pooled" else f"stage {record['stage']}"
    told = ", ".join(f"{key} {value}" for key, value in record["settings"].items() if key == "k")
    classifies = record["metric"] == "top1"
    return EvalResult(
        task_type="image-classification" if classifies else "image-feature-extraction",
        dataset_type=dataset or source,
        dataset_name=source,
        dataset_split=record["split"],
        dataset_args={"fingerprint": fingerprint},
        metric_type="accuracy" if classifies else record["metric"],
        metric_name=", ".join(filter(None, (record["protocol"], layer, told))),
        metric_value=record["value"],
        metric_args={name: record[name] for name in ("protocol", "stage", "seed", "settings")},
    )


def what(recipe: Recipe, records: report.Records, arm: str) -> str:
    """What the model is, and what it was trained on."""
    images = report.plain(recipe.card.dataset or recipe.data.called)
    if recipe.data.limit:
        images = f"{recipe.data.limit:,} images of {images}, {recipe.data.held_out:.0%} of them held out"
    relearn, name = recipe.relearn, report.plain(short_name(recipe.model.name))
    args = report.plain(str(recipe.model.args)) if recipe.model.args else "as timm has it"
    seen = next((f"{r['images_seen']:,}" for r in report.last_round(records, arm)), "no")
    origin = f"the weights of {name}, whatever these were trained on" if recipe.model.pretrained else "random weights"
    steps = [f"from {origin}"]
    if recipe.proxy.epochs:
        steps.append(f"by the proxy task {recipe.proxy.name}, without labels")
    if relearn.rounds:
        labels = "the true labels" if recipe.clusters.source == "labels" else "clusters of features, without labels"
        last = "a stage that was chosen without labels" if relearn.split == "auto" else f"stage {relearn.split}"
        kept = {
            "high": f"keeping the low layers (up to {last}) and re-initialising the high ones",
            "all": "re-initialising every layer",
            "none": "re-initialising nothing",
        }[relearn.reinit]
        steps.append(
            f"then from {labels} (k = {', '.join(map(str, recipe.clusters.k))}; rounds {relearn.rounds}), {kept}"
        )
    return f"""A {name} backbone ({args}) without a head, for images of
{recipe.data.size} px. It was trained on {images}: {", ".join(steps)}. In all it has seen {seen} views of images.

The method is SSL++ (Chen et al., IEEE TIP 2022, [doi:10.1109/TIP.2021.3135470](https://doi.org/10.1109/TIP.2021.3135470);
our reading of the abstract): the low layers of a self-supervised network are generic, its high ones are not, so these
are learned anew, from clusters of the network's own features."""


def usage(size: int) -> str:
    """How to load it, for one image, for feature maps, and to go on training."""
    return f"""Features of one image, with the transform that the model expects; plain timm loads it, no code of ours is
needed:

```python
{report.usage(f"hf-hub:{REPOSITORY}", size)}
```

Feature maps for detection or segmentation, one for each stage:

```python
maps = timm.create_model("hf-hub:{REPOSITORY}", pretrained=True, features_only=True)
```

`num_classes=10` adds a new head to train on labels of your own; with a clone of the project, one command does it:

```bash
accelerate launch -m training.finetune hf-hub:{REPOSITORY} --data.path DATA
```

`transformers.AutoModel.from_pretrained("{REPOSITORY}")` loads it as well."""


def protocols(recipe: Recipe) -> str:
    """What the figures are."""
    held = f"a held-out {recipe.data.held_out:.0%} of the training images"
    asked = proxies.find(recipe.proxy.name).specific
    residue = (
        f"""*residue*: a linear probe
that reads {asked}, where less means that less of the proxy task is left; """
        if asked
        else ""
    )
    return f"""All on frozen features, means over positions. *linear*: logistic regression to convergence, its
regularisation chosen on {held}; *nearest neighbours*: cosine-weighted votes (Wu et al. 2018); {residue}*RankMe*:
effective rank of the features. `random` is the untrained network, `proxy_short` the backbone that relearning started
from."""


def comparison(records: report.Records) -> list[str]:
    """The model beside its controls; nothing where there are none."""
    if not records:
        return []
    seeds = contrast.arms_and_seeds(contrast.final(records))[1]
    words = f"""### Beside its controls

Seeds {", ".join(map(str, seeds))}. Differences are sslpp minus the arm; one counts only if its 95 % t interval excludes
0."""
    return [words, *map(report.as_markdown, contrast.tables(records))]


def limits(recipe: Recipe) -> str:
    """What not to expect."""
    licence = {
        None: "No licence was chosen for these weights: ask before you use them.",
        "other": "The images are for research only, and so are these weights.",
    }.get(recipe.card.license, f"The weights are under {report.plain(recipe.card.license or '')}.")
    return f"""- The features know what is in the training images, with their biases, and were measured on nothing else.
- It was trained and measured at {recipe.data.size} px alone.
- Split, schedule, number of clusters and labelling are this project's choices, not the paper's.
- {licence}"""


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
