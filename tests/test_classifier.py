"""What comes of fine-tuning: the report, the card and its lines, predictions for new images, publishing."""

import csv
import shutil

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from sklearn.metrics import confusion_matrix

from tests.conftest import TUNING, call, make_images
from training import classifier as C
from training import finetune, guesses, predict, push, records
from training.files import read_lines

NAMES = ["$x_$", "a|b <i>c", "class 2", "class 3"]  # the first two are no friends of Markdown and of matplotlib


@pytest.fixture(scope="module")
def data(picture_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pictures"
    for split in ("train", "test"):
        for number, name in enumerate(NAMES):
            shutil.copytree(picture_folder / split / f"class {number}", folder / split / name)
    return folder


@pytest.fixture(scope="module")
def tuned(backbone, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    done = call(finetune.main, backbone, *TUNING, "--data.path", data, "--run", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def shown_by_timm(folder, paths):
    """Probabilities of a classifier as anyone would have them."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        return model(torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])).softmax(1)


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_run_ends_in_a_report_of_what_was_measured(tuned, data):
    folder, done = tuned
    text = (folder / "report.md").read_text()
    value = records.value(records.read(folder / "records.jsonl"), stage="best", split="test", metric="top1")
    assert f"Of 16 images (test) the classifier in `best/` tells **{100 * value:.1f} %** right" in text
    assert f"tells {100 * value:.1f} % right" in done.stdout
    assert "report.md" in done.stdout.splitlines()[-1]
    for line in ("| train | learned from | 38 |", "| train, held-out part | chooses best/ | 10 |", "| test | measured"):
        assert line in text
    for name in ("learning", "classes", "confusion"):
        assert f"(report/{name}.png)" in text
        assert min(Image.open(folder / "report" / f"{name}.png").size) > 200
    said = read(folder / "predictions.csv")
    assert np.mean([row["class"] == row["label"] for row in said]) == pytest.approx(value)
    assert (folder / "report" / "mistakes.png").exists() == (value < 1)
    assert [row["path"].split("/")[1] for row in said] == [row["label"] for row in said]
    assert "<i>" not in text
    assert r"| a\|b &lt;i&gt;c |" in text


def test_confusions_and_accuracy_by_class_against_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    images = make_images(200, classes=5)
    probabilities = torch.rand(150, 5, generator=generator).softmax(1)
    found = C.Answers(images, torch.randperm(200, generator=generator)[:150], probabilities)
    counts = C.confusion(found)
    assert counts.tolist() == confusion_matrix(found.truth, probabilities.argmax(1), labels=range(5)).tolist()
    rows = C.by_class(counts, list("abcde"))
    assert [row[2] / row[1] for row in rows] == sorted(row[2] / row[1] for row in rows)
    for name, count, right, taken, times in rows:
        own = counts["abcde".index(name)].tolist()
        others = {other: n for other, n in zip("abcde", own, strict=True) if other != name}
        assert (count, right, times) == (sum(own), own["abcde".index(name)], max(others.values()))
        assert others[taken] == times


def test_figures_of_many_classes_show_the_worst(tmp_path):
    counts = 5 * torch.eye(60, dtype=torch.long) + torch.roll(torch.eye(60, dtype=torch.long), 1, 1)
    guesses.confusion(tmp_path / "confusion.png", counts, [f"class {i}" for i in range(60)], "test")
    guesses.by_class(tmp_path / "classes.png", C.by_class(counts, [str(i) for i in range(60)]), 5 / 6, "test")
    assert max(Image.open(tmp_path / "confusion.png").size) < 1600
    assert max(Image.open(tmp_path / "classes.png").size) < 1200


def test_the_cards_lines_name_the_class_and_export_to_onnx(tuned, tmp_path, monkeypatch, capsys):
    folder = tuned[0] / "best"
    monkeypatch.chdir(tmp_path)
    code = [part.split("```")[0] for part in (folder / "README.md").read_text().split("```python\n")[1:]]
    here: dict = {}
    exec("\n".join(code).replace("hf-hub:ORG/NAME", f"local-dir:{folder}"), here)
    assert capsys.readouterr().out.splitlines()[0].rsplit(" ", 1)[0] in NAMES
    assert here["names"] == NAMES
    picture = np.random.default_rng(0).random((1, 3, 16, 16)).astype(np.float32)
    found = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(["logits"], {"image": picture})[0]
    with torch.no_grad():
        assert np.allclose(found, here["model"](torch.from_numpy(picture)).numpy(), atol=1e-4)


def test_predictions_are_timms_and_need_no_labels(tuned, data, tmp_path):
    folder = tuned[0] / "best"
    for number, path in enumerate(sorted(data.glob("test/*/*.png"))[:9]):
        (tmp_path / "new").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "new" / f"{number}.png")
    (tmp_path / "new" / "5.png").write_bytes(b"no image")
    for name in ("out.csv", "out.parquet"):
        done = call(predict.main, folder, "--data.path", tmp_path / "new", "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert f"9 rows in {tmp_path / name}, 1 of them null: not decodable" in done.stdout
    rows = read(tmp_path / "out.csv")
    assert list(rows[0]) == ["path", "class", "probability"]
    assert [row["path"] for row in rows] == [f"{i}.png" for i in range(9)]
    assert (rows.pop(5)["class"], pq.read_table(tmp_path / "out.parquet")["class"][5].as_py()) == ("", None)
    expected = shown_by_timm(folder, [tmp_path / "new" / row["path"] for row in rows])
    assert [row["class"] for row in rows] == [NAMES[i] for i in expected.argmax(1)]
    assert [float(row["probability"]) for row in rows] == pytest.approx(expected.max(1).values.tolist(), abs=1e-3)
    assert Image.open(tmp_path / "out_least_certain.png").size[0] > 300
    assert (
        call(predict.main, folder, "--data.path", tmp_path / "new" / "3.png", "--out", tmp_path / "one.csv").returncode
        == 0
    )
    assert read(tmp_path / "one.csv") == rows[3:4]


def test_predictions_of_several_splits_say_of_which(tuned, data, tmp_path):
    assert call(predict.main, tuned[0] / "best", "--data.path", data, "--out", tmp_path / "out.csv").returncode == 0
    rows = read(tmp_path / "out.csv")
    assert {row["split"] for row in rows} == {"train", "test"}
    assert len(rows) == len(list(data.rglob("*.png")))


def test_the_least_certain_come_first():
    probabilities = torch.tensor([[0.9, 0.1, 0.0], [0.4, 0.35, 0.25], [0.2, 0.2, 0.6]])
    found = predict.doubtful(C.Answers(make_images(), torch.tensor([7, 8, 9]), probabilities), ["a", "b", "c"])
    assert [(index, caption) for _, _, index, caption in found] == [
        (8, "a 40 %\nb 35 %"),
        (9, "c 60 %\na 20 %"),
        (7, "a 90 %\nb 10 %"),
    ]


def test_what_cannot_be_predicted_is_refused(tuned, backbone, data, tmp_path):
    for model, out, said in (
        (backbone, "out.csv", "is a backbone, which knows no classes"),
        (tuned[0], "out.csv", f"name one of the models in it: {tuned[0] / 'best'}, "),
        (tuned[0] / "best", "out.npz", "out.npz ends in none of .csv, .parquet"),
    ):
        done = call(predict.main, model, "--data.path", data, "--out", tmp_path / out)
        assert (done.returncode, done.stderr.count("\n"), said in done.stderr) == (2, 1, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "best", "last"])
def test_it_is_published_with_a_card_of_its_own(name, tuned, hub):
    folder = tuned[0] / name
    done = call(push.main, folder, "org/net")
    assert done.returncode == 0, done.stderr
    kept = name or "best"
    sent = {f for f in hub.files("org/net", "main") if f not in (".gitattributes", push.SENT)}
    pictures = {"report/classes.png", "report/confusion.png"} if kept == "best" else set()
    assert sent == {"config.json", "model.safetensors", "README.md", *pictures}
    card = ModelCard(hub.files("org/net", "main")["README.md"].decode())
    assert "hf-hub:org/net" in card.text
    assert card.text.index("## Use it") < card.text.index("## How good it is")
    assert all(picture in card.text for picture in pictures)
    assert (card.data.pipeline_tag, card.data.license) == ("image-classification", "apache-2.0")
    (result,) = card.data.eval_results
    value = records.value(records.read(tuned[0] / "records.jsonl"), stage=kept, split="test", metric="top1")
    assert (result.metric_type, result.dataset_split, result.metric_value) == ("accuracy", "test", value)
    assert f"this classifier tells **{100 * value:.1f} %** right" in card.text
    assert "best/" not in card.text


def test_the_recipe_of_a_run_goes_on_with_it(tuned, backbone):
    told = [tuned[0] / name for name in ("metrics.jsonl", "records.jsonl")]
    before = [read_lines(path) for path in told]
    again = call(finetune.main, backbone, "--config", tuned[0] / "recipe.yaml")
    assert again.returncode == 0, again.stderr
    assert [read_lines(path) for path in told] == before
    other = call(finetune.main, backbone, "--config", tuned[0] / "recipe.yaml", "--lr", "0.5")
    assert (other.returncode, "lr: " in other.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data.path", "digits"], "MODEL is missing: name a model's folder"),
        (["--config", "resnet18", "--data.path", "digits"], "File does not exist"),
        (["runs/none/hub", "--data.path", "digits"], "MODEL: there is no folder runs/none/hub"),
        (["tests", "--data.path", "digits"], "MODEL: tests has no config.json; a model's folder has one"),
        (["resnet_18", "--data.path", "digits"], "MODEL: timm has no model 'resnet_18'; did you mean"),
        (["resnet18", "--config", "hub_configs/quickstart/recipe.yaml"], "is no recipe of this command: it has no"),
    ],
)
def test_a_model_or_recipe_that_is_missing_or_wrong_is_told_so(arguments, said):
    done = call(finetune.main, *arguments)
    assert (done.returncode, done.stderr.count("\n"), said in done.stderr) == (2, 1, True), done.stderr
