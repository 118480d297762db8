"""Protocols against plain loops and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tests.conftest import make_images
from training import backbone as B
from training import evaluate as E
from training.evaluate import knn, linear, rankme
from training.files import Failed
from training.proxies.rotation import Rotation
from training.recipe import Evaluate, Model


def data(count=400, width=12, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(width, classes, generator=torch.Generator().manual_seed(9))
    rows = torch.randn(count, width, generator=generator) * torch.linspace(0.1, 5, width) + 3
    noise = 2 * torch.randn(count, classes, generator=generator)
    return rows, ((rows - 3) @ weight + noise).argmax(1)


@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_the_linear_probe_is_scikit_learns_logistic_regression(c):
    rows, labels = data()
    probe = linear.fit(rows, labels, 4, c)
    standard = ((rows - rows.mean(0)) / rows.std(0, unbiased=False)).numpy()
    theirs = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(standard, labels.numpy())
    assert np.abs(probe.weight.T.numpy() - theirs.coef_).max() < 2e-3 * max(1, np.abs(theirs.coef_).max())
    other, truth = data(seed=1)
    expected = (theirs.predict(((other - rows.mean(0)) / rows.std(0, unbiased=False)).numpy()) == truth.numpy()).mean()
    assert probe.top1(other, truth) == pytest.approx(expected, abs=0.006)


def test_regularisation_is_chosen_on_the_held_out_part():
    rows, labels = data(40)
    held, truth = data(300, seed=2)
    tried = {c: linear.fit(rows, labels, 4, c).top1(held, truth) for c in (1e-4, 1e-2, 1.0)}
    probe, c = linear.fit_best(rows, labels, held, truth, 4, [1.0, 1e-4, 1e-2])
    assert probe.top1(held, truth) == pytest.approx(max(tried.values()), abs=0.01)
    assert tried[c] == pytest.approx(max(tried.values()), abs=0.01)


def test_constant_features_are_served():
    rows, labels = data()
    rows[:, 0] = 5.0
    assert linear.fit(rows, labels, 4, 1.0)(rows).isfinite().all()


def test_neighbours_vote_as_in_a_plain_loop():
    bank, labels = data(60)
    queries, _ = data(20, seed=1)
    got = knn.classify(bank, labels, queries, 4, [5, 60], 0.07)
    for k in (5, 60):
        for number, query in enumerate(queries):
            cosines = [
                (float(torch.cosine_similarity(query.double(), b.double(), 0)), int(y))
                for b, y in zip(bank, labels, strict=True)
            ]
            votes = [0.0] * 4
            for cosine, label in sorted(cosines, reverse=True)[:k]:
                votes[label] += np.exp(cosine / 0.07)
            assert int(got[k][number]) == int(np.argmax(votes))


def test_rankme_of_known_spectra():
    assert rankme.rankme(torch.eye(8)) == pytest.approx(8, rel=1e-4)
    assert rankme.rankme(torch.ones(20, 8)) == pytest.approx(1, rel=1e-3)
    values = torch.tensor([4.0, 2.0, 1.0, 1.0])
    share = values / 8
    expected = float(torch.exp(-(share * share.log()).sum()))
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0].float()
    assert rankme.rankme(torch.diag(values) @ rotation) == pytest.approx(expected, rel=1e-4)


def measured(context, train, held, **settings):
    torch.manual_seed(0)
    network = B.create(Model("test_resnet"), 16).eval()
    chosen = Evaluate(**{"linear_c": [0.1], "knn_k": [3, 500], **settings})
    return E.evaluate(network, chosen, train, held, Rotation.residue, context)


def test_every_protocol_is_measured_at_every_stage_and_split(context):
    train, test = make_images(80), make_images(24, seed=1)
    found = measured(context, train, test)
    told = {(r["protocol"], r["split"], r["stage"], r["settings"].get("k")) for r in found}
    for stage in (*range(5), "pooled"):
        for split in ("val", "test"):
            assert ("linear", split, stage, None) in told
            assert ("knn", split, stage, 3) in told
            assert ("knn", split, stage, len(train.train)) in told  # k is at most the images
            assert ("residue", split, stage, None) in told
            assert ("rankme", split, stage, None) in told
    assert len(told) == len(found)
    assert all(0 <= r["value"] <= 1 for r in found if r["metric"] == "top1")


def test_the_test_split_is_left_alone_while_settings_are_chosen(context):
    train, test = make_images(80), make_images(24, seed=1)
    assert {r["split"] for r in measured(context, train, test, test=False)} == {"val"}


def test_without_labels_what_needs_none_is_measured(context):
    found = measured(context, make_images(80, labelled=False), make_images(24, labelled=False))
    assert {r["protocol"] for r in found} == {"residue", "rankme"}


def test_images_without_a_label_do_not_count(context):
    train, test = make_images(80), make_images(24, seed=1)
    expected = [r["value"] for r in measured(context, train, test) if r["protocol"] == "knn" and r["split"] == "test"]
    longer = make_images(48, seed=1)
    longer.labels[24:] = -1
    longer.pixels[:24] = test.pixels
    longer.labels[:24] = test.labels
    found = [r["value"] for r in measured(context, train, longer) if r["protocol"] == "knn" and r["split"] == "test"]
    assert found == pytest.approx(expected)


def test_a_wrong_answer_lowers_the_figure(context):
    train, test = make_images(80), make_images(24, seed=1)
    good = measured(context, train, test)
    test.labels = (test.labels + 1) % 4
    bad = measured(context, train, test)

    def pooled(found):
        return next(
            r["value"] for r in found if (r["protocol"], r["split"], r["stage"]) == ("linear", "test", "pooled")
        )

    assert pooled(good) > 0.9
    assert pooled(bad) < 0.2


def test_probes_take_features_of_any_size_and_refuse_what_is_not_finite():
    rows, labels = torch.randn(60, 4), torch.arange(60) % 3
    plain = linear.fit(rows, labels, 3, 0.1)
    huge = linear.fit(rows * 2.0**100, labels, 3, 0.1)
    assert torch.allclose(plain(rows), huge(rows * 2.0**100), atol=1e-4)
    rows[7, 2] = float("inf")
    with pytest.raises(Failed, match="features are not finite"):
        linear.fit(rows, labels, 3, 0.1)
