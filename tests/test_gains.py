"""What a run gained or lost, in sentences."""

from tests.test_report import a_run, record
from training import gains, report


def test_the_gain_is_the_difference_of_the_records_and_tells_the_budgets():
    text = gains.gain(a_run(), "sslpp")
    assert "linear 50.0 -> 70.0 (+20.0)" in text
    assert "nearest neighbours 40.0 -> 60.0 (+20.0)" in text
    assert "residue 80.0 -> 60.0 (-20.0)" in text
    assert "1,000 images" in text
    assert "3,000" in text
    assert gains.gain([], "sslpp") == "There is nothing to compare yet."


def test_where_nothing_was_relearned_the_gain_is_over_the_untrained_network():
    rows = [record("random", "pooled", 0.3), record("proxy_short", "pooled", 0.5)]
    text = gains.gain(rows, "proxy_short")
    assert text.startswith("proxy_short over the untrained network, pooled features, on the test split, seed 0: linear")
    assert "linear 30.0 -> 50.0 (+20.0). It had seen 1,000 images." in text
    (_, *lines), *_ = report.run_tables(rows, "proxy_short")[1]
    assert [line[0] for line in lines] == ["random", "proxy_short"]


def judged(before, after, protocol, metric="top1", **settings):
    rows = [record(arm, "pooled", 0.5, split="test", number=n) for arm, n in (("proxy_short", 0), ("sslpp", 1))]
    for arm, value, number in (("proxy_short", before, 0), ("sslpp", after, 1)):
        rows.append({**record(arm, "pooled", value, protocol, "val", number, **settings), "metric": metric})
    return rows


def test_a_backbone_that_relearning_made_worse_is_told_and_which_one_is_kept():
    linear, knn = judged(0.6, 0.5, "linear"), judged(0.4, 0.45, "knn", k=20) + judged(0.4, 0.1, "knn", k=200)
    text = gains.worse(linear + knn, "sslpp", "better")
    assert "linear 60.0 -> 50.0, nearest neighbours 40.0 -> 45.0" in text
    assert "holds the backbone that relearning started from" in text
    assert "holds the relearned one all the same" in gains.worse(linear + knn, "sslpp", "always")
    assert gains.worse(judged(0.6, 0.6, "linear") + knn, "sslpp", "better") is None
    assert gains.worse([], "sslpp", "better") is None


def test_a_loss_tells_what_chance_alone_would_move():
    rows = [{**row, "count": 56} for row in judged(0.6, 0.5, "linear")]
    text = gains.worse(rows, "sslpp", "better")
    # Two standard errors of the difference of two shares of 56.
    assert "of 56 images, where chance alone moves such a difference by up to 18.7 points" in text
    assert "chance" not in gains.worse(judged(0.6, 0.5, "linear"), "sslpp", "better")


def test_an_untrained_network_that_does_better_is_told():
    untrained = record("random", "pooled", 0.55, "linear", "val")
    (told,) = gains.cautions([*judged(0.5, 0.53, "linear"), untrained], "sslpp", "better")
    assert told.startswith("The untrained network does better than what became of it (linear 55.0 -> 53.0)")
    (told,) = gains.cautions([*judged(0.5, 0.4, "linear"), untrained], "sslpp", "better")
    assert "(linear 50.0 -> 40.0)" in told
    assert "(linear 55.0 -> 50.0)" in told  # hub/ holds what relearning started from
    assert gains.cautions([*judged(0.5, 0.6, "linear"), untrained], "sslpp", "better") == []


def test_without_labels_scores_lead_that_need_none():
    rows = [row for row in judged(0.7, 0.3, "label_free", "retrieval") if row["protocol"] == "label_free"]
    rows += [record(arm, "pooled", 0.9, "residue", "val", n) for arm, n in (("proxy_short", 0), ("sslpp", 1))]
    text = gains.gain(rows, "sslpp")
    assert "on the held-out part of train" in text
    assert text.index("retrieval 70.0 -> 30.0 (-40.0)") < text.index("residue 90.0 -> 90.0")
    assert "retrieval 70.0 -> 30.0" in gains.worse(rows, "sslpp", "better")
    labelled = rows + judged(0.6, 0.7, "linear")
    assert "retrieval" not in gains.gain(labelled, "sslpp")
    assert gains.worse(labelled, "sslpp", "better") is None
