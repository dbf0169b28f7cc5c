"""`bad_samples.py` on a rank that a signal or an error strikes at a certain place.

STRIKE="1 SIGKILL saving" kills rank 1 when it comes to a place whose name begins so; "joining" is before it joins,
"evaluating" before the first micro-batch of an evaluation.
STRIKE="1 RuntimeError saving" lets it raise one.
"""

import builtins
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    import megatron.initialize
    from megatron.engine.engine import Engine
    from megatron.ranks.watchdog import Watchdog

    rank, name, place = os.environ["STRIKE"].split(maxsplit=2)
    move, join, evaluate = Watchdog.move, megatron.initialize.join, Engine.evaluate

    def strike_at(come_to: str) -> None:
        if os.environ["RANK"] == rank and come_to.startswith(place):
            time.sleep(1)  # for the others to have heard where this rank is
            if not name.startswith("SIG"):
                raise getattr(builtins, name)("stricken")
            os.kill(os.getpid(), getattr(signal, name))

    def move_or_fall(watchdog: Watchdog, come_to: str) -> None:
        move(watchdog, come_to)
        strike_at(come_to)

    def join_or_fall(*arguments: Any) -> Any:
        strike_at("joining")
        return join(*arguments)

    def evaluate_or_fall(*arguments: Any) -> Any:
        strike_at("evaluating")
        return evaluate(*arguments)

    Watchdog.move = move_or_fall  # type: ignore[method-assign]
    megatron.initialize.join = join_or_fall
    Engine.evaluate = evaluate_or_fall  # type: ignore[method-assign]
    runpy.run_path(str(REPOSITORY / "tests/integration/bad_samples.py"), run_name="__main__")
