from __future__ import annotations

import numpy as np
import pytest

from sae.core import checkpoint as module
from sae.core.architectures import ARCHITECTURES
from sae.core.checkpoint import CheckpointError

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@each_architecture
@pytest.mark.parametrize("stop", [0, 13, 38])
def test_resumed_training_ends_as_if_it_had_not_been_interrupted(
    x, trained, stopping_at, assert_equal_weights, tmp_path, architecture, stop
):
    given = {"architecture": architecture, "steps": 40, "l1": 4.0, "learning_rate": 1e-2}
    whole = trained(x, **given)
    path = tmp_path / "state.npz"
    part = trained(x, checkpoint=path, on_step=stopping_at(stop), **given)
    assert part.steps == stop + 1
    announced = []
    rest = trained(x, checkpoint=path, on_step=lambda step, record: announced.append(step), **given)
    assert announced == list(range(stop + 1, 40))
    assert_equal_weights(rest, whole)
    assert rest.history == whole.history
    assert (rest.steps, rest.ended) == (40, "finished")


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_resumed_training_from_disk_goes_on_with_the_next_batch(
    x, trained, stopping_at, assert_equal_weights, tmp_path, architecture
):
    np.save(tmp_path / "x.npy", x)
    stored, path = np.load(tmp_path / "x.npy", mmap_mode="r"), tmp_path / "state.npz"
    given = {"architecture": architecture, "batch_size": 700, "steps": 20}
    whole = trained(stored, **given)
    trained(stored, checkpoint=path, on_step=stopping_at(6), **given)
    rest = trained(stored, checkpoint=path, **given)
    assert_equal_weights(rest, whole)
    assert rest.history == whole.history


def test_training_may_be_interrupted_again_and_again(x, trained, stopping_at, assert_equal_weights, tmp_path):
    path, whole = tmp_path / "state.npz", trained(x, steps=30)
    for stop in (3, 4, 17):
        assert trained(x, checkpoint=path, steps=30, on_step=stopping_at(stop)).steps == stop + 1
    assert_equal_weights(trained(x, checkpoint=path, steps=30), whole)


def test_training_goes_on_from_the_last_checkpoint_after_a_crash(
    x, trained, stopping_at, assert_equal_weights, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "SECONDS_BETWEEN", 0)
    path, whole = tmp_path / "state.npz", trained(x, steps=200)
    with pytest.raises(RuntimeError, match="crash"):
        trained(x, checkpoint=path, steps=200, on_step=stopping_at(50, RuntimeError("crash")))
    announced = []
    rest = trained(x, checkpoint=path, steps=200, on_step=lambda step, record: announced.append(step))
    # There is a record after every four steps.
    assert announced[0] == 48
    assert_equal_weights(rest, whole)
    assert rest.history == whole.history
    assert [file.name for file in tmp_path.iterdir()] == ["state.npz"]


def test_no_checkpoint_is_written_within_a_minute(x, trained, tmp_path):
    trained(x, checkpoint=tmp_path / "state.npz", steps=5)
    assert not list(tmp_path.iterdir())


def test_resumed_training_that_was_about_to_end_early_does(x, trained, stopping_at, tmp_path):
    given = {"learning_rate": 1e-9, "steps": 400, "patience": 3}
    for stop in (20, 35):
        path = tmp_path / f"{stop}.npz"
        trained(x, checkpoint=path, on_step=stopping_at(stop), **given)
        rest = trained(x, checkpoint=path, **given)
        assert (rest.steps, rest.ended) == (40, "early")
        assert rest.history == trained(x, **given).history


def test_resumed_decay_after_an_early_end_is_an_early_end(x, trained, stopping_at, tmp_path):
    """Also where the decay itself gains something, so that no record tells."""
    given = {"learning_rate": 0.3, "steps": 1000, "patience": 1}
    whole = trained(x, **given)
    assert whole.ended == "early"
    (decided,) = (record.step for record in whole.history if record.step + round(record.step / 4) == whole.steps)
    path = tmp_path / "state.npz"
    trained(x, checkpoint=path, on_step=stopping_at(decided), **given)
    rest = trained(x, checkpoint=path, **given)
    assert rest.history == whole.history
    assert (rest.steps, rest.ended) == (whole.steps, "early")


@pytest.fixture
def interrupted(x, trained, stopping_at, tmp_path):
    """The checkpoint of a run that was interrupted after five steps."""
    path = tmp_path / "state.npz"
    trained(x, checkpoint=path, on_step=stopping_at(4))
    return path


@pytest.mark.parametrize(
    "changed",
    [
        {"architecture": "batchtopk"},
        {"k": 4},
        {"steps": 61},
        {"learning_rate": 1e-3},
        {"seed": 1},
        {"groups": (8, 32)},
        {"identity": "other cells"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_checkpoint_of_something_else_is_refused(x, trained, interrupted, changed):
    before = interrupted.read_bytes()
    with pytest.raises(CheckpointError, match=r"state\.npz was written with other settings or other data"):
        trained(x, checkpoint=interrupted, **changed)
    assert interrupted.read_bytes() == before


def truncated(content):
    return content[: len(content) // 2]


DAMAGED = {
    "truncated": truncated,
    "empty": lambda content: b"",
    "text": lambda content: b"step,loss\n1,2\n",
    "a byte changed": lambda content: content[:2000] + bytes([content[2000] ^ 255]) + content[2001:],
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_damaged_checkpoint_is_refused_by_name(x, trained, interrupted, damage):
    interrupted.write_bytes(damage(interrupted.read_bytes()))
    with pytest.raises(CheckpointError, match=r"state\.npz"):
        trained(x, checkpoint=interrupted)


def test_file_that_is_no_checkpoint_is_refused_by_name(x, trained, tmp_path):
    np.savez(tmp_path / "state.npz", a=np.zeros(3))
    with pytest.raises(CheckpointError, match=r"state\.npz"):
        trained(x, checkpoint=tmp_path / "state.npz")
