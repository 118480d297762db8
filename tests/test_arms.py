"""Arms: what each changes, and that all see equally many images."""

import dataclasses
import functools

import pytest

from training import arms as A
from training import command
from training.loop import steps_of
from training.recipe import Proxy

COUNTS = A.Counts(training=1000, usable=1100, seen=lambda proxy: 1.0, other="rotation")


@functools.cache  # arms are built from copies
def method(**changes):
    arguments = ["--data.path", "digits", "--proxy.epochs", "5", "--relearn.epochs", "7", "--clusters.k", "[30,100,10]"]
    arguments += ["--relearn.reinit", "high"]
    arguments += ["--proxy.batch_size", "64", "--relearn.batch_size", "48", "--relearn.ema", "0.99"]
    for name, value in changes.items():
        arguments += [f"--{name.replace('__', '.')}", str(value)]
    return command.parse(arguments)


def seen(made):
    """Images as the loop will count them, by its own step counts."""
    total = steps_of(made.proxy, COUNTS.training)[1] * made.proxy.batch_size if made.proxy.epochs else 0
    views = {"nuisance": 8, "familiar": 6, "none": 1}
    for number in range(1, made.relearn.rounds + 1):
        total += steps_of(made.relearn, COUNTS.training)[1] * made.relearn.batch_size
        if made.clusters.source != "labels":
            auto = "nuisance" if number == 1 else "familiar"
            total += COUNTS.usable * views[auto if made.clusters.average == "auto" else made.clusters.average] / 3
    return total


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("average", ["auto", "none"])
@pytest.mark.parametrize("arm", [arm for arm in A.ARMS if arm not in A.UNTUNED])
def test_every_arm_sees_the_same_images_to_within_a_batch(arm, average, rounds):
    base = method(relearn__rounds=rounds, clusters__average=average)
    made = A.build(arm, base, COUNTS)
    batch = max(made.proxy.batch_size, made.relearn.batch_size)
    assert abs(seen(made) - A.budget(base, COUNTS)) <= batch
    assert abs(seen(base) - A.budget(base, COUNTS)) < 1


def test_an_arm_leaves_the_method_as_it_was():
    base = method()
    before = dataclasses.asdict(base)
    for arm in A.ARMS:
        A.build(arm, base, COUNTS, lr=4.0)
    assert dataclasses.asdict(base) == before


def changed(arm, **options):
    base = method()
    made = A.build(arm, base, COUNTS, **options)
    one, other = dataclasses.asdict(base), dataclasses.asdict(made)
    return {
        f"{part}.{name}": value
        for part in ("model", "data", "proxy", "clusters", "relearn", "evaluate")
        for name, value in other[part].items()
        if one[part][name] != value
    }


def test_what_the_arms_change():
    assert changed("sslpp") == {}
    assert changed("keep_high") == {"relearn.reinit": "none"}
    assert changed("random_features") == {"clusters.source": "random"}
    assert changed("scratch") == {"relearn.reinit": "all", "relearn.settle": 0.0}
    assert changed("finetune_all") == {"relearn.reinit": "none", "relearn.split": -1}
    assert changed("random") == {"proxy.epochs": 0.0, "relearn.rounds": 0}
    assert changed("proxy_short") == {"relearn.rounds": 0}
    assert set(changed("proxy")) == {"proxy.epochs", "relearn.rounds"}
    fit = changed("clusterfit")
    assert fit.pop("relearn.epochs") > 7
    assert fit == {
        "clusters.stage": -1, "clusters.whiten": 0, "clusters.average": "none", "clusters.k": [30],
        "relearn.reinit": "all", "relearn.settle": 0.0, "relearn.mlp_layers": 0, "relearn.ema": 0.0,
    }  # fmt: skip
    assert changed("supervised")["clusters.source"] == "labels"


def test_a_learning_rate_is_that_of_the_arms_own_phase():
    assert changed("sslpp", lr=0.25) == {"relearn.lr": pytest.approx(0.025)}
    assert changed("proxy", lr=4.0)["proxy.lr"] == pytest.approx(0.4)
    assert changed("proxy_short", lr=4.0) == {"relearn.rounds": 0}


def test_variants_of_the_proxy_take_phase_3s_views_and_head():
    assert set(changed("proxy", variant="strong views")) == {"proxy.epochs", "relearn.rounds", "proxy.views"}
    assert set(changed("proxy", variant="mlp")) == {"proxy.epochs", "relearn.rounds", "proxy.mlp_layers", "proxy.ema"}
    assert set(A.PROXY_VARIANTS) == {"strong views", "mlp", "strong views, mlp"}


def test_a_task_without_pooled_features_is_not_tried_with_an_mlp():
    assert A.variants(Proxy(name="rotation")) == list(A.PROXY_VARIANTS)
    assert A.variants(Proxy(name="simmim")) == ["strong views"]


def test_every_layer_that_starts_anew_has_the_whole_rate():
    for arm in A.ARMS:
        made = A.build(arm, method(relearn__low_lr="0.1"), COUNTS)
        assert made.relearn.low_lr == (1.0 if made.relearn.reinit == "all" or arm == "finetune_all" else 0.1), arm


def test_random_is_untrained_even_where_the_others_start_from_weights():
    base = method(model__pretrained="true", proxy__epochs="0")
    assert not A.build("random", base, COUNTS).model.pretrained
    assert A.build("sslpp", base, COUNTS).model.pretrained


def test_an_arm_that_a_recipe_is_already_repeats_it():
    def repeated(**changes):
        return {arm for arm in A.ARMS if A.repeats(arm, method(**changes), COUNTS)}

    assert repeated() == set()
    assert repeated(relearn__reinit="none") == {"keep_high"}
    assert repeated(relearn__reinit="none", relearn__split="-1") == {"keep_high", "finetune_all"}


def test_no_arm_keeps_a_share_of_what_does_not_start_anew():
    for arm in A.ARMS:
        command.check(A.build(arm, method(relearn__keep="0.5"), COUNTS))


def test_no_arm_keeps_statistics_where_it_starts_anew():
    lent = {"model__pretrained": "true", "proxy__norm": "stored", "relearn__norm": "stored", "relearn__reinit": "none"}
    for arm in A.ARMS:
        made = A.build(arm, method(**lent), COUNTS)
        command.check(made)
        assert made.relearn.norm == ("batch" if made.relearn.reinit == "all" else "stored")
        assert made.proxy.norm == "stored"
