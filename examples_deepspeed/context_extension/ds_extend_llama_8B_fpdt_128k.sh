#!/usr/bin/env bash
# Extend the context of a LLaMA of 8B parameters from 8,192 to 131,072 tokens with FPDT. LOAD names the folder of its
# checkpoint, such as weights converted from Hugging Face.
#
#   DATA_PATH=data/corpus_text_document TOKENIZER_MODEL=llama/tokenizer.json LOAD=weights/llama \
#     examples_deepspeed/context_extension/ds_extend_llama_8B_fpdt_128k.sh
#
#   DRY_RUN=1          print the command and its plan, and stop
#   MODEL_SCALE=tiny   the same with a tiny model: on one or two GPUs, or two processes on the CPU in fp32
#
# Edit the values below, or set the variable of the same name in capitals: SEQ_LEN=128K ROPE_SCALING=yarn ...
set -euo pipefail
# shellcheck source=examples_deepspeed/context_extension/stage.sh
. "$(dirname "${BASH_SOURCE[0]}")/stage.sh"

# --- main configuration; stage.sh and sequence_parallel/common.sh have more -------------------------------------------
seq_len=${SEQ_LEN:-128K}
tiny_seq_len=2048
chunk_size=${CHUNK_SIZE:-32K}
gpus_per_sequence=4 # at most, unless SEQUENCE_PARALLEL is set; the other GPUs train on other sequences
stretched_theta=8400000 # theta of RoPE unless ROPE_SCALING or ROTARY_THETA is set
train_tokens=${TRAIN_TOKENS:-1e9}
warmup_tokens=${WARMUP_TOKENS:-2e7}
lr=${LR:-2e-5}
min_lr=${MIN_LR:-2e-6}
output=${OUTPUT:-runs/llama_8B_extended_128k} # checkpoints, log, TensorBoard; a restarted run resumes from here

prepare_stage
launch "$@"
