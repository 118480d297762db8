"""Recipes: what is refused, and that what is written reads back."""

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from training import command, finetune, recipe, usage
from training.__main__ import main
from training.files import Refused
from training.limits import PositiveFloat, PositiveInt, Stage
from training.proxies import PROXIES, settings


def parse(*arguments):
    return command.parse(["--data.path", "digits", *arguments])


def test_a_recipe_reads_back_as_it_was_written(tmp_path):
    made = parse("--proxy.epochs", "2.5", "--model.args.output_stride", "8", "--clusters.k", "[7,9]", "--seed", "3")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(made))
    assert command.parse(["--config", str(path)]) == made
    assert made.model.args == {"output_stride": 8}
    assert made.clusters.k == [7, 9]


@pytest.mark.parametrize("name", PROXIES)
def test_each_tasks_defaults_are_values_that_are_taken(name, tmp_path):
    made = parse("--proxy.name", name)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(made))
    assert command.parse(["--config", str(path)]) == made


def test_defaults_and_what_tasks_publish_are_those_of_the_table():
    base = recipe.flatten(recipe.Recipe())
    found = {"recipe": base, "finetune": recipe.flatten(finetune.Finetune())}
    for name in PROXIES:
        own = recipe.flatten(recipe.Recipe(proxy=settings(name)))
        found[name] = {field: value for field, value in own.items() if base.get(field, base) != value}
    assert found == yaml.safe_load((Path(__file__).parent / "defaults.yaml").read_text())


def test_the_command_line_overrides_the_file(tmp_path):
    path = tmp_path / "mine" / "recipe.yaml"
    path.parent.mkdir()
    path.write_text("proxy: {epochs: 5, lr: 0.2}\ndata: {path: digits}\n")
    made = command.parse(["--config", str(path), "--proxy.epochs", "7"])
    assert (made.proxy.epochs, made.proxy.lr, made.run) == (7, 0.2, "runs/mine")


def test_a_run_is_a_name_under_runs_or_a_path():
    assert parse("--run", "a").run == "runs/a"
    assert parse("--run", "/tmp/a").run == "/tmp/a"
    assert parse("--model.name", "resnet18").run == "runs/resnet18.rotation_digits"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--proxy.epocs", "1"], "proxy.epocs"),
        (["--seed", "x"], "seed"),
        (["--seed", "-1"], "seed"),
        (["--proxy.lr", "0"], "proxy.lr"),
        (["--proxy.epochs", "-1"], "proxy.epochs"),
        (["--data.val_fraction", "0"], "data.val_fraction"),
        (["--data.size", "0"], "data.size"),
        (["--clusters.k", "[]"], "clusters.k"),
        (["--clusters.k", "[3,3]"], "clusters.k"),
        (["--clusters.k", "[0]"], "clusters.k"),
        (["--clusters.restarts", "1"], "clusters.restarts"),
        (["--clusters.source", "magic"], "clusters.source"),
        (["--relearn.epochs", "0"], "relearn.epochs"),
        (["--relearn.settle", "1.5"], "relearn.settle"),
        (["--proxy.norm", "stored"], "proxy.norm"),
        (["--relearn.norm", "stored", "--relearn.reinit", "all"], "relearn.norm"),
        (["--relearn.keep", "0.5"], "relearn.keep"),
        (["--relearn.views.crop_scale", "[0.1,1.5]"], "relearn.views.crop_scale"),
        (["--relearn.views.crop_scale", "[0.9,0.5]"], "relearn.views.crop_scale"),
        (["--proxy.views.hue", "0.7"], "proxy.views.hue"),
        (["--proxy.views.flip", "2"], "proxy.views.flip"),
        (["--proxy.accumulate", "3"], "proxy.accumulate"),
        (["--precision", "fp8"], "precision"),
        (["--log.tracker", "paper"], "log.tracker"),
        (["--proxy.epochs", "inf"], "proxy.epochs"),
        (["--proxy.warmup", "nan"], "proxy.warmup"),
        (["--proxy.batch_size", "1" + "0" * 23], "proxy.batch_size"),
        (["--relearn.rounds", "1e308"], "relearn.rounds"),
        (["--data.split_seed", "-2"], "data.split_seed"),
        (["--evaluate.linear_c", "[1e-300,1]"], "evaluate.linear_c"),
        (["--evaluate.linear_c", "[1,1e300]"], "evaluate.linear_c"),
        (["--model.args", "{channels:[16]}"], "a space after each colon"),
        (["--epochs", "5"], "did you mean --proxy.epochs or --relearn.epochs?"),
        (["--data.pth", "x"], "did you mean --data.path?"),
        (["--proxy.batch-size=5"], "did you mean --proxy.batch_size"),
    ],
)
def test_what_is_wrong_is_refused_naming_the_field(arguments, named):
    with pytest.raises(Refused) as error:
        parse(*arguments)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_keys_of_a_file_are_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("proxy: {epocs: 5}\n")
    with pytest.raises(Refused, match="epocs"):
        command.parse(["--config", str(path), "--data.path", "digits"])


