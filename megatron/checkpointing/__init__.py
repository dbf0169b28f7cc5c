"""Checkpoints that appear only when they are complete, and load only when they are unchanged since the save.

DIR/latest                          name of the newest complete checkpoint, written last
DIR/run.lock                        the run that writes to the folder, while it runs; left over where a run was killed
DIR/global_stepN/manifest.json      size and hash of every other file; nothing is added after it
DIR/global_stepN/*.pt               weights and optimizer states, DeepSpeed's
DIR/global_stepN/random_RANK.pt     random number generator (RNG) state of a rank
DIR/global_stepN/config.json        the configuration that wrote it
DIR/global_stepN/layout.json        what DeepSpeed's files depend on besides the architecture
DIR/global_stepN/hugging_face.json  the config.json of the Hugging Face model that it is of
DIR/global_stepN/train_state.json   counters and the position in the data
DIR/global_stepN.HEX.tmp            a checkpoint being written; left over where a save was killed
DIR/global_stepN.HEX.old            a checkpoint being deleted or replaced
"""

from megatron.checkpointing.choice import choose_checkpoint, find_checkpoint
from megatron.checkpointing.compatibility import check_checkpoint
from megatron.checkpointing.errors import CheckpointError
from megatron.checkpointing.loading import load_checkpoint, saved_state, starting_state
from megatron.checkpointing.lock import only_writer
from megatron.checkpointing.saving import Saver

__all__ = [
    "CheckpointError",
    "Saver",
    "check_checkpoint",
    "choose_checkpoint",
    "find_checkpoint",
    "load_checkpoint",
    "only_writer",
    "saved_state",
    "starting_state",
]
