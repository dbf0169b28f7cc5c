#!/usr/bin/env bash
# Finetune a LLaMA of 8B parameters at 131,072 tokens of context with FPDT. LOAD names weights that
# tools/hf2megads_weight_converter.py converted from Hugging Face, or the checkpoints of another run.
#
#   DATA_PATH=data/corpus_text_document TOKENIZER_MODEL=llama/tokenizer.json LOAD=weights/llama \
#     examples_deepspeed/sequence_parallel/ds_finetune_llama_8B_fpdt_128k.sh
#
#   DRY_RUN=1          print the command and its plan, and stop
#   MODEL_SCALE=tiny   the same with a tiny model: on one or two GPUs, or two processes on the CPU in fp32
#
# Edit the values below, or set the variable of the same name in capitals: SEQ_LEN=512K NUM_GPUS=8 ...
set -euo pipefail
# shellcheck source=examples_deepspeed/sequence_parallel/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# --- main configuration; common.sh has more ---------------------------------------------------------------------------
seq_len=${SEQ_LEN:-128K}
chunk_size=${CHUNK_SIZE:-64K}
train_tokens=${TRAIN_TOKENS:-2e8}
warmup_tokens=${WARMUP_TOKENS:-4e6}
output=${OUTPUT:-runs/llama_8B_finetuned_128k} # checkpoints, log, TensorBoard; a restarted run resumes from here
tokenizer_type=${TOKENIZER_TYPE:-HFTokenizer}
needed=(LOAD)

# --- model ------------------------------------------------------------------------------------------------------------
num_layers=32
hidden_size=4096
ffn_hidden_size=14336
num_attention_heads=32
num_key_value_heads=8
rotary_theta=${ROTARY_THETA:-500000} # as the checkpoint has it
lr=${LR:-5e-6}
min_lr=${MIN_LR:-0}

prepare
model=("${llama[@]}")
parallel=("${fpdt[@]}")
launch "$@"
