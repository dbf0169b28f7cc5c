#!/usr/bin/env bash
# Pretrain a LLaMA of 8B parameters (the shape of Llama 3 8B) at 2,097,152 tokens of context with FPDT.
#
#   DATA_PATH=data/corpus_text_document TOKENIZER_MODEL=llama/tokenizer.json \
#     examples_deepspeed/sequence_parallel/ds_pretrain_llama_8B_fpdt_2m.sh
#
#   DRY_RUN=1          print the command and its plan, and stop
#   MODEL_SCALE=tiny   the same with a tiny model: on one or two GPUs, or two processes on the CPU in fp32
#
# Edit the values below, or set the variable of the same name in capitals: SEQ_LEN=512K NUM_GPUS=8 ...
set -euo pipefail
# shellcheck source=examples_deepspeed/sequence_parallel/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# --- main configuration; common.sh has more ---------------------------------------------------------------------------
seq_len=${SEQ_LEN:-2M}
chunk_size=${CHUNK_SIZE:-64K}
train_tokens=${TRAIN_TOKENS:-300e9}
warmup_tokens=${WARMUP_TOKENS:-3e9}
output=${OUTPUT:-runs/llama_8B_fpdt_2m} # checkpoints, log, TensorBoard; a restarted run resumes from here
tokenizer_type=${TOKENIZER_TYPE:-HFTokenizer}

# --- model ------------------------------------------------------------------------------------------------------------
num_layers=32
hidden_size=4096
ffn_hidden_size=14336
num_attention_heads=32
num_key_value_heads=8
rotary_theta=${ROTARY_THETA:-100000000}
lr=${LR:-3e-4}
min_lr=${MIN_LR:-3e-5}

prepare
model=("${llama[@]}")
parallel=("${fpdt[@]}")
launch "$@"
