#!/usr/bin/env bash
# Pretrain a LLaMA of 70B parameters (the shape of Llama 3 70B) at 4,194,304 tokens of context with FPDT.
#
#   DATA_PATH=data/corpus_text_document TOKENIZER_MODEL=llama/tokenizer.json \
#     examples_deepspeed/sequence_parallel/ds_pretrain_llama_70B_fpdt_4m.sh
#
#   DRY_RUN=1          print the command and its plan, and stop
#   MODEL_SCALE=tiny   the same with a tiny model: on one or two GPUs, or two processes on the CPU in fp32
#
# Edit the values below, or set the variable of the same name in capitals: SEQ_LEN=512K NUM_GPUS=8 ...
set -euo pipefail
# shellcheck source=examples_deepspeed/sequence_parallel/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# --- main configuration; common.sh has more ---------------------------------------------------------------------------
seq_len=${SEQ_LEN:-4M}
chunk_size=${CHUNK_SIZE:-64K}
train_tokens=${TRAIN_TOKENS:-300e9}
warmup_tokens=${WARMUP_TOKENS:-3e9}
output=${OUTPUT:-runs/llama_70B_fpdt_4m} # checkpoints, log, TensorBoard; a restarted run resumes from here
tokenizer_type=${TOKENIZER_TYPE:-HFTokenizer}

# --- model ------------------------------------------------------------------------------------------------------------
num_layers=80
hidden_size=8192
ffn_hidden_size=28672
num_attention_heads=64
num_key_value_heads=8
rotary_theta=${ROTARY_THETA:-100000000}
lr=${LR:-1.5e-4}
min_lr=${MIN_LR:-1.5e-5}

prepare
model=("${llama[@]}")
parallel=("${fpdt[@]}")
launch "$@"
