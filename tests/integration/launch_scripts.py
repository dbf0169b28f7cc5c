"""The launch scripts of examples_deepspeed/, at the tiny scale."""

from pathlib import Path

from tests.distributed.launcher import REPOSITORY, TrainingRun, free_port, read_log
from tests.integration.corpus import VOCAB_SIZE
from tests.integration.shell import run

SCRIPTS = {path.stem: path for path in (REPOSITORY / "examples_deepspeed").rglob("ds_*.sh")}
# As the 6.7B script for 256K, and that of 1.3B with learned positions, but for sizes and the tied output.
SAME_AT_THE_TINY_SCALE = {
    "ds_pretrain_gpt_6.7B_fpdt_32k",
    "ds_pretrain_gpt_30B_fpdt_32k",
    "ds_pretrain_gpt_30B_seq_parallel_32k",
}
NEW, CONTINUED = (
    sorted(name for name in set(SCRIPTS) - SAME_AT_THE_TINY_SCALE if ("pretrain" in name) is new)
    for new in (True, False)
)


def launch(name: str, folder: Path, corpus: Path, **variables: str) -> TrainingRun:
    """Run a script at the tiny scale and a length of its own; what its log says."""
    settings = {
        "MODEL_SCALE": "tiny", "SEQ_LEN": "1000", "CHUNK_SIZE": "300", "TRAIN_TOKENS": "4000", "DATA_PATH": str(corpus),
        "TOKENIZER_TYPE": "NullTokenizer", "VOCAB_SIZE": str(VOCAB_SIZE), "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    return read_log(run(str(SCRIPTS[name]), folder, **settings | variables))
