#!/usr/bin/env bash
# Pretrain a GPT of 6.7B parameters at 262,144 tokens of context with FPDT (Ulysses-Offload): the model of
# Megatron-DeepSpeed's script of this name, in bf16. The name says 32k; the length is that of the script.
#
#   DATA_PATH=data/corpus_text_document VOCAB_FILE=tokenizer/vocab.json MERGE_FILE=tokenizer/merges.txt \
#     examples_deepspeed/sequence_parallel/ds_pretrain_gpt_6.7B_fpdt_32k.sh
#
#   DRY_RUN=1          print the command and its plan, and stop
#   MODEL_SCALE=tiny   the same with a tiny model: on one or two GPUs, or two processes on the CPU in fp32
#
# Edit the values below, or set the variable of the same name in capitals, or the variable of Megatron-DeepSpeed's script:
# seq_len=65536 sp_size=4 global_batch_size=8 ...
set -euo pipefail
# shellcheck source=examples_deepspeed/sequence_parallel/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# --- main configuration; common.sh has more ---------------------------------------------------------------------------
seq_len=${SEQ_LEN:-256K}
chunk_size=${CHUNK_SIZE:-64K}
train_tokens=${TRAIN_TOKENS:-300e9}
warmup_tokens=${WARMUP_TOKENS:-3e9}
output=${OUTPUT:-runs/gpt_6.7B_fpdt_32k} # checkpoints, log, TensorBoard; a restarted run resumes from here
tokenizer_type=${TOKENIZER_TYPE:-GPT2BPETokenizer}
split=${SPLIT:-949,50,1}

# --- model ------------------------------------------------------------------------------------------------------------
num_layers=32
hidden_size=4096
num_attention_heads=32
lr=${LR:-1.2e-4}
min_lr=${MIN_LR:-1e-6}

prepare
model=(
  "${gpt[@]}"
  --use-rotary-position-embeddings
  --rotary-percent 0.25
  --rotary-position-embeddings-theta 100000000
  --init-method-std 0.009
)
parallel=("${fpdt[@]}")
launch "$@"
