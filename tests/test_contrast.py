"""Paired differences and intervals against plain formulas."""

import pytest
from scipy import stats

from tests.test_report import record
from training import contrast, records, verdict


def rows():
    found = []
    values = {"sslpp": (0.60, 0.62, 0.64), "scratch": (0.58, 0.59, 0.63), "random": (0.30, 0.31, 0.29)}
    for arm, by_seed in values.items():
        for seed, value in enumerate(by_seed):
            for stage, shift in ((0, -0.1), (1, 0.02), (2, 0.0), ("pooled", 0.0)):
                cost = {"seed": seed, "flops": 1e9, "seconds": 60.0}
                found.append({**record(arm, stage, value + shift, C=0.1, n=100), **cost})
                found.append({**record(arm, stage, value + shift - 0.1, "knn", k=20, n=100), **cost})
                found.append({**record(arm, stage, value + shift - 0.2, "knn", k=100, n=100), **cost})
    return found


def test_the_interval_is_students():
    differences = [1.0, 2.5, 0.5, 3.0]
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert contrast.interval(differences) == pytest.approx((expected.low, expected.high))
    assert contrast.interval([1.0]) is contrast.interval([1.0, 1.1]) is None


def test_metrics_are_read_off_the_stages():
    values = {name: contrast.metric(rows(), "sslpp", 1, name, "test") for name in contrast.METRICS}
    assert values["linear pooled"] == pytest.approx(62)
    assert values["linear best"] == pytest.approx(64)
    assert values["linear last"] == pytest.approx(62)
    assert values["linear drop"] == pytest.approx(2)
    assert values["knn pooled"] == pytest.approx(52)
    assert values["residue pooled"] is None
    turned = [{**r, "protocol": "residue"} for r in rows() if (r["arm"], r["protocol"]) == ("sslpp", "linear")]
    assert [line[-1] for line in contrast.summary(rows() + turned, "test")] == ["residue", "62.0", "", ""]


def test_of_other_numbers_of_neighbours_the_fewest_are_shown_and_named():
    few = [{**r, "settings": {**r["settings"], "k": 7}} if r["settings"].get("k") == 20 else r for r in rows()]
    assert contrast.metric(few, "sslpp", 1, "knn pooled", "test") == pytest.approx(52)
    assert contrast.contrast(few, "knn pooled", "test")[0][0] == "nearest neighbours (k = 7), pooled"
    assert contrast.summary(few, "test")[0][5:7] == ["kNN 7", "kNN 7, drop"]
    assert any(line.startswith("Nearest neighbours (k = 7), pooled") for line in verdict.verdict(few))


def test_differences_are_paired_by_seed():
    lines = contrast.contrast(rows(), "linear pooled", "test")
    assert lines[0][1:] == ["mean", "seed 0", "seed 1", "seed 2", "95 % interval", "differs"]
    told = {line[0]: line[1:] for line in lines[1:]}
    assert told["sslpp"][:4] == ["62.0", "(60.0)", "(62.0)", "(64.0)"]
    assert told["scratch"][:4] == ["60.0", "+2.0", "+3.0", "+1.0"]
    low, high = contrast.interval([2.0, 3.0, 1.0])
    assert told["scratch"][4] == f"{low:+.1f} to {high:+.1f}"
    assert (told["scratch"][5], told["random"][5]) == ("no", "yes")


@pytest.mark.parametrize(("count", "told"), [(1, ["+2.0", "one seed", "?"]), (2, ["+2.0", "+3.0", "two seeds", "?"])])
def test_one_seed_and_two_claim_nothing(count, told):
    few = [r for r in rows() if r["seed"] < count]
    found = {line[0]: line[2:] for line in contrast.contrast(few, "linear pooled", "test")[1:]}
    assert found["scratch"] == told


def test_what_the_grid_tried_is_no_result():
    tried = [{**r, "variant": "lr x4", "split": "val"} for r in rows() if r["arm"] == "scratch" and r["seed"] == 0]
    lines = [["scratch", "lr x4", "58.0", "yes"]]
    for variant, value in (("lr x1", 0.1), ("lr x9", 0.58)):  # of two equals the first was chosen
        tried += [{**r, "variant": variant, "value": value} for r in tried if r["variant"] == "lr x4"]
        lines.append(["scratch", variant, f"{100 * value:.1f}", ""])
    every = rows() + tried
    assert contrast.final(every) == rows()
    assert contrast.grid(every)[1:] == lines


