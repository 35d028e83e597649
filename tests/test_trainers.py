"""The page "IVON in your trainer": what needs Flax alone; clients have their own."""

import jax
import numpy as np
import pytest
import recipes

PAGE = "trainers.md"
pytestmark = pytest.mark.usefixtures("standard_promotion", "implicit_ranks")


def least_squares(namespace):
    x, y = np.asarray(namespace["inputs"]), np.asarray(namespace["labels"])
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    return np.linalg.lstsq(x, y, rcond=None)[0]


@pytest.mark.parametrize("section", ["Plain loop", "NNX Optimizer"])
def test_a_recipe_finds_the_weights(section):
    """Within a few of the posterior's standard deviations, about 0.1 each."""
    namespace = recipes.run(PAGE, section)
    mean = namespace["posterior"].mean
    found = np.concatenate([np.ravel(x) for x in jax.tree.leaves(mean)])
    wanted = least_squares(namespace)
    np.testing.assert_allclose(np.sort(found), np.sort(wanted), atol=0.5)


def test_both_linen_recipes_train():
    namespace = recipes.run(PAGE, "Linen TrainState")
    assert namespace["loss"] < 1.0
    assert namespace["state"].step == 50
    stats = jax.tree.leaves(namespace["state"].batch_stats)
    assert any(np.any(x != 0) for x in stats)


def test_every_trainer_of_the_table_has_a_section():
    text = (recipes.ROOT / "docs" / PAGE).read_text()
    for name in recipes.blocks(PAGE):
        anchor = name.lower().replace(" ", "-")
        if name and f"(#{anchor})" not in text:
            assert name in {
                "Trainers that drop the optimizer's state",
                "What cannot work",
            }
