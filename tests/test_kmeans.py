"""Spherical k-means against plain loops."""

import pytest
import torch
from accelerate import Accelerator

from training.kmeans import assign, kmeans


def rows(count=300, width=6, groups=5, spread=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(groups, width, generator=generator), dim=1)
    labels = torch.arange(count) % groups
    noisy = centres[labels] + spread * torch.randn(count, width, generator=generator)
    return torch.nn.functional.normalize(noisy, dim=1), labels


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def test_assignment_is_the_nearest_centroid_by_cosine():
    x, _ = rows()
    centroids = x[:7]
    labels, distances = assign(x, centroids)
    for i in range(0, len(x), 17):
        cosines = [float((x[i].double() * c.double()).sum()) for c in centroids]
        assert cosines[labels[i]] == pytest.approx(max(cosines), abs=1e-6)
        assert float(distances[i]) == pytest.approx(1 - max(cosines), abs=1e-5)


def test_well_separated_groups_are_found(accelerator):
    x, truth = rows()
    best = kmeans(x, 5, 0, 50, accelerator, restarts=3)[0]
    labels, _ = assign(x, best.centroids)
    for group in range(5):
        assert len(labels[truth == group].unique()) == 1
    assert len(labels.unique()) == 5


def test_the_result_is_a_fixed_point_and_inertia_is_its_mean_distance(accelerator):
    x, _ = rows(spread=0.6)
    best = kmeans(x, 8, 0, 200, accelerator)[0]
    labels, distances = assign(x, best.centroids)
    assert best.iterations < 200
    assert best.inertia == pytest.approx(float(distances.mean()), rel=1e-5)
    for k in range(8):
        mean = x[labels == k].double().mean(0)
        assert torch.allclose(best.centroids[k].double(), mean / mean.norm(), atol=1e-5)


def test_restarts_come_best_first_and_repeat_by_seed(accelerator):
    x, _ = rows(spread=0.8)
    runs = kmeans(x, 10, 3, 50, accelerator, restarts=4)
    assert [run.inertia for run in runs] == sorted(run.inertia for run in runs)
    again = kmeans(x, 10, 3, 50, accelerator, restarts=4)
    assert torch.equal(runs[0].centroids, again[0].centroids)
    assert len({run.inertia for run in runs}) > 1


def test_empty_clusters_are_repaired(accelerator, monkeypatch):
    x, _ = rows()  # all five centroids begin on one row, so that four are empty
    import training.kmeans as K

    monkeypatch.setattr(K, "_seed", lambda rows, k, generator, accelerator: rows[:1].repeat(k, 1))
    run = K.kmeans(x, 5, 0, 50, accelerator)[0]
    labels, _ = assign(x, run.centroids)
    assert run.repaired > 0
    assert len(labels.unique()) == 5


def test_each_empty_cluster_is_given_another_row(accelerator, monkeypatch):
    x = torch.nn.functional.normalize(torch.eye(6) + 0.01, dim=1)
    import training.kmeans as K

    monkeypatch.setattr(K, "_seed", lambda rows, k, generator, accelerator: rows[:1].repeat(k, 1))
    run = K.kmeans(x, 4, 0, 1, accelerator)[0]
    assert run.repaired == 3
    assert len({tuple(c.tolist()) for c in run.centroids}) == 4


def test_as_many_clusters_as_rows_and_equal_rows_are_served(accelerator):
    x, _ = rows(12, spread=0.5)
    assert kmeans(x, 12, 0, 50, accelerator)[0].inertia == pytest.approx(0, abs=1e-5)
    same = torch.ones(10, 4) / 2
    run = kmeans(same, 3, 0, 50, accelerator)[0]
    assert run.centroids.isfinite().all()
    assert run.inertia == pytest.approx(0, abs=1e-6)


def test_seeding_prefers_rows_that_are_far_from_the_centroids(accelerator):
    x, truth = rows(groups=4, spread=0.01)
    from training.kmeans import _seed

    found = 0
    for seed in range(20):
        centroids = _seed(x, 4, torch.Generator().manual_seed(seed), accelerator)
        groups = {int(truth[(x @ c).argmax()]) for c in centroids}
        found += len(groups) == 4
    assert found >= 18  # drawing at random would find all four groups in 9 % of the seeds