def test_of_an_arm_the_last_round_counts():
    first = [{**r, "round": 1, "value": 0.1, "images_seen": 1} for r in rows() if r["arm"] == "sslpp"]
    last = [{**r, "round": 2} if r["arm"] == "sslpp" else r for r in rows()]
    assert contrast.final(last + first) == last


def test_a_test_split_without_labels_hides_nothing():
    known = [{**r, "split": "val"} for r in rows()]
    turned = [{**r, "protocol": "residue", "split": "test"} for r in rows() if r["protocol"] == "linear"]
    assert records.split_of(known + turned) == "val"
    assert records.split_of(turned) == "test"
    _, summary, linear, _ = contrast.tables(known + turned)
    assert [line[1] for line in summary[1:]] == [line[1] for line in linear[1:]] == ["62.0", "60.0", "30.0"]


def test_tasks_side_by_side_show_what_each_and_ssl_add():
    named = {"random": "random", "proxy": "scratch", "sslpp": "sslpp"}
    base = [{**r, "arm": arm} for arm, of in named.items() for r in rows() if r["arm"] == of]
    short = [{**r, "arm": "proxy_short", "value": r["value"] - 0.1} for r in base if r["arm"] == "proxy"]
    own = {"stage": "pooled", "protocol": "task", "settings": {"chance": 0.25}, "metric": "accuracy", "split": "train"}
    own = [{**short[0], **own, "seed": seed, "value": 0.5 + 0.1 * seed} for seed in (0, 1, 2)]
    made = contrast.tasks([{**r, "task": "rotation"} for r in base + short + own])
    assert [lines[0][0] for lines in made] == [
        "proxy task", "linear probe, pooled", "nearest neighbours (k = 20), pooled"
    ]  # fmt: skip
    low, high = contrast.interval([18.0, 18.0, 24.0])
    assert made[0][1][:6] == [
        "rotation", "accuracy 0.600 ± 0.100 (3)", "0.25", "30.0 ± 1.0 (3)", "50.0 ± 2.6 (3)", "+20.0"
    ]  # fmt: skip
    assert made[0][1][6:8] == [f"{low:+.1f} to {high:+.1f}", "yes"]
    low, high = contrast.interval([2.0, 3.0, 1.0])
    assert made[1][1] == ["rotation", "60.0 ± 2.6 (3)", "62.0 ± 2.0 (3)", "+2.0", f"{low:+.1f} to {high:+.1f}", "no"]


def test_proxy_tasks_on_other_images_too():
    named = {"proxy": "scratch", "sslpp": "sslpp"}
    base = [{**r, "arm": arm, "task": "rotation"} for arm, of in named.items() for r in rows() if r["arm"] == of]
    base += [{**r, "task": "jigsaw"} for r in base if r["seed"] == 1]
    base += [{**r, "task": "byol"} for r in base if r["arm"] == "proxy" and r["task"] == "rotation"]
    away = {"protocol": "transfer", "data": "clothing@1"}
    other = [
        {**r, **away, "value": r["value"] / 2, "settings": {**r["settings"], "probe": r["protocol"]}}
        for r in base
        if r["task"] == "rotation" and (r["arm"] == "proxy" or r["seed"] != 2)  # a pair is missing
    ]
    head, *lines = contrast.across(base + other, "linear pooled")
    assert head[1:] == [records.data_of(base[0]), "clothing"]
    low, high = contrast.interval([2.0, 3.0, 1.0])
    assert lines == [
        ["rotation", f"60.0 → 62.0 (+2.0; {low:+.1f} to {high:+.1f})", "29.2 → 30.5 (+1.2; two seeds)"],
        ["jigsaw", "59.0 → 62.0 (+3.0)", ""],
    ]  # fmt: skip
    assert contrast.tasks(base + other)[-2:] == [
        contrast.across(base + other, f"{probe} pooled") for probe in ("linear", "knn")
    ]
    assert [lines[0][0] for lines in contrast.tasks(base)] == [
        "proxy task", "linear probe, pooled", "nearest neighbours (k = 20), pooled"
    ]  # fmt: skip
