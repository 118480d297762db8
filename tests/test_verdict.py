"""A comparison's verdict in words, its report and its figures, from records."""

import math

import pytest
from PIL import Image
from scipy import stats

from tests.test_contrast import rows
from training import charts, contrast, verdict
from training.files import write_lines


def test_where_sslpp_stands_is_what_the_interval_says():
    assert verdict.side([2.0, 3.0, 2.5]) == "above"
    assert verdict.side([-2.0, -3.0, -2.5]) == "below"
    assert verdict.side([2.0, 3.0, 1.0]) == "level with"  # a mean of 2 that the interval does not tell from 0
    assert verdict.side([9.0]) == verdict.side([9.0, 9.1]) == verdict.FEW_SEEDS


def test_so_many_seeds_as_are_told_would_tell_and_one_fewer_would_not():
    differences = [2.0, 3.0, 0.5]
    mean, deviation = 5.5 / 3, math.sqrt(sum((d - 5.5 / 3) ** 2 for d in differences) / 2)
    count = verdict.seeds_to_tell(differences)

    def half(n):
        return stats.t.ppf(0.975, n - 1) * deviation / math.sqrt(n)

    assert half(count) < mean < half(count - 1)
    assert verdict.seeds_to_tell([1.0, -1.0, 0.01]) is None


def test_a_verdict_names_every_arm_on_its_side_and_what_would_tell_it_apart():
    more = [{**r, "arm": "clusterfit"} for r in rows() if r["arm"] == "random" and r["seed"] == 0]
    same = [{**r, "arm": "keep_high"} for r in rows() if r["arm"] == "sslpp"]
    ahead = [{**r, "arm": "supervised", "value": r["value"] + 0.2} for r in rows() if r["arm"] == "sslpp"]
    linear, apart, knn, _, meaning = verdict.verdict(rows() + more + same + ahead)
    assert linear == (
        "Linear probe, pooled, 3 seeds: sslpp (62.0 %) is above random (+32.0); level with scratch (+2.0) and "
        "keep_high (+0.0); below supervised (-20.0); not told from clusterfit (+30.0), of which there are fewer "
        "than three seeds."
    )
    assert apart == (
        "What would tell these apart: as differences stand, about 4 seeds from scratch; for so small a difference as "
        "that from keep_high over 30 seeds, or rather more images, harder ones or a longer training; at least three "
        "seeds of clusterfit."
    )
    assert knn.startswith("Nearest neighbours (k = 20), pooled, 3 seeds: sslpp (52.0 %) is above random")
    assert "saw fewer" not in meaning


