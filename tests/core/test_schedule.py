from __future__ import annotations

import numpy as np
import pytest

from sae.core.schedule import PRESSURE, Schedule


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1000])
def test_learning_rate_warms_up_stays_and_decays(steps):
    schedule = Schedule(steps)
    factors = np.array([schedule.factor(step) for step in range(steps)])
    assert ((factors > 0) & (factors <= 1)).all()
    warm_up, decay = max(1, round(0.05 * steps)), max(1, round(0.2 * steps))
    np.testing.assert_allclose(factors[:warm_up], np.arange(1, warm_up + 1) / warm_up)
    np.testing.assert_allclose(factors[steps - decay :], np.arange(decay, 0, -1) / decay)
    assert (factors[warm_up : steps - decay] == 1).all()


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1000])
def test_pressure_grows_to_all_that_is_asked_for(steps):
    schedule = Schedule(steps)
    pressures = np.array([schedule.pressure(step) for step in range(steps)])
    growing = max(1, round(PRESSURE * steps))
    np.testing.assert_allclose(pressures[:growing], np.arange(1, growing + 1) / growing)
    assert (pressures[growing - 1 :] == 1).all()


def test_paper_has_one_learning_rate_and_full_pressure():
    schedule = Schedule(50, constant=True)
    assert {schedule.factor(step) for step in range(50)} == {schedule.pressure(step) for step in range(50)} == {1.0}


@pytest.mark.parametrize("step", [9, 39, 78])
def test_ending_early_decays_as_in_a_run_of_that_length(step):
    schedule = Schedule(100)
    schedule.end_early(step)
    decay = round((step + 1) / 4)
    assert schedule.steps == step + 1 + decay
    factors = [schedule.factor(later) for later in range(step + 1, schedule.steps)]
    np.testing.assert_allclose(factors, np.arange(decay, 0, -1) / decay)


def test_ending_early_in_the_decay_changes_nothing():
    schedule, other = Schedule(100), Schedule(100)
    for step in (79, 90, 99):
        schedule.end_early(step)
    assert [schedule.factor(step) for step in range(100)] == [other.factor(step) for step in range(100)]
    assert schedule.steps == 100
