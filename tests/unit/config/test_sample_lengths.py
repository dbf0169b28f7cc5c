"""The lengths of samples: phases of a schedule in samples, and what is refused is in test_checks.py."""

from megatron.config import SampleLengths, sample_lengths
from tests.unit.config.commands import parsed

SCHEDULE = "--seq-length-schedule 64:3,256:2,1K --global-batch-size 4"


def test_a_schedule_of_iterations_becomes_phases_of_samples() -> None:
    lengths = sample_lengths(parsed(SCHEDULE), 1)
    assert lengths == SampleLengths(((0, 64), (12, 256), (20, 1024)), 4)
    assert [lengths.at(sample) for sample in (0, 11, 12, 19, 20, 9999)] == [64, 64, 256, 256, 1024, 1024]
    assert lengths.after(12) == ((20, 1024),)
    assert lengths.until(11) == (((0, 64),), 12)
    assert lengths.until(20) == (lengths.phases, None)


def test_units_are_powers_of_two() -> None:
    config = parsed("--seq-length 1048576 --seq-length-schedule 32k:1,1M:2,0.5K:3,1M".replace("0.5K", "512"))
    assert [length for _, length in sample_lengths(config, 1).phases] == [2**15, 2**20, 512, 2**20]


def test_without_a_schedule_there_is_one_length() -> None:
    assert sample_lengths(parsed("--micro-batch-size 3"), 2) == SampleLengths(((0, 1024),), 6)
    assert sample_lengths(parsed("--group-by-length"), 1) == SampleLengths(((0, 1024),), 1, is_grouped=True)
