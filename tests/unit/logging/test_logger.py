import logging

import pytest

from megatron.logging.logger import LOGGER_NAME, configure_logging


@pytest.fixture(autouse=True)
def restored_logger():
    logger = logging.getLogger(LOGGER_NAME)
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


def test_rank_0_writes_information_as_it_is_to_stdout(capsys):
    log = configure_logging(rank=0)
    log.info(" iteration 1/ 100 |")
    log.warning("careful")
    assert capsys.readouterr() == (" iteration 1/ 100 |\nWARNING: careful\n", "")


def test_other_ranks_write_only_warnings_to_stderr(capsys):
    log = configure_logging(rank=3)
    log.info("not said")
    log.warning("careful")
    assert capsys.readouterr() == ("", "[rank 3] WARNING: careful\n")


def test_configuring_twice_does_not_double_the_lines(capsys):
    configure_logging(rank=0)
    configure_logging(rank=0).info("once")
    assert capsys.readouterr().out == "once\n"


def test_children_of_the_logger_speak_through_it(capsys):
    configure_logging(rank=0)
    logging.getLogger(f"{LOGGER_NAME}.training").info("hello")
    assert capsys.readouterr().out == "hello\n"
