"""What a fine-tuning keeps: the classifier that was best on held-out images, and the last, and what they are worth."""

from pathlib import Path

from torch import nn

from . import backbone as B
from . import classifier, classifier_report, longer, records
from .files import Failed, Refused, read_json, sha256_file, sha256_json, whole_folder, write_json
from .images import Images
from .loop import Context, steps_of
from .markers import check_written, written
from .operations import on_device

BATCH = 512  # images of a forward pass that measures


class Keeper:
    """Looks at a classifier after each epoch, and keeps the best on the held-out part, and the last.

    Args:
        context: the run.
        splits: the images.
        settings: of the fine-tuning.
    """

    def __init__(self, context: Context, splits: dict[str, Images], settings: classifier.Finetune) -> None:
        self.context, self.splits, self.settings = context, splits, settings
        self.task: classifier.Classify | None = None

    def called(self, split: str) -> str:
        """What people call a split of the records."""
        uses = {told["use"] for told in self.splits["train"].account.values()}
        return split if split == "test" else "validation" if "validation" in uses else "held-out part of train"

    def answers(self, network: nn.Module, split: str) -> classifier.Answers:
        """What a classifier says of what is held out for choosing, "val", or of the test split."""
        images = self.splits["train" if split == "val" else split]
        indices = images.labelled(images.val if split == "val" else images.all)
        return classifier.answers(network, images, indices, self.context, BATCH)

    def look(self, step: int, total: int) -> dict[str, float]:
        """Measure after an epoch, and keep what is worth it; what the log is to have."""
        network = self.task.result()
        top1 = classifier.values(self.answers(network, "val"), self.splits["train"])["top1"]
        self.context.say(f"step {step}: {self.called('val')}: {100 * top1:.2f} %")
        best = self.context.folder / "best" / "finetune.json"
        # Of equals the latest: a few held-out images tell little, and later epochs have smaller steps.
        if self.context.main and (not best.exists() or top1 >= read_json(best, "val_top1")["val_top1"]):
            self.keep(network, "best", step, top1)
        if self.context.main and step == total:
            self.keep(network, "last", step, top1)
        self.context.accelerator.wait_for_everyone()
        return {"val_top1": top1}

    def keep(self, network: nn.Module, name: str, step: int, top1: float) -> None:
        """Write a classifier's folder."""
        train = self.splits["train"]
        with whole_folder(self.context.folder / name) as beside:
            licence = "" if self.settings.scratch else network.pretrained_cfg.get("license") or ""
            B.save(network, beside, train, tag="finetuned", license=licence, label_names=train.label_names)
            made = written(beside, B.FILES)
            write_json(beside / "finetune.json", {"step": step, "val_top1": top1, "wrote": made})

    def check_kept(self, folder: Path, steps: int) -> None:
        """Refuse to measure a classifier that is not what a training of so many steps wrote.

        Raises:
            Refused: it is from a longer training.
            Failed: it is gone, or damaged.
        """
        marker, again = folder / "finetune.json", f"choose another --run, or remove {folder.parent} to train again"
        if not marker.exists():
            raise Failed(f"{folder} is gone, or a part of it; {again}.")
        check_written(marker, again)
        step = read_json(marker, "step")["step"]
        if step > steps:
            raise Refused(
                f"epochs: {folder} is of step {step}, and {self.settings.epochs:g} epochs have {steps}: a longer "
                "training went on from them and was stopped; ask for its epochs again, or choose another --run."
            )

    def measure(self, model: str, precision: str, learned: int) -> None:
        """Records of the best and the last classifier, on the held-out part and the test split; report and cards."""
        path, found, train = self.context.folder / "records.jsonl", [], self.splits["train"]
        shown: dict[str, classifier.Answers] = {}  # of the last of the splits
        marker, settings = read_json(self.context.folder / "finetune.json"), self.settings
        cost, schedules = marker["budget"], longer.schedules([(self.context.folder / "finetune.json", "epochs")])
        names = ("labels", "epochs", "scratch", "lr", "layer_decay", "head_first")
        told = {name: getattr(settings, name) for name in names}
        splits = ("val", *(s for s in self.splits if s != "train"))
        steps = steps_of(settings, learned)[1]
        for name in ("last", "best"):
            folder = self.context.folder / name
            self.check_kept(folder, steps)
            network = on_device(B.load(folder), self.context.accelerator.device, train.size)
            shared = {
                "arm": "finetune",
                "model": model,
                "recipe_sha256": sha256_json(marker["read"]),
                "seed": settings.seed,
                "phase": "finetune",
                "round": 0,
                "stage": name,
                "protocol": "finetune",
                "settings": told,
                "size": train.size,
            }
            spent = {
                "images_seen": round(cost["images"]),
                "flops": cost["flops"],
                "seconds": round(cost["seconds"], 1),
                "device": records.device_name(self.context.accelerator.device.type),
                "precision": precision,
                "weights_sha256": sha256_file(folder / "model.safetensors"),
                "versions": records.versions(),
                **({"schedules": schedules} if schedules else {}),
            }
            for split in splits:
                shown[name] = self.answers(network, split)
                data = f"{settings.data.called}@{shown[name].images.fingerprint[:16]}"
                values = classifier.values(shown[name], train)
                rows = [{"data": data, "split": split, "metric": m, "value": v} for m, v in values.items()]
                found += [{**shared, **row, **spent} for row in rows]
                self.context.say(f"{name}, {self.called(split)}: {100 * values['top1']:.2f} %")
        if self.context.main:
            made = found[0]["recipe_sha256"]
            records.write(path, found, lambda r: r.get("recipe_sha256") == made)
            found = [r for r in records.read(path) if r.get("recipe_sha256") == made]  # plain numbers
            called = {split: self.called(split) for split in splits}
            licence = network.pretrained_cfg.get("license")
            whole = classifier_report.Told(model, found, train, learned, called, splits[-1], shown, licence)
            self.context.say(classifier_report.write(self.context.folder, whole))
