"""Records, tables and figures."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import make_images
from training import figures, gains, records, report
from training.clusters import write_labels
from training.files import write_lines


def record(arm, stage, value, protocol="linear", split="test", number=0, **settings):
    return {
        "arm": arm, "model": "m", "recipe_sha256": "r", "seed": 0, "phase": "relearn" if number else "proxy",
        "round": number, "stage": stage, "protocol": protocol, "settings": settings, "data": "d@0", "split": split,
        "metric": "rank" if protocol == "rankme" else "top1", "value": value, "images_seen": 1000 * (number + 1),
    }  # fmt: skip


def a_run():
    rows = []
    for arm, gain, number in (("random", 0, 0), ("proxy_short", 0.1, 0), ("sslpp", 0.2, 1), ("sslpp", 0.3, 2)):
        for stage in (0, 1, "pooled"):
            rows.append(record(arm, stage, 0.4 + gain, number=number, C=0.1))
            rows.append(record(arm, stage, 0.3 + gain, "knn", number=number, k=20))
            rows.append(record(arm, stage, 0.2 + gain, "knn", number=number, k=200))
            rows.append(record(arm, stage, 0.9 - gain, "residue", number=number, views=4))
            rows.append(record(arm, stage, 7 + gain, "rankme", number=number))
    return rows


def test_a_newer_record_of_the_same_thing_replaces_the_older(tmp_path):
    path = tmp_path / "records.jsonl"
    records.write(path, [record("a", 0, 0.1), record("a", 0, 0.2, "knn", k=20), record("a", 0, 0.3, "knn", k=200)])
    records.write(path, [record("a", 0, 0.5), record("a", 1, 0.6)])
    assert [r["value"] for r in records.read(path)] == [0.5, 0.2, 0.3, 0.6]
    records.write(path, [record("a", 2, 0.7), record("a", 0, 0.4, "knn", k=20)], lambda r: r["protocol"] == "knn")
    assert [r["value"] for r in records.read(path)] == [0.5, 0.7, 0.4, 0.6]  # no order depends on what was done again


def test_two_that_add_records_at_once_lose_none(tmp_path, monkeypatch):
    path, read = tmp_path / "records.jsonl", records.read
    other = threading.Thread(target=lambda: records.write(path, [record("b", 0, 0.2)]))

    def slow(path):
        found = read(path)
        if threading.current_thread() is not other and not other.ident:
            other.start()
            other.join(0.3)  # it would be done if nothing kept it from it
        return found

    monkeypatch.setattr(records, "read", slow)
    records.write(path, [record("a", 0, 0.1)])
    other.join()
    assert [r["arm"] for r in read(path)] == ["a", "b"]


def test_tables_show_the_last_round_of_each_arm():
    found = report.tables(a_run(), ["random", "proxy_short", "sslpp"])
    assert [protocol for protocol, _ in found] == ["linear", "knn", "knn", "residue", "rankme"]
    _, lines = found[0]
    assert lines[0] == ["linear probe, top-1 %", "stage 0", "stage 1", "pooled"]
    assert lines[3] == ["sslpp", "70.0", "70.0", "70.0"]
    assert found[4][1][1] == ["random", "7.0", "7.0", "7.0"]
    text, markdown = report.as_text(lines), report.as_markdown(lines)
    assert len({len(line) for line in text.splitlines()}) == 1
    assert markdown.splitlines()[1] == "|---|---:|---:|---:|"


def test_tables_show_the_means_of_several_seeds():
    rows = [record("sslpp", stage, 0.5 + stage / 10, number=1, C=0.1) for stage in (0, 1)]
    rows += [{**r, "seed": 1, "value": r["value"] + 0.1 * r["stage"]} for r in rows]
    assert report.tables(rows, ["sslpp"])[0][1][1] == ["sslpp", "50.0", "65.0", ""]


def test_what_a_table_shows_is_told_under_the_first_of_its_kind():
    _, found = report.run_tables(a_run(), "sslpp")
    told = list(report.explained(found))
    assert [part[0] for part in told] == list("|*|*||*|*")  # the second table of neighbours has nothing to add
    assert told[-2].startswith("| RankMe")
    assert told[-1].startswith("*How many dimensions")
    unlabelled = [{**r, "protocol": "rankme"} for r in a_run()]
    assert not any("classifier" in part for part in report.explained(report.run_tables(unlabelled, "sslpp")[1]))


def test_stages_are_counted_from_the_records():
    assert records.stages_of(a_run()) == 2
    assert records.stages_of([record("a", "pooled", 0.5)]) == 0


def test_the_held_out_part_is_shown_where_there_is_no_test_split():
    rows = [{**r, "split": "val"} for r in a_run()]
    assert records.split_of(rows) == "val"
    assert "on the held-out part of train" in gains.gain(rows, "sslpp")


def drawn(path):
    with Image.open(path) as picture:
        return picture.size, len(set(picture.convert("L").resize((64, 64)).getdata()))


def test_figures_are_drawn_whole(tmp_path):
    images = make_images(60)
    figures.stages(tmp_path / "stages.png", a_run(), ["random", "proxy_short", "sslpp"], "test")
    write_lines(
        tmp_path / "metrics.jsonl",
        [
            {"phase": p, "round": n, "step": s, "images": s * 8, "loss": 1 / s, "accuracy": 0.1 * s}
            for p, n in (("proxy", 0), ("relearn", 1))
            for s in range(1, 6)
        ],
    )
    figures.curves(tmp_path / "curves.png", tmp_path / "metrics.jsonl")
    features = {"proxy": torch.randn(60, 4), "sslpp": torch.randn(60, 4)}
    figures.neighbours(tmp_path / "neighbours.png", features, images, images.all)
    unlabelled = make_images(60, labelled=False)
    figures.neighbours(tmp_path / "plain.png", features, unlabelled, unlabelled.all)
    for name in ("stages", "curves", "neighbours", "plain"):
        size, shades = drawn(tmp_path / f"{name}.png")
        assert min(size) > 200
        assert shades > 20


def test_the_share_of_neighbours_of_a_class_is_of_all_held_out_images():
    images = make_images(60)
    perfect = torch.nn.functional.one_hot(images.labels, 4).float()
    turned = torch.nn.functional.one_hot((images.labels + images.held_out.long()) % 4, 4).float()
    half = torch.where((torch.arange(60) % 14 == 0).unsqueeze(1), turned, perfect)  # every other held-out one is wrong
    held = int(images.held_out.sum())
    wrong = int(images.held_out[::14].sum())
    share = images.labels[~images.held_out].bincount() / (60 - held)
    for rows, expected in ((perfect, 1.0), (turned, 0.0), (half, 1 - wrong / held)):
        found, chance, of = figures.same_class(rows, images, images.all, 6)
        assert (found, of) == (pytest.approx(expected), held)
        assert chance == pytest.approx(share[images.labels[images.held_out]].mean())


def test_both_sides_say_how_often_neighbours_are_of_the_class(tmp_path, monkeypatch):
    images, kept = make_images(60), []
    monkeypatch.setattr(figures, "save", lambda figure, path: kept.append(figure))
    perfect = torch.nn.functional.one_hot(images.labels, 4).float()
    figures.neighbours(tmp_path / "n.png", {"a": torch.ones(60, 4), "b": perfect}, images, images.all)
    (axis,) = kept[0].axes
    heads, told = zip(*zip(*[iter(text.get_text() for text in axis.texts)] * 2, strict=True), strict=True)
    assert heads == ("image", "nearest under a", "nearest under b")
    assert "100% are of the same class" in told[2]
    assert "of all 9 held-out images" in told[2]
    side = figures.TILE + 2 * figures.FRAME
    picture = axis.images[0].get_array().reshape(8, -1, 14, side + figures.GAP, 3)[:, -side:, :, :side]
    corners, middles = picture[:, 0, :, 0], picture[:, side // 2, :, side // 2]
    drawn_at = (middles != 255).any(-1)
    assert (drawn_at == (np.arange(14) != 7)).all()  # the image, six neighbours, nothing, six neighbours
    assert (corners[:, [0, 7]] == 255).all()
    assert (corners[:, 8:] == figures.SAME).all()
    framed = {tuple(colour) for colour in corners[:, 1:7].reshape(-1, 3).tolist()}
    assert framed == {figures.SAME, figures.OTHER}  # six of equal features are of any class


def test_chance_is_marked_as_the_records_tell_it(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(figures, "save", lambda figure, path: kept.append(figure))
    rows = [{**r, "settings": {**r["settings"], "chance": 0.4}} if r["protocol"] == "linear" else r for r in a_run()]
    figures.stages(tmp_path / "s.png", rows, ["random", "proxy_short", "sslpp"], "test")
    linear, knn, residue = kept[0].axes
    assert [text.get_text() for text in linear.texts] == ["chance 40 %"]
    assert linear.lines[-1].get_ydata() == pytest.approx([40, 40])
    assert not knn.texts  # these records are older, and do not tell
    assert residue.texts[0].get_text() == "chance 25 %, far below"  # a line there would press the curves flat


def test_the_same_records_draw_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        figures.stages(tmp_path / f"{name}.png", a_run(), ["random", "sslpp"], "test")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("labelled", [True, False])
def test_a_contact_sheet_shows_the_nearest_images_first(tmp_path, labelled, monkeypatch):
    images = make_images(30, labelled=labelled)
    labels, distances = np.arange(30) % 3, np.linspace(1, 0, 30).astype(np.float32)
    write_labels(tmp_path / "l.parquet", images, images.all, {"label_3": labels, "distance_3": distances})
    drawn_as, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn_as.append(figure) or save(figure, path))
    figures.contact_sheet(tmp_path / "sheet.png", images, tmp_path / "l.parquet", columns=4)
    title = "All 3 clusters, the images nearest to each one's centre first"
    (axis,) = drawn_as[0].axes
    assert axis.get_title() == title
    assert [text.get_text().split(":")[0] for text in axis.texts] == ["cluster 0", "cluster 1", "cluster 2"]
    picture = axis.images[0].get_array().reshape(3, -1, 4, figures.TILE + figures.GAP, 3)
    first = picture[:, -figures.TILE :, 0, : figures.TILE]
    assert (first == figures.tiles(images, torch.tensor([27, 28, 29]))).all()
    words = figures._describe(images, 2, np.arange(0, 30, 4))
    assert words == "cluster 2: 8 images" + ("\n100% are of class 'class\n0'" if labelled else "")
    size, shades = drawn(tmp_path / "sheet.png")
    assert min(size) > 200
    assert shades > 20


def test_a_test_split_without_labels_leaves_the_held_out_part_to_show():
    rows = [record("sslpp", "pooled", 0.5, split="val", number=1), record("proxy_short", "pooled", 0.4, split="val")]
    rows += [record("sslpp", "pooled", 9.0, "rankme", split=split, number=1) for split in ("val", "test")]
    found = dict(report.tables(rows, ["proxy_short", "sslpp"]))
    assert found["linear"][1:] == [["proxy_short", "40.0"], ["sslpp", "50.0"]]
    assert found["rankme"][1:] == [["sslpp", "9.0"]]
    assert "on the held-out part of train" in gains.gain(rows, "sslpp")
