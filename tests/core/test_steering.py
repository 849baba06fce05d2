import numpy as np
import pytest

from sae.core.steering import Steps, steered_activation

A = np.array([0.0, 0.5, 2.0])


@pytest.mark.parametrize(
    ("intervention", "value", "dose", "expected"),
    [
        ("set", 3.0, 1.0, [3, 3, 3]),
        ("set", 3.0, 0.0, [0, 0, 0]),
        ("set", 3.0, -1.0, [0, 0, 0]),
        ("add", 3.0, 0.5, [1.5, 2, 3.5]),
        ("add", 1.0, -1.0, [0, 0, 1]),
        ("scale", np.nan, 2.0, [0, 1, 4]),
        ("scale", np.nan, -1.0, [0, 0, 0]),
        ("ablate", np.nan, 1.0, [0, 0, 0]),
    ],
)
def test_activation_after_an_intervention(intervention, value, dose, expected):
    np.testing.assert_array_equal(steered_activation(A, intervention, value, dose), expected)


def steps(intervention="add", value=1.0, dose=1.0, offset=None):
    return Steps(np.array([3.0, -4.0]), A.astype(np.float32), intervention, value, dose, offset)


def test_steps_go_along_the_direction():
    np.testing.assert_allclose(steps().of(slice(None)), [[3, -4]] * 3)
    np.testing.assert_allclose(steps("ablate").of(np.array([2, 0])), [[-6, 8], [0, 0]])
    np.testing.assert_array_equal(steps("ablate").moved(slice(None)), [False, True, True])
    np.testing.assert_array_equal(steps("ablate").moved(np.array([0])), [False])


def test_a_reconstruction_moves_every_cell():
    offset = np.arange(6.0).reshape(3, 2)
    moving = steps("ablate", offset=offset)
    assert moving.moved(slice(None)).all()
    np.testing.assert_allclose(moving.of(np.array([2])), [[-6 + 4, 8 + 5]])


@pytest.mark.parametrize(
    ("intervention", "dose", "expected"),
    [("set", 2, 6), ("set", -1, 0), ("add", -1, -3), ("scale", 0.5, 0.5), ("ablate", 1, 0)],
)
def test_strength_of_a_step(intervention, dose, expected):
    assert steps(intervention, 3.0, dose).strength == expected


def test_steps_along_another_direction_are_as_long():
    other = steps("scale", dose=3.0).along(np.array([0.0, 0.1]))
    np.testing.assert_allclose(
        np.linalg.norm(other.of(slice(None)), axis=1), np.linalg.norm(steps("scale", dose=3.0).of(slice(None)), axis=1)
    )
    np.testing.assert_allclose(other.of(np.array([2])), [[0, 20]], atol=1e-6)