def test_a_verdict_tells_unequal_budgets_toys_and_what_one_seed_is_worth():
    shorter = [{**r, "images_seen": r["images_seen"] // (4 if r["arm"] == "random" else 1)} for r in rows()]
    told = verdict.verdict([{**r, "data": "digits@0"} for r in shorter])
    assert "A gain over random, which saw fewer images, may be due to that." in told[-2]
    assert told[-1] == verdict.TOY
    one = verdict.verdict([r for r in rows() if r["seed"] == 0])
    assert "one seed (0): sslpp (60.0 %) is not told from scratch (+2.0) and random (+30.0)" in one[0]
    assert verdict.verdict([r for r in rows() if r["arm"] != "sslpp"]) == []
    assert verdict.verdict([r for r in rows() if r["arm"] == "sslpp"]) == []


def unlabelled():
    """The same arms without labels: the probes' figures as those of the score that needs none."""
    known = [r for r in rows() if r["protocol"] == "linear"]
    return [{**r, "protocol": "label_free", "metric": "retrieval", "split": "val"} for r in known]


@pytest.mark.parametrize("labelled", [True, False])
def test_a_report_leads_with_its_verdict_and_the_screen_ends_in_it(labelled, tmp_path):
    found = rows() if labelled else unlabelled()
    write_lines(tmp_path / "records.jsonl", found)
    screen = verdict.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.split("\n\n")[1] == "## Verdict"
    assert all(f"- {line}" in text for line in verdict.verdict(found))
    assert " ".join(screen.split("Verdict\n")[1].split()) == " ".join(f"- {line}" for line in verdict.verdict(found))
    assert f"{'Linear probe' if labelled else 'Retrieval (needs no labels)'}, pooled, 3 seeds: sslpp (62.0 %)" in text
    assert "sslpp's labels, head and views; every layer from random" in screen
    assert ("| linear |" in text) == labelled
    for name in ("differences", "stages", "operations"):
        with Image.open(tmp_path / "report" / f"{name}.png") as picture:
            assert min(picture.size) > 100
        assert f"](report/{name}.png)" in text


def test_no_two_columns_of_a_table_have_the_same_heading():
    for lines in contrast.tables(rows()):
        assert len(set(lines[0])) == len(lines[0])


def test_each_arm_and_seed_is_drawn_where_its_difference_lies(tmp_path, monkeypatch):
    kept = {}
    monkeypatch.setattr(charts, "save", lambda figure, path: kept.update({path.stem: figure}))
    charts.draw(tmp_path, rows())
    linear, knn = kept["differences"].axes
    seeds, mean = linear.lines[0], linear.lines[1]
    assert seeds.get_xdata() == pytest.approx([2, 3, 1])
    assert mean.get_xdata() == pytest.approx([2])
    low, high = contrast.interval([2.0, 3.0, 1.0])
    assert f"+2.0 ± {(high - low) / 2:.1f}" in [text.get_text() for text in linear.texts]
    assert [label.get_text() for label in linear.get_yticklabels()] == ["scratch", "random"]
    assert knn.get_title() == "nearest neighbours (k = 20), pooled"
    assert [axis.get_title() for axis in kept["stages"].axes if axis.get_visible()] == [
        "sslpp minus scratch", "sslpp minus random"
    ]  # fmt: skip
    places = [label.get_text() for label in kept["stages"].axes[0].get_xticklabels()]
    accuracy, cost = kept["operations"].axes
    assert "billions" in cost.get_xlabel()
    assert [text.get_text() for text in accuracy.texts] == ["62.0", "60.0", "30.0"]
    charts.draw(tmp_path, unlabelled())
    assert [label.get_text() for label in kept["stages"].axes[0].get_xticklabels()] == places
    assert len(places) > 1
    for count, said in ((3, "95 % interval"), (2, "no interval is known")):
        assert said in charts.draw(tmp_path, [r for r in rows() if r["seed"] < count])["stages"]


def test_controls_of_several_comparisons_are_drawn_line_by_line(tmp_path, monkeypatch):
    kept = {}
    monkeypatch.setattr(charts, "save", lambda figure, path: kept.update({path.stem: figure}))
    own = [{**row, "split": "test"} for row in rows()]
    fewer = [row for row in own if row["seed"] < 2]
    charts.controls(
        tmp_path / "controls.png", {"one": own, "other": fewer}, {"scratch": "from random", "proxy": "more"}
    )
    (scratch, knn), (proxy, _) = zip(*[iter(kept["controls"].axes)] * 2, strict=True)
    assert [scratch.get_title("left"), proxy.get_title("left")] == [
        "sslpp minus scratch: from random",
        "sslpp minus proxy: more",
    ]
    assert [label.get_text() for label in scratch.get_yticklabels()] == ["one", "other"]
    assert [list(line.get_ydata()) for line in scratch.lines[:1]] == [[0, 0, 0]]
    means = [text.get_text() for text in scratch.texts]
    assert (means[0][:6], means[1]) == ("+2.0 ±", "+2.5")  # of two seeds no interval
    assert knn.get_xlim() == kept["controls"].axes[3].get_xlim()
    assert not proxy.texts  # nobody has it
