"""Scales of state and action: what statistics tell of a dataset, and what they warn of."""

import re

import numpy as np
import pytest

from common.data.normalizer import differences, statistics


def rows(mean, std, count=400, seed=0):
    """float32 (count, dims) with about these means and spreads."""
    noise = np.random.default_rng(seed).normal(size=(count, len(mean)))
    return (np.array(mean) + np.array(std) * noise).astype(np.float32)


def compare(trained, found, names=None):
    """Differences of the actions; the states are alike."""
    return differences(statistics(STATE, trained), statistics(STATE, found), names)


STATE = rows([0.0], [1.0])
USUAL = rows([0.25, -2.0, 100.0], [0.1, 0.02, 30.0])


def test_another_recording_of_the_same_robot_does_not_differ():
    assert compare(USUAL, rows([0.3, -2.03, 80.0], [0.07, 0.04, 40.0], seed=1)) == []


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (14.3, 5.73, r"mean 14\.\d with a spread of 5\.\d+, in training 0\.2\d+ with 0\.\d+: "),
        (14.3, 5.73, "other units \\(degrees, in training radians\\?\\)"),
        (0.0044, 0.00175, "radians, in training degrees"),
        (250.0, 100.0, "millimetres, in training metres"),
        (1.0, 0.1, "other units\\?"),
        (0.25, 0.7, "other units\\?"),
        (0.25, 0.01, "other units\\?"),
        (0.25, 0.0, "constant here"),
    ],
)
def test_a_dimension_of_another_kind_is_named(mean, std, message):
    names = {"action": ["left_gripper", "x", "y"]}
    lines = compare(USUAL, rows([mean, -2.0, 100.0], [std, 0.02, 30.0], seed=1), names)
    assert len(lines) == 1
    assert lines[0].startswith("action[0] (left_gripper): mean ")
    assert re.search(message, lines[0])


def test_dimensions_that_were_constant():
    trained = rows([0.0, 7.0, 7.0, 0.0], [0.0, 0.0, 0.0, 0.0])
    still = rows([0.001, 7.1, 7.0, 0.0], [0.0, 0.0, 0.01, 0.0], seed=1)
    assert compare(trained, still) == []
    moved = compare(trained, rows([0.0, 8.0, 7.0, 0.5], [0.2, 0.0, 0.0, 0.0], seed=1))
    assert [line.split(":")[0] for line in moved] == ["action[0]", "action[1]", "action[3]"]
    assert all(line.endswith(": constant in training") for line in moved)


def test_another_number_of_dimensions_is_one_line():
    assert compare(USUAL, USUAL[:, :2]) == ["action: 2 numbers, in training 3"]
