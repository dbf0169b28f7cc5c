#!/usr/bin/env bash
# Pretrain a GPT of 1.3B parameters at 32,768 tokens of context with Ulysses sequence parallelism, without FPDT.
#
#   DATA_PATH=data/corpus_text_document VOCAB_FILE=tokenizer/vocab.json MERGE_FILE=tokenizer/merges.txt \
#     examples_deepspeed/sequence_parallel/ds_pretrain_gpt_1.3B_ulysses_32k.sh
#
#   DRY_RUN=1          print the command and its plan, and stop
#   MODEL_SCALE=tiny   the same with a tiny model: on one or two GPUs, or two processes on the CPU in fp32
#
# Edit the values below, or set the variable of the same name in capitals: SEQ_LEN=64K NUM_GPUS=8 ...
set -euo pipefail
# shellcheck source=examples_deepspeed/sequence_parallel/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# --- main configuration; common.sh has more ---------------------------------------------------------------------------
seq_len=${SEQ_LEN:-32K}
train_tokens=${TRAIN_TOKENS:-300e9}
warmup_tokens=${WARMUP_TOKENS:-3e9}
output=${OUTPUT:-runs/gpt_1.3B_ulysses_32k} # checkpoints, log, TensorBoard; a restarted run resumes from here
tokenizer_type=${TOKENIZER_TYPE:-GPT2BPETokenizer}
attention=${ATTENTION:-use-flash-attn-v2} # use-flash-attn takes the fastest kernel available

# --- model ------------------------------------------------------------------------------------------------------------
num_layers=24
hidden_size=2048
num_attention_heads=16
lr=${LR:-2e-4}
min_lr=${MIN_LR:-2e-5}

prepare
model=(
  "${gpt[@]}"
  --use-rotary-position-embeddings
  --init-method-std 0.013
)
parallel=("${ulysses[@]}")
launch "$@"
