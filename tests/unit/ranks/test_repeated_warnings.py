import logging
import warnings

import pytest

from megatron.ranks.repeated_warnings import ALL_WARNINGS, show_repeated_warnings_once

OF_DEEPSPEED = "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."
OF_KERNEL = "the default of aux_data\nis compiled into kernel {}"


@pytest.fixture
def shown(monkeypatch):
    """Return what is shown, by its first word, of warnings in a process with this environment."""

    def shown(environment):
        texts = []
        logger, handler = logging.getLogger("DeepSpeed"), logging.Handler()
        handler.emit = lambda record: texts.append(record.getMessage().split()[0])
        monkeypatch.setattr(logger, "handlers", [handler])
        monkeypatch.setattr(logger, "filters", [])
        monkeypatch.setattr(warnings, "showwarning", lambda message, *_: texts.append(str(message).split()[0]))
        show_repeated_warnings_once(environment)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            for kernel in range(3):
                logger.warning(OF_DEEPSPEED)
                warnings.warn(OF_KERNEL.format(kernel), stacklevel=1)
                logger.warning("offload is slow")
                warnings.warn("other warning", stacklevel=1)
        return texts

    return shown


def test_a_repeated_warning_is_shown_once_by_rank_0_and_other_warnings_always(shown):
    assert shown({"RANK": "0"}) == ["Setting", "the"] + 3 * ["offload", "other"]
    assert shown({"RANK": "1"}) == 3 * ["offload", "other"]
    assert shown({"RANK": "1", ALL_WARNINGS: "1"}) == 3 * ["Setting", "the", "offload", "other"]
