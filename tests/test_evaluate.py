"""Protocols against plain loops and scikit-learn."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tests.conftest import make_images
from training import backbone as B
from training import evaluate as E
from training import records
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


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_the_linear_probe_does_not_depend_on_the_features_scale(scale):
    rows, labels = data()
    other, truth = data(seed=1)
    own, scaled = linear.fit(rows, labels, 4, 1.0), linear.fit(scale * (rows - 3), labels, 4, 1.0)
    assert torch.allclose(own.weight, scaled.weight, atol=2e-3)
    assert own.top1(other, truth) == pytest.approx(scaled.top1(scale * (other - 3), truth), abs=0.006)


def test_regularisation_is_chosen_on_the_held_out_part():
    rows, labels = data(40)
    held, truth = data(300, seed=2)
    tried = {c: linear.fit(rows, labels, 4, c).top1(held, truth) for c in (1e-4, 1e-2, 1.0)}
    probe, c = linear.fit_best(rows, labels, held, truth, 4, [1.0, 1e-4, 1e-2])
    assert probe.top1(held, truth) == pytest.approx(max(tried.values()), abs=0.01)
    assert tried[c] == pytest.approx(max(tried.values()), abs=0.01)


def test_chance_is_the_best_guess_that_looks_at_no_image():
    assert E.by_chance(torch.tensor([3, 0, 0, 0, 1, 3])) == {"top1": 0.5, "balanced": 0.3333}
    truth = torch.tensor([0, 0, 0, 1])
    always = E.accuracies(torch.zeros(4, dtype=torch.long), truth, balanced=True)
    assert E.by_chance(truth) == always


def test_the_held_out_part_alone_chooses_the_regularisation():
    """Labels that are noise on training features: they are learned by heart with the largest C, which does worst."""
    generator = torch.Generator().manual_seed(0)

    def part(count, noise):
        rows, truth = torch.randn(count, 60, generator=generator), torch.arange(count) % 2
        rows[:, 0] += 2.5 * (2 * truth - 1)
        flipped = torch.rand(count, generator=generator) < noise
        return rows, torch.where(flipped, 1 - truth, truth)

    parts = {"train": part(80, 0.25), "val": part(400, 0.0), "test": part(400, 0.0)}
    found = {name: {0: rows} for name, (rows, _) in parts.items()}
    labels = {name: truth for name, (_, truth) in parts.items()}
    grid = [0.01, 100.0]
    tried = {c: linear.fit(*parts["train"], 2, c) for c in grid}
    assert tried[100.0].top1(*parts["train"]) == 1.0 > tried[0.01].top1(*parts["train"])
    assert tried[0.01].top1(*parts["val"]) > tried[100.0].top1(*parts["val"]) + 0.05
    rows = E.class_records(found, labels, 2, Evaluate(linear_c=grid, knn_k=[3]), torch.device("cpu"))
    linears = [r for r in rows if r["protocol"] == "linear"]
    assert {r["settings"]["C"] for r in linears} == {0.01}
    assert {r["split"]: r["value"] for r in linears} == {
        name: pytest.approx(tried[0.01].top1(*parts[name]), abs=0.01) for name in ("val", "test")
    }


def test_a_part_of_the_images_is_a_sample_of_them(context, monkeypatch):
    train, test = make_images(80), make_images(60, seed=1)
    asked = []
    real = E.extract
    monkeypatch.setattr(
        E,
        "extract",
        lambda net, images, indices, *more: asked.append((images, indices)) or real(net, images, indices, *more),
    )
    measured(context, train, test, images=30, residue_images=20)
    sizes = {}
    for images, indices in asked:
        pool = images.all if images is test else train.train if not bool(train.held_out[indices].any()) else train.val
        assert len(indices.unique()) == len(indices)
        assert set(indices.tolist()) <= set(pool.tolist())
        if len(indices) < len(pool):
            assert indices.max() >= pool[-len(pool) // 4]  # the first would all lie before
            sizes.setdefault(id(images), set()).add(len(indices))
    assert sizes[id(train)] == {30, 20}
    assert sizes[id(test)] == {10}
    whole = torch.arange(9)
    assert torch.equal(train.sample(whole, 9), whole)
    assert torch.equal(train.sample(whole, 4), train.sample(whole, 4))
    other = dataclasses.replace(train, split_seed=1)
    assert not torch.equal(train.sample(torch.arange(50), 9), other.sample(torch.arange(50), 9))


def test_one_image_is_enough_for_the_residue_to_have_some_of_each_part(context):
    rows = measured(context, make_images(40), make_images(20, seed=1), residue_images=1)
    assert {"val", "test"} <= {r["split"] for r in rows if r["protocol"] == "residue"}


def test_records_come_in_an_order_of_their_own():
    """Not in that of a set of names, which is another in every process."""
    names = ("train", "val", "test")
    rows = {name: {0: torch.randn(12, 3)} for name in names}
    labels = {name: torch.arange(12) % 2 for name in names}
    told = E.class_records(rows, labels, 2, Evaluate(linear_c=[0.1], knn_k=[3]), torch.device("cpu"))
    assert [r["protocol"] + " " + r["split"] for r in told] == [
        f"{protocol} {name}" for name in ("val", "test") for protocol in ("linear", "knn")
    ]


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
    assert rankme.rankme(torch.ones(20, 8)) == pytest.approx(1, rel=0.01)
    values = torch.tensor([4.0, 2.0, 1.0, 1.0])
    share = values / 8
    expected = float(torch.exp(-(share * share.log()).sum()))
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0].float()
    assert rankme.rankme(torch.diag(values) @ rotation) == pytest.approx(expected, rel=1e-4)


def measured(context, train, held, **settings):
    torch.manual_seed(0)
    network = B.create(Model("test_resnet"), 16).eval()
    chosen = Evaluate(**{"linear_c": [0.1], "knn_k": [3, 500], "shots": [], **settings})
    return E.evaluate(network, chosen, E.Over((train, held), Rotation.residue(None)), context)


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
    assert len(told) == len({(r["protocol"], r["split"], r["stage"], r["settings"].get("k")) for r in found})
    assert len(found) == len({records.identity(r) for r in found})
    assert all(0 <= r["value"] <= 1 for r in found if r["metric"] == "top1")


def test_the_test_split_is_left_alone_while_settings_are_chosen(context):
    train, test = make_images(80), make_images(24, seed=1)
    assert {r["split"] for r in measured(context, train, test, test=False)} == {"val"}


def test_one_held_out_image_is_enough_for_what_it_can_tell(context):
    images = make_images(9)
    images.held_out[:] = torch.arange(9) == 0
    network = B.create(Model("test_resnet"), 16)
    rows = E.evaluate(network, Evaluate(linear_c=[1.0]), E.Over((images, None), ()), context)
    assert {row["protocol"] for row in rows} >= {"linear", "knn"}
    assert "label_free" not in {row["protocol"] for row in rows}


def test_without_labels_what_needs_none_is_measured(context):
    found = measured(context, make_images(80, labelled=False), make_images(24, labelled=False))
    assert {r["protocol"] for r in found} == {"residue", "rankme", "label_free"}


def test_images_without_a_label_do_not_count(context):
    train, test = make_images(80), make_images(24, seed=1)
    expected = [r["value"] for r in measured(context, train, test) if r["protocol"] == "knn" and r["split"] == "test"]
    longer = make_images(48, seed=1)
    longer.labels[24:] = -1
    longer.pixels.stacked[:24] = test.pixels.stacked
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


def test_pooled_features_that_are_the_last_stages_are_measured_once_and_told_twice(context, monkeypatch):
    train, test = make_images(80), make_images(24, seed=1)
    plain = measured(context, train, test, shots=[2])
    fitted = []
    real = linear.fit
    monkeypatch.setattr(linear, "fit", lambda *args, **kwargs: fitted.append(1) or real(*args, **kwargs))
    found, once = measured(context, train, test, shots=[2]), len(fitted)
    monkeypatch.setattr(E, "twin_of_pooled", lambda rows: None)
    twice = measured(context, train, test, shots=[2])
    assert len(fitted) - once == once + 2  # the classes' probe and the residue's

    def told(rows):
        return {records.identity(r): r["value"] for r in rows}

    assert told(plain) == told(found) == {key: pytest.approx(value, abs=0.05) for key, value in told(twice).items()}
    other = {"val": {0: torch.ones(4, 3), 1: torch.ones(4, 3), "pooled": torch.ones(4, 3) + 1e-3}}
    monkeypatch.undo()
    assert E.twin_of_pooled(other) is None
    assert E.twin_of_pooled({"val": {0: torch.ones(4, 3), "pooled": torch.ones(4, 5)}}) is None
    assert E.twin_of_pooled({"val": {0: torch.zeros(4, 3), 1: torch.ones(4, 3), "pooled": torch.ones(4, 3)}}) == 1