def test_data_must_be_named():
    with pytest.raises(Refused, match=r"data\.path is missing"):
        command.parse([])


@pytest.mark.parametrize(("path", "run"), [(".", "mine"), ("{}", "{}/out"), ("{}", "{}"), ("[digits, {}/.]", "{}/a/b")])
def test_a_run_in_its_own_data_is_refused(path, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ["--data.path", path.format(tmp_path), "--run", run.format(tmp_path)]
    for read in (command.parse, lambda given: finetune.main(["test_resnet", *given])):
        with pytest.raises(Refused, match=r"would lie in .*; write to a place outside it"):
            read(asked)
    with pytest.raises(Refused, match="would lie in"):
        parse("--run", asked[3], "--evaluate.transfer", f"[{tmp_path}]")
    assert command.parse([*asked[:3], str(tmp_path.parent / "beside")])


def test_data_are_called_by_the_folder_that_a_point_means(tmp_path, monkeypatch):
    (tmp_path / "pets" / "cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "pets" / "cats")
    assert recipe.Data([".", "..", "./", "../..", "a/dogs"]).called == f"cats+pets+cats+{tmp_path.name}+dogs"


def test_names_that_are_no_utf_8_are_refused_where_they_would_be_written():
    with pytest.raises(Refused, match=r"d\\xe9 has bytes that are no UTF-8"):
        command.parse(["--data.path", "d\udce9"])


def test_every_field_is_explained():
    text = usage.whole(command.parser([]))

    def fields(kind, name):
        for field in dataclasses.fields(kind):
            inner = getattr(recipe, field.type.__name__, None) if isinstance(field.type, type) else None
            if dataclasses.is_dataclass(inner):
                yield from fields(inner, f"{name}{field.name}.")
            else:
                yield f"{name}{field.name}"

    explained = {block.split()[0].rstrip(","): block for block in text.split("\n  --")[1:]}
    for option in set(fields(recipe.Recipe, "")) - {"proxy.options"}:  # each task's own
        block = " ".join(explained[option].split())
        assert re.search(r"[a-z]{2,} [^\[\]]*[.)](\s|$)", block), option  # words that end, before any default


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"proxy: {epochs: \xff}", "no text in UTF-8"),
        (b"proxy: {epochs: 1", "cannot be read as YAML"),
        (b"data: &a [*a]", "aliases are not read"),
        (b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "aliases are not read"),
        (b"seed: 1\nseed: 2", "a key is given twice"),
        (b"proxy: {views: {flip: 0.1, flip: 0.2}}", "a key is given twice"),
        (b"[" * 5000, "nested too deeply"),
        (b'run: "a\\0b"', "a character that no text has"),
        (b'run: "a\\ud83d\\ude00b"', "a character that no text has"),
        (b"proxy: 5", "proxy has fields of its own"),
        (b"proxy: {'': 1}", "a key is empty"),
        (b"proxy: {views: [flip]}", "proxy.views has fields of its own"),
        (b"proxy: {options: 3}", "proxy.options has fields of its own"),
        (b"- 1", "has no fields"),
        (b"", "has no fields"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, said):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    with pytest.raises(Refused) as error:
        command.parse(["--config", str(path), "--data.path", "digits"])
    assert said in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_value_deep_in_a_file_names_its_field(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("proxy: {views: {flip: 2}}")
    with pytest.raises(Refused, match=r"^proxy\.views\.flip: "):
        command.parse(["--config", str(path), "--data.path", "digits"])
    path.write_text("proxy: {views: {flap: 0.2}}")
    with pytest.raises(Refused, match=r"no field proxy\.views\.flap; did you mean --proxy\.views\.flip"):
        command.parse(["--config", str(path), "--data.path", "digits"])


def test_help_fits_on_a_screen_and_all_of_it_is_in_the_order_of_a_run(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "110")

    def said(option):
        with pytest.raises(SystemExit, match="0"):
            main([option])
        return capsys.readouterr().out

    short, whole = said("--help"), said("--help_all")
    assert len(short.splitlines()) <= 40
    assert {"--data.path", "--run", "--model.name", "--relearn.epochs", "--help_all"} <= set(short.split())
    assert re.search(r"^  MODEL +[A-Z]", usage.whole(finetune.command()), re.M)
    names = ("model.name", "data.path", "proxy.name", "clusters.k", "relearn.split", "log.every")
    order = [whole.index(f"  --{name}") for name in names]
    assert order == sorted(order)
    assert "configuration file" not in whole
    assert max(map(len, whole.splitlines())) <= 110


@pytest.mark.parametrize(
    ("hint", "said"),
    [
        (bool, "true|false"),
        (Literal["a", "b"], "a|b"),
        (list[PositiveInt] | None, "[N, ...]"),
        (tuple[PositiveFloat, PositiveFloat], "[X, X]"),
        (Stage | Literal["auto"], "N | auto"),
        (dict[str, Any], "{NAME: VALUE, ...}"),
    ],
)
def test_types_are_told_as_people_read_them(hint, said):
    assert usage.kind(hint) == said
