"""Pseudo-labels: whitening, averaging, files, agreement; against plain loops and scikit-learn."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from sklearn.decomposition import PCA
from sklearn.metrics import normalized_mutual_info_score

from tests.conftest import make_images
from training import backbone as B
from training import clusters as C
from training import command, operations
from training.extraction import extract, features, plain_batch
from training.files import Refused
from training.launch import Key
from training.pixels import Pixels
from training.proxies.rotation import Rotation
from training.recipe import Clusters, Model, Views


def network(size=16):
    torch.manual_seed(0)
    return B.create(Model("test_resnet"), size).eval()


NUISANCE = Rotation.nuisance(None)


def make(images, context, folder, views=NUISANCE, **settings):
    folder.mkdir(exist_ok=True)
    chosen = Clusters(**{"k": [3, 5], "whiten": 6, **settings})
    return C.cluster(network(images.size), images, chosen, views, Key(0, "clusters", 1), context, 16, folder)


def test_whitening_is_scikit_learns_pca_up_to_signs():
    rows = torch.randn(200, 10) @ torch.randn(10, 10) + 3
    ours = (rows - C.fit_whitening(rows, 4).mean) @ C.fit_whitening(rows, 4).projection
    theirs = PCA(4, whiten=True).fit_transform(rows.double().numpy())
    assert np.abs(np.abs(ours.numpy()) - np.abs(theirs)).max() < 1e-3
    unit = C.fit_whitening(rows, 4)(rows)
    assert torch.allclose(unit.norm(dim=1), torch.ones(200), atol=1e-5)


def test_whitening_by_a_power_leaves_a_part_of_the_spectrum():
    rows = torch.randn(500, 5) * torch.tensor([16.0, 9, 4, 1, 0.25])
    for power in (0.0, 0.5, 1.0):
        whitening = C.fit_whitening(rows, 5, power)
        found = ((rows - whitening.mean) @ whitening.projection).std(0)
        expected = PCA(5).fit(rows.numpy()).explained_variance_ ** ((1 - power) / 2)
        assert np.allclose(found, expected, rtol=1e-3)


def test_whitening_drops_directions_without_variance_and_serves_equal_rows():
    rows = torch.randn(50, 3) @ torch.randn(3, 8)
    assert C.fit_whitening(rows, 8).projection.shape == (8, 3)
    assert C.fit_whitening(torch.ones(5, 4), 4)(torch.ones(5, 4)).isfinite().all()


@pytest.mark.parametrize("dimensions", [3, 6])
def test_whitening_in_place_is_the_same(monkeypatch, dimensions):
    monkeypatch.setattr(C, "ROWS", 7)
    rows = torch.randn(40, 6) @ torch.randn(6, 6) + 3
    whitening = C.fit_whitening(rows, dimensions)
    expected = whitening(rows)
    found = whitening.replace(rows)
    assert torch.allclose(found, expected, atol=1e-6)
    assert (found.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()) == (dimensions == 6)


def test_without_whitening_only_the_length_changes():
    rows = torch.randn(20, 5) + 2
    assert torch.allclose(C.fit_whitening(rows, 0)(rows), rows / rows.norm(dim=1, keepdim=True), atol=1e-6)


def test_features_are_averaged_over_the_nuisance_views(tiny, context):
    net = network()
    looked_at = torch.arange(len(tiny.all)) % 3 == 0
    mean, (first, last) = C.averaged(net, tiny, tiny.all, 2, NUISANCE, context, 16, looked_at)
    batch = plain_batch(tiny, tiny.all, torch.device("cpu"))
    with torch.no_grad():
        each = []
        for flipped in (False, True):
            for quarter in range(4):
                turned = torch.rot90(batch.flip(3) if flipped else batch, quarter, (2, 3))
                each.append(features(net, turned, [2])[2])
    assert torch.allclose(mean, torch.stack(each).mean(0), atol=1e-5)
    assert torch.allclose(first, each[0][looked_at], atol=1e-5)
    assert torch.allclose(last, each[-1][looked_at], atol=1e-5)


def test_the_leading_stage_is_the_one_where_two_views_of_an_image_find_each_other(tiny, context):
    given = (network(), tiny, tiny.val, context.accelerator, 16, range(5))
    views = [extract(*given, random=(Views(), seed)) for seed in (1, 2)]
    shares = []
    for stage in range(5):
        hits = 0
        for i, row in enumerate(views[0][stage]):
            near = [torch.cosine_similarity(row, other, dim=0) for other in views[1][stage]]
            hits += max(range(len(near)), key=near.__getitem__) == i
        shares.append(hits)
    assert len(set(shares)) > 1
    assert C.leading_stage(network(), tiny, context, 16) == shares.index(max(shares))


def test_averaged_features_do_not_know_the_rotation(tiny, context):
    turned = make_images()
    turned.pixels = Pixels.of(torch.rot90(turned.pixels.stacked, 1, (2, 3)))
    one = C.averaged(network(), tiny, tiny.all, 2, NUISANCE, context, 16)[0]
    other = C.averaged(network(), turned, turned.all, 2, NUISANCE, context, 16)[0]
    assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], ["nuisance", "familiar", "familiar"]),
        (["--clusters.average", "nuisance"], ["nuisance"] * 3),
        (["--clusters.average", "none"], ["none"] * 3),
        (["--proxy.epochs", "0"], ["nuisance", "familiar", "familiar"]),  # an untrained network is no other's
        (["--model.pretrained", "true"], ["nuisance", "familiar", "familiar"]),
        (["--model.pretrained", "true", "--proxy.epochs", "0"], ["familiar"] * 3),
    ],
)
def test_what_a_round_averages_over(changes, expected):
    made = command.parse(["--data.path", "digits", *changes])
    assert [C.averaging(made, number) for number in (1, 2, 3)] == expected
    kinds = {kind: C.views_called(kind, made.proxy) for kind in expected}
    assert all(len(views) == {"nuisance": 8, "familiar": 6, "none": 1}[kind] for kind, views in kinds.items())


def test_files_tell_every_images_label_and_distance(tiny, context, tmp_path):
    tiny.pixels.heights[[3, 10]] = 0
    report = make(tiny, context, tmp_path / "round_1")
    table = pq.read_table(tmp_path / "round_1" / "labels.parquet")
    assert table.column_names == ["index", "path", "label_3", "distance_3", "label_5", "distance_5"]
    assert table["index"].to_pylist() == list(range(len(tiny)))
    assert table["path"].to_pylist() == tiny.paths
    assert [i for i, v in enumerate(table["label_3"].to_pylist()) if v is None] == [3, 10]
    labels, k = C.read_labels(tmp_path / "round_1" / "labels.parquet")
    assert (labels.shape, k) == ((len(tiny), 2), [3, 5])
    assert labels[[3, 10]].tolist() == [[-1, -1], [-1, -1]]
    known = labels[tiny.train]
    assert report["3"]["sizes"] == np.bincount(known[:, 0], minlength=3).tolist()
    assert json.dumps(report)
    classes = C.against_classes(tmp_path / "round_1" / "labels.parquet", tiny)
    for k, told in report.items():
        told |= classes[k]
        assert {"inertia", "agreement_of_seeds", "agreement_of_views", "nmi", "purity", "repaired"} <= told.keys()
        assert all(0 <= told[name] <= 1 for name in ("agreement_of_seeds", "agreement_of_views", "nmi", "purity"))


def test_a_clustering_assigns_the_same_labels_again(tiny, context, tmp_path):
    make(tiny, context, tmp_path / "round_1")
    earlier = C.Clustered(tmp_path / "round_1")
    again = earlier(C.averaged(network(), tiny, tiny.all, 3, NUISANCE, context, 16)[0])
    labels, _ = C.read_labels(tmp_path / "round_1" / "labels.parquet")
    assert torch.equal(again["label_3"], labels[:, 0])
    assert torch.equal(again["label_5"], labels[:, 1])
    with pytest.raises(Refused, match=r"clusters\.safetensors"):
        C.Clustered(tmp_path)


def test_budget_counts_a_third_of_each_forward_pass(tiny, context, tmp_path):
    make(tiny, context, tmp_path / "a")
    assert context.budget["images"] == pytest.approx(len(tiny) * 8 / 3)
    assert context.budget["flops"] > len(tiny) * 8 * operations.forward_flops(network(), 16)
    context.budget = {"images": 0.0, "flops": 0.0, "seconds": 0.0}
    make(tiny, context, tmp_path / "b", views=NUISANCE[:1])
    assert context.budget["images"] == pytest.approx(len(tiny) / 3)


def test_purity_and_agreement_against_plain_counts():
    labels, classes = np.array([0, 0, 0, 1, 1, 2]), np.array([1, 1, 0, 0, 0, 1])
    assert C.purity(labels, classes) == pytest.approx(5 / 6)
    assert C.nmi(labels, labels) == pytest.approx(1)


def test_images_without_labels_tell_no_purity(context, tmp_path):
    report = make(make_images(labelled=False), context, tmp_path / "a")
    assert "purity" not in report["3"]


def test_true_labels_leave_the_held_out_part_out(tiny, context, tmp_path):
    C.from_classes(tiny, context, tmp_path)
    labels, k = C.read_labels(tmp_path / "labels.parquet")
    assert k == [4]
    assert torch.equal(labels[tiny.train, 0], tiny.labels[tiny.train])
    assert (labels[tiny.val] == -1).all()


def test_more_clusters_than_images_and_labels_that_are_not_there_are_refused(tiny):
    with pytest.raises(Refused, match=r"clusters\.k: 99"):
        C.check(Clusters(k=[3, 99]), tiny)
    with pytest.raises(Refused, match=r"clusters\.source"):
        C.check(Clusters(source="labels"), make_images(labelled=False))


def test_held_out_images_are_assigned_and_never_fitted(tiny, context, tmp_path):
    make(tiny, context, tmp_path / "a")
    changed = make_images()
    noise = torch.rand(changed.pixels.stacked.shape, generator=torch.Generator().manual_seed(5))
    changed.pixels.stacked[changed.val] = (255 * noise).byte()[changed.val]
    make(changed, context, tmp_path / "b")
    one, other = (load_file(tmp_path / name / "clusters.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    labels, _ = C.read_labels(tmp_path / "b" / "labels.parquet")
    assert (labels[changed.val] >= 0).all()


def test_classes_are_compared_on_training_images_alone(tiny, context, tmp_path):
    make(tiny, context, tmp_path / "a")
    path = tmp_path / "a" / "labels.parquet"
    told = C.against_classes(path, tiny)
    column = C.read_labels(path)[0][tiny.train, 0].numpy()
    assert told["3"]["nmi"] == pytest.approx(normalized_mutual_info_score(column, tiny.labels[tiny.train].numpy()))
    tiny.labels[tiny.val] = 0
    assert C.against_classes(path, tiny) == told


def test_distances_are_one_minus_the_cosine_to_the_own_centroid(tiny, context, tmp_path):
    make(tiny, context, tmp_path / "a")
    saved = load_file(tmp_path / "a" / "clusters.safetensors")
    found = C.averaged(network(), tiny, tiny.all, 3, NUISANCE, context, 16)[0]
    rows = C.Whitening(saved["mean"], saved["projection"])(found)
    table = pq.read_table(tmp_path / "a" / "labels.parquet")
    for row, label, distance in zip(rows, *(table[n].to_pylist() for n in ("label_5", "distance_5")), strict=True):
        assert distance == pytest.approx(1 - float(row @ saved["centroids_5"][label]), abs=1e-5)


def test_agreements_compare_two_runs_and_two_views(context, tmp_path, monkeypatch):
    images = make_images(120, seed=3)
    noise = torch.rand(images.pixels.stacked.shape, generator=torch.Generator().manual_seed(4))
    images.pixels.stacked.copy_((255 * noise).byte())
    made = []
    real = C.kmeans
    monkeypatch.setattr(C, "kmeans", lambda *args: made.append(real(*args)) or made[-1])
    told = make(images, context, tmp_path / "a", k=[8])["8"]
    saved = load_file(tmp_path / "a" / "clusters.safetensors")
    whiten = C.Whitening(saved["mean"], saved["projection"])
    every = torch.ones(len(images.train), dtype=torch.bool)
    mean, (first, last) = C.averaged(network(), images, images.train, 3, NUISANCE, context, 16, every)
    mean, first, last = whiten(mean), whiten(first), whiten(last)
    best, second = (run.centroids for run in made[0][:2])

    def labels(rows, centroids):
        return [max(range(8), key=lambda k: float(row @ centroids[k])) for row in rows]

    seeds = normalized_mutual_info_score(labels(mean, best), labels(mean, second))
    views = normalized_mutual_info_score(labels(first, best), labels(last, best))
    assert told["agreement_of_seeds"] == pytest.approx(seeds)
    assert told["agreement_of_views"] == pytest.approx(views)
    assert seeds < 0.99 > views


def test_the_farthest_of_each_cluster_are_dropped(tmp_path):
    distances = np.array([0.1, 0.5, 0.3, 0.9, 0.2, 0.4, 0.8, 0.6, 0.7, 0.05], np.float32)
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1], np.int32)
    pq.write_table(pa.table({"label_2": labels, "distance_2": distances}), tmp_path / "labels.parquet")
    kept, _ = C.read_labels(tmp_path / "labels.parquet", drop=0.5)
    assert kept[:, 0].tolist() == [0, -1, 0, -1, 1, 1, -1, -1, -1, 1]
    assert C.read_labels(tmp_path / "labels.parquet")[0][:, 0].tolist() == labels.tolist()
