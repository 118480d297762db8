"""How long training takes: what is counted once, and that it is told before it begins."""

import pytest

from tests.conftest import make_images
from tests.test_arms import COUNTS, method
from training import arms as A
from training import backbone as B
from training import costs
from training.recipe import Evaluate, Model


def test_a_proxy_phase_that_arms_share_counts_once():
    recipes = []
    for seed in (0, 1):
        for arm in ("random", "proxy_short", "proxy", "scratch", "keep_high", "sslpp"):
            recipes.append(A.build(arm, method(), COUNTS))
            recipes[-1].seed = seed
    base = method()
    short, relearned = A.images_of(base.proxy, COUNTS), A.images_of(base.relearn, COUNTS)
    whole = A.images_of(A.build("proxy", base, COUNTS).proxy, COUNTS)
    assert costs.trained(recipes, COUNTS) == 2 * (short + whole + 3 * relearned)


def test_evaluation_counts_each_image_and_those_of_the_residue_in_every_turn():
    train, test = make_images(count=60), make_images(count=20)
    recipe = method()
    recipe.evaluate = Evaluate(images=40, residue_images=10)
    parts = [min(40, len(train.train)), min(40, len(train.val)), len(test.all)]
    assert len(train.val) > 0
    turned = 3 * sum(min(part, 10) for part in parts)  # rotation's three other turns
    assert costs.evaluated(recipe, (train, test)) == pytest.approx((sum(parts) + turned) / 3)
    recipe.evaluate.test = False
    assert costs.evaluated(recipe, (train, test)) < (sum(parts) + turned) / 3


def test_trying_how_long_a_view_takes_leaves_the_network_as_it_was(context):
    network = B.create(Model("test_resnet"), 16)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = costs.seconds_of_view(network, make_images(count=20), [method().relearn], context.accelerator)
    assert found > 0
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(("seconds", "said"), [(0.2, "1 s"), (89, "89 s"), (100, "2 min"), (9000, "2.5 h")])
def test_times_are_said_as_people_say_them(seconds, said):
    assert costs.duration(seconds) == said
