"""The rule that chooses lambda."""

import pytest

from tpvc.compiler.adapters.search_scale import SCALES, search


def scored(rows, otherwise=(0.1, 0.1)):
    """(score, the lambdas that were asked for): what a lambda gets, by its value."""
    asked = []

    def score(scale):
        asked.append(scale)
        return list(rows.get(scale, otherwise))

    return score, asked


def test_the_grid_is_the_doubles_nearest_to_twentieths():
    twentieths = [float(f"{i * 5 // 100}.{i * 5 % 100:02}") for i in range(21)]
    assert SCALES == twentieths  # noqa: SIM300


def test_every_lambda_is_tried_once_from_the_smallest_and_the_best_mean_wins():
    score, asked = scored({0.3: (0.9, 0.0), 0.6: (0.5, 0.5), 0.7: (0.2, 0.2)})
    found = search(score, 2)
    assert asked == SCALES and found.scale == 0.6
    assert [row["lambda"] for row in found.table] == SCALES
    assert found.table[6] == {"lambda": 0.3, "exact": [0.9, 0.0], "mean": 0.45}


def test_ties_keep_the_smaller():
    score, _ = scored({0.35: (0.5, 0.5), 0.8: (0.5, 0.5)})
    assert search(score, 2).scale == 0.35
    assert search(scored({}, (1.0, 1.0))[0], 2).scale == 0.0


def test_ties_are_of_shares_and_not_of_their_float_sums():
    assert 0.1 + 0.7 < 0.4 + 0.4, "otherwise this test says nothing"
    score, _ = scored({0.2: (0.1, 0.7), 0.5: (0.4, 0.4)}, (0.0, 0.0))
    assert search(score, 2).scale == 0.2
    score, _ = scored({0.2: (499 / 1000, 0.5), 0.5: (0.5, 0.5)})  # one example of 2,000 is no tie
    assert search(score, 2).scale == 0.5


def test_nothing_right_anywhere_is_1():
    found = search(scored({}, (0.0, 0.0, 0.0))[0], 3)
    assert found.scale == 1.0 and len(found.table) == 21


def test_a_single_task_is_1_and_not_scored():
    score, asked = scored({0.5: (1.0,)}, (0.0,))
    found = search(score, 1)
    assert (found.scale, found.table, asked) == (1.0, [], [])


def test_progress_is_told():
    told = []
    search(scored({0.5: (1.0, 1.0)})[0], 2, lambda *given: told.append(given))
    assert [t[:3] for t in told] == [("search", i, 21) for i in range(22)]
    assert told[-1][3] == "lambda 0.50"


@pytest.mark.parametrize("tasks", [2, 5])
def test_the_mean_is_over_tasks_without_weights(tasks):
    found = search(scored({0.1: [1.0] + [0.0] * (tasks - 1)}, [0.0] * tasks)[0], tasks)
    assert found.scale == 0.1 and found.table[2]["mean"] == pytest.approx(1 / tasks)
