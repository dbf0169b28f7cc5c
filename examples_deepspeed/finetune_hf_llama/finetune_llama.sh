#!/usr/bin/env bash
# Fine-tune a Hugging Face model on conversations with FPDT: convert its weights, train with the loss on the answers
# alone, and export the trained weights. HF_MODEL names its folder, of any family that
# tools/hf2megads_weight_converter.py takes, and DATA_PATH one or more files of conversations (docs/finetuning.md).
#
#   HF_MODEL=models/Llama-3.1-8B-Instruct DATA_PATH=conversations.jsonl \
#     examples_deepspeed/finetune_hf_llama/finetune_llama.sh
#
#   convert_hf2mds     as first argument: only convert; convert_mds2hf: only export
#   DRY_RUN=1          print the commands and the plan of the training, and stop
#   MODEL_SCALE=tiny   a short training on one or two GPUs, or two processes on the CPU in fp32; for a tiny HF_MODEL
#
# Edit the values below, or set the variable of the same name in capitals: SEQ_LEN=512K NUM_GPUS=8 ...
set -euo pipefail
# shellcheck source=examples_deepspeed/sequence_parallel/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../sequence_parallel/common.sh"
program=finetune_llama.py

# --- main configuration; sequence_parallel/common.sh has more ---------------------------------------------------------
seq_len=${SEQ_LEN:-128K}
chunk_size=${CHUNK_SIZE:-32K}
train_tokens=${TRAIN_TOKENS:-2e8}
warmup_tokens=${WARMUP_TOKENS:-4e6}
lr=${LR:-5e-6}
min_lr=${MIN_LR:-0}
long_samples=${LONG_SAMPLES:-error}       # conversations longer than SEQ_LEN: error, truncate or skip
chat_template=${CHAT_TEMPLATE:-}          # file with a Jinja template; default: the tokenizer's own
export_dtype=${EXPORT_DTYPE:-bfloat16}    # number format of the export
output=${OUTPUT:-runs/llama_finetuned_hf} # weights, data, checkpoints, log, and exports hf_stepN
tokenizer_type=HFTokenizer
TOKENIZER_MODEL=${TOKENIZER_MODEL:-${HF_MODEL:-}}
needed=(HF_MODEL)

task=all
if [[ ${1:-} == convert_hf2mds || ${1:-} == convert_mds2hf ]]; then
  task=$1
  shift
fi

# --- model: as its config.json says -----------------------------------------------------------------------------------
converter=("${PYTHON:-python3}" "$repository/tools/hf2megads_weight_converter.py")

scale_model
find_data
find_gpus
LOAD=$output/weights
assemble_arguments
described=$("${converter[@]}" flags "$HF_MODEL")
read -ra model <<<"$described"
model+=(--seq-length "$seq_len" --max-position-embeddings "$seq_len")
parallel=("${fpdt[@]}")
data+=(--long-samples "$long_samples" --data-cache-path "$output/data")
if [[ -n $chat_template ]]; then data+=(--chat-template "$chat_template"); fi

# --- convert, train, export; outputs that exist already are not written again -----------------------------------------
if [[ $task != convert_mds2hf && ! -d $output/weights ]]; then
  step "${converter[@]}" to-megatron "$HF_MODEL" "$output/weights"
  load_is_made=${DRY_RUN:-0}
fi
if [[ $task == convert_hf2mds ]]; then exit; fi
if [[ $task == all ]]; then launch "$@"; fi
latest=global_stepN
if [[ ${DRY_RUN:-0} != 1 ]]; then latest=$(<"$output/checkpoints/latest"); fi
export_path=$output/hf_${latest#global_}
if [[ ! -d $export_path ]]; then
  step "${converter[@]}" to-hf "$output/checkpoints" "$export_path" --like "$HF_MODEL" --dtype "$export_dtype"
fi
