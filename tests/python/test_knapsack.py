"""The knapsack against every choice there is, and against the linear relaxation where there are too many."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phiquant import PhiquantError, knapsack

OPTION = st.tuples(st.integers(0, 60), st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 3.0, 1e-3]) | st.floats(0, 10))
GROUPS = st.lists(st.lists(OPTION, min_size=1, max_size=5), min_size=1, max_size=5)


def every_choice(groups):
    for options in itertools.product(*(range(len(group)) for group in groups)):
        taken = [group[i] for group, i in zip(groups, options, strict=True)]
        yield sum(size for size, _ in taken), math.fsum(loss for _, loss in taken)


@settings(max_examples=300, deadline=None)
@given(GROUPS, st.integers(0, 300))
def test_it_finds_what_trying_everything_finds(groups, capacity):
    fitting = [(loss, size) for size, loss in every_choice(groups) if size <= capacity]
    if not fitting:
        smallest = min(size for size, _ in every_choice(groups))
        with pytest.raises(PhiquantError, match=f"the smallest takes {smallest}"):
            knapsack.solve(groups, capacity)
        return
    found = knapsack.solve(groups, capacity)
    assert found.loss == pytest.approx(min(fitting)[0], rel=1e-12, abs=1e-15)
    taken = [group[i] for group, i in zip(groups, found.options, strict=True)]
    assert found.bytes == sum(size for size, _ in taken) <= capacity
    assert found.loss == pytest.approx(math.fsum(loss for _, loss in taken), rel=1e-12, abs=1e-15)


@settings(max_examples=100, deadline=None)
@given(GROUPS)
def test_the_hull_holds_the_best_choices_of_their_sizes(groups):
    hull = knapsack.hull(groups)
    for point in hull:
        best = min(loss for size, loss in every_choice(groups) if size <= point.bytes)
        assert point.loss == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert hull[0].bytes == min(size for size, _ in every_choice(groups))
    assert hull[-1].loss == pytest.approx(min(loss for _, loss in every_choice(groups)), abs=1e-12)
    slopes = [(b.loss - a.loss) / (b.bytes - a.bytes) for a, b in itertools.pairwise(hull) if b.bytes > a.bytes]
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(slopes))


def model_of(layers: int, seed: int) -> list[list[tuple[int, float]]]:
    """Groups like those of a model of billions of weights: losses that fall by about four for each bit."""
    generator, groups = np.random.default_rng(seed), []
    for _ in range(layers):
        for rows, columns in ((9216, 3072), (3072, 3072), (16384, 3072), (3072, 8192)):
            scale = math.exp(generator.normal()) * rows * columns * 1e-9
            sizes = [rows * columns // 256 * block for block in (84, 110, 144, 176, 210, 272)]
            losses = scale * np.array([1, 0.3, 0.07, 0.02, 0.005, 0.0005]) * np.exp(0.1 * generator.normal(size=6))
            groups.append(list(zip(sizes, losses.tolist(), strict=True)))
    return groups


@pytest.mark.parametrize("share", [0.05, 0.37, 0.9])
def test_a_real_model_is_solved_within_one_option_of_the_relaxation(share):
    groups = model_of(32, 0)
    hull = knapsack.hull(groups)
    capacity = int(hull[0].bytes + share * (hull[-1].bytes - hull[0].bytes))
    began = time.process_time()
    found = knapsack.solve(groups, capacity)
    assert time.process_time() - began < 10
    at = max(i for i, point in enumerate(hull) if point.bytes <= capacity)
    relaxed = np.interp(capacity, [p.bytes for p in hull[at : at + 2]], [p.loss for p in hull[at : at + 2]])
    assert found.bytes <= capacity
    assert relaxed * (1 - 1e-12) <= found.loss <= hull[at].loss


def test_equal_layers_do_not_multiply():
    """A hundred equal groups have 2^100 choices, and 101 sizes."""
    found = knapsack.solve([[(3, 1.0), (5, 0.5)]] * 100, 401)
    assert (found.bytes, found.loss) == (400, 75.0)


def test_the_smaller_of_equal_choices_is_taken():
    assert knapsack.solve([[(5, 1.0), (3, 1.0)], [(2, 0.0), (9, 0.0)]], 100).bytes == 5


@pytest.mark.parametrize("loss", [math.nan, math.inf, -1.0])
def test_losses_that_are_none_are_refused(loss):
    with pytest.raises(PhiquantError, match="finite"):
        knapsack.solve([[(1, loss)]], 1)


def test_a_group_without_options_is_refused():
    with pytest.raises(PhiquantError, match="every group"):
        knapsack.solve([[(1, 0.0)], []], 10)
