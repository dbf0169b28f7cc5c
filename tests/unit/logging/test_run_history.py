import pytest

from megatron.logging.log_line import Bucket
from megatron.logging.run_history import RunHistory, position_scalar, read_run
from tests.unit.logging.reported_runs import BUCKETS, record, write_events, write_log

WRITERS = {"events": lambda folder, records: write_events(folder / "tensorboard", records),
           "log": lambda folder, records: write_log(folder / "train.log", records)}  # fmt: skip


@pytest.mark.parametrize("kind", WRITERS)
def test_a_run_is_read_from_either_source(tmp_path, kind):
    WRITERS[kind](tmp_path, [record(1), record(3, loss=None, milliseconds=1_800_000.0)])
    run = read_run(tmp_path)
    assert run.name == tmp_path.name
    assert run.train("loss") == {1: 8.0}
    assert run.train("consumed_tokens") == {1: 1000, 3: 3000}
    assert run.train("host_pool_gib") == {1: 5.0, 3: 5.0}
    assert run.hours() == {1: 1.0, 3: 2.0}
    assert run.series["validation/loss"] == {1: 3.0, 3: 3.0}
    assert run.positions() == list(BUCKETS)


@pytest.mark.parametrize("kind", WRITERS)
def test_of_a_resumed_run_what_came_later_counts_and_what_was_lost_is_gone(tmp_path, kind):
    WRITERS[kind](tmp_path, [record(i) for i in (2, 4, 6, 8)])
    WRITERS[kind](tmp_path, [record(5, loss=1.0), record(6, loss=0.5)])
    assert read_run(tmp_path).train("loss") == {2: 8.0, 4: 8.0, 5: 1.0, 6: 0.5}
    assert list(read_run(tmp_path).series["validation/loss"]) == [2, 4, 5, 6]


@pytest.mark.parametrize("kind", WRITERS)
def test_an_iteration_that_was_done_twice_has_its_later_loss(tmp_path, kind):
    WRITERS[kind](tmp_path, [record(1), record(2)])
    WRITERS[kind](tmp_path, [record(2, loss=1.0)])
    assert read_run(tmp_path).train("loss") == {1: 8.0, 2: 1.0}


def test_a_run_that_is_being_written_is_read_up_to_there(tmp_path):
    write_events(tmp_path, [record(1), record(2)])
    (file,) = tmp_path.glob("events.*")
    file.write_bytes(file.read_bytes()[:-7])
    assert list(read_run(tmp_path).train("loss")) == [1, 2]
    write_log(tmp_path / "train.log", [record(1), record(2)])
    text = (tmp_path / "train.log").read_text()
    (tmp_path / "train.log").write_text(text[: text.rindex("iteration        2/") + 40])
    assert list(read_run(tmp_path / "train.log").train("loss")) == [1]


def test_lines_at_which_a_counter_goes_up_are_marked():
    counts = {1: 0, 2: 1, 3: 1, 4: 3}
    run = RunHistory.of("run", (("train/skipped_iterations", i, n) for i, n in counts.items()))
    assert run.marks("skipped_iterations") == [2, 4]
    assert run.marks("nan_iterations") == []


def test_positions_are_those_of_the_last_evaluation():
    first, last = Bucket(0, 8, 2.0), Bucket(8, 16, 1.0)
    points = [(f"validation/{position_scalar(b)}", i, b.loss + i) for i in (0, 5) for b in (first, last)]
    assert RunHistory.of("run", points).positions() == [Bucket(0, 8, 7.0), Bucket(8, 16, 6.0)]


def test_what_holds_no_run_or_several_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no TensorBoard events and no file \*.log; give"):
        read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist; give the folder of a run"):
        read_run(tmp_path / "none")
    (tmp_path / "empty.log").write_text("nothing here\n")
    with pytest.raises(ValueError, match=r"empty\.log has no line"):
        read_run(tmp_path)
    write_events(tmp_path / "a", [record(1)])
    write_events(tmp_path / "b", [record(1)])
    with pytest.raises(ValueError, match=r"the events of several runs \(.*/a, .*/b\); give one of these"):
        read_run(tmp_path)
