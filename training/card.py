"""The model card: metadata that the Hub reads, and a page that tells the truth to whoever finds the model there."""

import copy
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from . import contrast, report
from .recipe import Recipe, to_yaml

REPOSITORY = "ORG/NAME"  # stands in the card for the repository, which push fills in
TAGS = ["timm", "transformers", "image-feature-extraction", "self-supervised-learning", "sslpp"]
FIGURES = {
    "stages": "Accuracy of frozen features by stage, and how much of the proxy task is left in them",
    "arms": "The same for every arm of the comparison",
    "neighbours": "Held-out images and their nearest training images, before and after",
    "clusters": "Clusters that the last round learned from",
}


def write(folder: Path, name: str, records: report.Records, compared: report.Records, recipe: Recipe, arm: str) -> None:
    """Write README.md into a folder whose figures are in report/.

    Args:
        folder: that gets it.
        name: of the model.
        records: of the run.
        compared: of the comparison that the run is an arm of; none without one.
        recipe: that made the model.
        arm: what the model is called in the records.
    """
    shown = {name: caption for name, caption in FIGURES.items() if (folder / "report" / f"{name}.png").exists()}
    parts = [
        f"---\n{metadata(name, report.last_round(records, arm), recipe)}\n---",
        f"# {name}",
        recipe.card.about,
        what(recipe, records, arm),
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
        f"With `--data.path` and `--run` of your own it runs as it is:\n\n```yaml\n{portable(recipe)}```",
        CITATION,
    ]
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def portable(recipe: Recipe) -> str:
    """The recipe without the places of one machine."""
    here = copy.deepcopy(recipe)
    here.data.path = here.run = here.card.about = None
    return to_yaml(here)


def metadata(name: str, records: report.Records, recipe: Recipe) -> str:
    """YAML of the card's head, every record of the model in its model-index."""
    return str(
        ModelCardData(
            model_name=name,
            library_name="timm",
            license=recipe.card.license,
            datasets=[recipe.card.dataset] if recipe.card.dataset else None,
            pipeline_tag="image-feature-extraction",
            tags=TAGS,
            eval_results=[result(record, recipe.card.dataset) for record in records] or None,
        )
    )


def result(record: dict[str, Any], dataset: str | None) -> EvalResult:
    """A record as huggingface_hub knows it; its protocol, layer and settings are arguments of the metric."""
    source, fingerprint = record["data"].split("@")
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
    images = recipe.card.dataset or Path(recipe.data.path).name
    if recipe.data.limit:
        images = f"{recipe.data.limit:,} images of {images}, {recipe.data.val_fraction:.0%} of them held out"
    first = f"{recipe.proxy.name} prediction" if recipe.proxy.epochs else f"the weights of {recipe.model.name}"
    stage, rounds = recipe.relearn.split, recipe.relearn.rounds
    seen = next((r["images_seen"] for r in report.last_round(records, arm)), 0)
    return f"""A {recipe.model.name} backbone ({recipe.model.args or "as timm has it"}) without a head, for images of
{recipe.data.size} px, trained on {images} without their labels: first {first}, then SSL++ (Chen et al., IEEE TIP 2022,
[doi:10.1109/TIP.2021.3135470](https://doi.org/10.1109/TIP.2021.3135470); our reading of the abstract), which keeps the
low layers (up to stage {stage}), re-initialises the high ones, and relearns them from clusters of the network's own
features ({rounds} round{"s" * (rounds > 1)}, k = {", ".join(map(str, recipe.clusters.k))}). In all it has seen {seen:,}
views of images."""


def usage(size: int) -> str:
    """How to load it, for one image, for feature maps, and to go on training."""
    return f"""Features of one image, with the transform that the model expects; plain timm loads it, no code of ours is
needed:

```python
import timm, torch
from PIL import Image

model = timm.create_model("hf-hub:{REPOSITORY}", pretrained=True, num_classes=0).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.new("RGB", ({2 * size}, {2 * size}))  # your own: Image.open("photo.jpg").convert("RGB")
with torch.no_grad():
    features = model(transform(image).unsqueeze(0))  # one row of features
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
    held = f"a held-out {recipe.data.val_fraction:.0%} of the training images"
    return f"""All on frozen features, means over positions. *linear*: logistic regression to convergence, its
regularisation chosen on {held}; *nearest neighbours*: cosine-weighted votes (Wu et al. 2018); *residue*: a linear probe
that reads the proxy's own label, where less means that less of the proxy task is left; *RankMe*: effective rank of the
features. `random` is the untrained network, `proxy_short` the backbone that relearning started from."""


def comparison(records: report.Records) -> list[str]:
    """The model beside its controls at equal images seen; nothing where there are none."""
    if not records:
        return []
    rows = contrast.final(records)
    _, seeds = contrast.arms_and_seeds(rows)
    split = report.split_of(rows)
    words = f"""### Beside its controls

Every arm saw equally many images, with learning rates from the same grid; seeds {", ".join(map(str, seeds))}. `proxy`
is the proxy task given the whole budget, `scratch` the same pseudo-labels with every layer from random, `finetune_all`
the same without re-initialising anything, `keep_high` exactly sslpp without re-initialising. Differences are sslpp
minus the arm; one counts only if its 95 % t interval excludes 0."""
    split = report.split_of(rows)
    pooled = [contrast.contrast(rows, name, split) for name in ("linear pooled", "knn pooled")]
    return [words, *map(report.as_markdown, [contrast.summary(rows, split), *pooled])]


def limits(recipe: Recipe) -> str:
    """What not to expect."""
    licence = {
        None: "No licence was chosen for these weights: ask before you use them.",
        "other": "The images are for research only, and so are these weights.",
    }.get(recipe.card.license, f"The weights are under {recipe.card.license}.")
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
