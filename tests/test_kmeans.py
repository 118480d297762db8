"""Spherical k-means against plain loops."""

import pytest
import torch
from accelerate import Accelerator

import training.kmeans as K
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


def test_rows_in_half_precision_are_assigned_in_float32():
    x, _ = rows(2000, width=16, groups=20, spread=0.3)
    labels, distances = assign(x.half(), x[:20])
    expected = assign(x.half().float(), x[:20])
    assert torch.equal(labels, expected[0])
    assert torch.equal(distances, expected[1])


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
    monkeypatch.setattr(K, "_seed", lambda rows, k, generator, accelerator: rows[:1].repeat(k, 1))
    run = K.kmeans(x, 5, 0, 50, accelerator)[0]
    labels, _ = assign(x, run.centroids)
    assert run.repaired > 0
    assert len(labels.unique()) == 5


def test_each_empty_cluster_is_given_another_row(accelerator, monkeypatch):
    x = torch.nn.functional.normalize(torch.eye(6) + 0.01, dim=1)
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
    found = 0
    for seed in range(20):
        centroids = K._seed(x, 4, torch.Generator().manual_seed(seed), accelerator)
        groups = {int(truth[(x @ c).argmax()]) for c in centroids}
        found += len(groups) == 4
    assert found >= 18  # drawing at random would find all four groups in 9 % of the seeds


def test_seeds_are_drawn_with_the_probabilities_of_k_means_plus_plus(accelerator):
    x = torch.nn.functional.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(4)), dim=1)
    between = (1 - x @ x.T).double().clamp(min=0).fill_diagonal_(0)
    expected = torch.zeros(5, 5, 5, dtype=torch.float64)
    for one in range(5):
        for two in range(5):
            left = torch.minimum(between[one], between[two])
            first = between[one] / between[one].sum() / 5
            expected[one, two] = first[two] * left / left.sum() if two != one else 0
    found, runs = torch.zeros(5, 5, 5, dtype=torch.float64), 1500
    for seed in range(runs):
        seeds = K._seed(x, 3, torch.Generator().manual_seed(seed), accelerator)
        found[tuple((seeds @ x.T).argmax(1).tolist())] += 1 / runs
    assert (found - expected).abs().max() < 5 * (expected.max() / runs) ** 0.5


def test_centroids_are_fitted_on_a_sample_and_measured_on_all_rows(accelerator, monkeypatch):
    x, _ = rows(4000, width=8, groups=40, spread=0.5)
    whole = kmeans(x, 10, 0, 50, accelerator)[0]
    monkeypatch.setattr(K, "FITTED", 100)
    few = kmeans(x, 10, 0, 50, accelerator)[0]
    assert few.products < whole.products / 2
    assert not torch.equal(few.centroids, whole.centroids)
    labels, distances = assign(x, few.centroids)
    assert torch.equal(few.labels, labels)
    assert few.inertia == pytest.approx(float(distances.mean()), rel=1e-5)
    assert few.inertia == pytest.approx(whole.inertia, rel=0.06)


def test_every_row_may_be_in_the_sample(accelerator):
    x = torch.arange(5.0).view(-1, 1)
    drawn = [K.draw(x, 2, torch.Generator().manual_seed(seed), accelerator)[0] for seed in range(40)]
    assert all(len(some) == 2 for some in drawn)
    assert torch.cat(drawn).unique().tolist() == [0, 1, 2, 3, 4]


def test_looking_at_near_centroids_alone_ends_as_looking_at_all(accelerator, monkeypatch):
    x, _ = rows(3000, width=8, groups=60, spread=0.4)
    plain = kmeans(x, 60, 0, 200, accelerator)[0]
    monkeypatch.setattr(K, "NEAR", 8)
    fast = kmeans(x, 60, 0, 200, accelerator)[0]
    assert fast.products / fast.iterations < plain.products / plain.iterations / 2
    assert fast.inertia == pytest.approx(plain.inertia, rel=0.01)
    labels, _ = assign(x, fast.centroids)
    assert fast.iterations < 200
    for k in range(60):  # and at a fixed point
        mean = x[labels == k].double().mean(0)
        assert torch.allclose(fast.centroids[k].double(), mean / mean.norm(), atol=1e-5)


def test_near_centroids_give_what_all_give_where_the_nearest_is_near():
    x, _ = rows(500, width=8, groups=20, spread=0.3)
    centroids, sums, expected = x[:20], torch.zeros(20, 8), torch.zeros(20, 8)
    labels, distances = assign(x, centroids, expected)
    near = (centroids @ centroids.T).topk(20).indices
    found = K._assign_near(x, centroids, sums, labels.roll(1), near)
    assert torch.equal(found[0], labels)
    assert torch.allclose(found[1], distances, atol=1e-6)
    assert torch.allclose(sums, expected, atol=1e-5)
    few = K._assign_near(x, centroids, sums, labels.roll(1), near[:, :5])
    for row in range(0, 500, 29):
        own = near[labels.roll(1)[row], :5]
        assert few[0][row] == own[(centroids[own] @ x[row]).argmax()]


def test_past_the_mean_is_faster_than_to_it(accelerator, monkeypatch):
    x, _ = rows(4000, width=16, groups=200, spread=0.8)
    fast = kmeans(x, 30, 0, 10, accelerator)[0].inertia
    monkeypatch.setattr(K, "PAST", 0.0)
    assert fast < kmeans(x, 30, 0, 10, accelerator)[0].inertia
