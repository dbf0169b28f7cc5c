#!/usr/bin/env bash
# Pretrain a GPT of 6.7B parameters at 262,144 tokens of context with FPDT (Ulysses-Offload), on the GPUs of one machine.
#
#   DATA_PATH=data/corpus_text_document VOCAB_FILE=tokenizer/vocab.json MERGE_FILE=tokenizer/merges.txt \
#     examples_deepspeed/sequence_parallel/ds_pretrain_gpt_6.7B_fpdt_256k.sh
#
#   DRY_RUN=1          print the command and stop
#   MODEL_SCALE=tiny   the same with a tiny model: on one or two GPUs, or two processes on the CPU in fp32
#
# Edit the values below, or set the variable of the same name in capitals: SEQ_LEN=524288 NUM_GPUS=8 ...
set -euo pipefail

# --- main configuration ------------------------------------------------------------------------------------------------
seq_len=${SEQ_LEN:-262144}
chunk_size=${CHUNK_SIZE:-65536}           # tokens per FPDT chunk, over all GPUs together
sequence_parallel=${SEQUENCE_PARALLEL:-}  # GPUs that share one sequence; default: all of them
num_gpus=${NUM_GPUS:-}                    # default: all that there are, or those in CUDA_VISIBLE_DEVICES
micro_batch_size=${MICRO_BATCH_SIZE:-1}
global_batch_size=${GLOBAL_BATCH_SIZE:-}  # default: one micro-batch for each group of GPUs that shares a sequence
train_tokens=${TRAIN_TOKENS:-300e9}
warmup_tokens=${WARMUP_TOKENS:-3e9}
output=${OUTPUT:-runs/gpt_6.7B_fpdt_256k} # checkpoints, log, TensorBoard; a run that is started again goes on from here
data_path=${DATA_PATH:-}                  # PREFIX of PREFIX.bin and PREFIX.idx, or weights and prefixes: "0.3 A 0.7 B"
split=${SPLIT:-99,1,0}                    # shares of the documents for training, validation and test
tokenizer_type=${TOKENIZER_TYPE:-GPT2BPETokenizer}
model_scale=${MODEL_SCALE:-6.7B}

# --- model -------------------------------------------------------------------------------------------------------------
num_layers=32
hidden_size=4096
num_attention_heads=32
init_method_std=0.009
lr=1.2e-4
min_lr=1.2e-5
log_interval=1
eval_iters=10
eval_interval=100
save_interval=100

if [[ $model_scale == tiny ]]; then
  seq_len=${SEQ_LEN:-4096}
  chunk_size=${CHUNK_SIZE:-1024}
  train_tokens=${TRAIN_TOKENS:-$((4 * seq_len))}
  warmup_tokens=${WARMUP_TOKENS:-$seq_len}
  output=${OUTPUT:-runs/gpt_tiny_fpdt}
  split=${SPLIT:-90,10,0}
  num_layers=2
  hidden_size=64
  num_attention_heads=4
  eval_iters=1
  eval_interval=2
elif [[ $model_scale != 6.7B ]]; then
  echo "MODEL_SCALE ($model_scale) must be 6.7B or tiny; leave it out for 6.7B" >&2
  exit 2
fi

# --- data and tokenizer ------------------------------------------------------------------------------------------------
case $tokenizer_type in
  GPT2BPETokenizer)
    needed=(DATA_PATH VOCAB_FILE MERGE_FILE)
    tokenizer=(--vocab-file "${VOCAB_FILE:-}" --merge-file "${MERGE_FILE:-}")
    ;;
  *)
    needed=(DATA_PATH TOKENIZER_MODEL)
    tokenizer=(--tokenizer-model "${TOKENIZER_MODEL:-}")
    ;;
esac
missing=()
for name in "${needed[@]}"; do
  if [[ -z ${!name:-} ]]; then missing+=("$name"); fi
done
if ((${#missing[@]} > 0)); then
  echo "${missing[*]} not set: with TOKENIZER_TYPE $tokenizer_type, ${needed[*]} name files of your own, which" \
    "tools/preprocess_data.py and tools/train_tokenizer.py make; set them and start again" >&2
  exit 2
fi
read -ra data_words <<<"$data_path"
data=(--data-path "${data_words[@]}" --split "$split" --tokenizer-type "$tokenizer_type" "${tokenizer[@]}")

# --- GPUs --------------------------------------------------------------------------------------------------------------
count_gpus() {
  if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .
  elif command -v nvidia-smi >/dev/null; then
    nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
  else
    echo 0
  fi
}

gpus_found=$(count_gpus)
on_gpus=1
if [[ $model_scale == tiny ]]; then
  if ((gpus_found == 0)); then on_gpus=0; fi
  num_processes=${num_gpus:-$((gpus_found == 1 ? 1 : 2))}
else
  num_processes=${num_gpus:-$gpus_found}
fi
if ((num_processes == 0)); then
  echo "no GPU found; set NUM_GPUS if that is wrong, or MODEL_SCALE=tiny for a tiny model on the CPU" >&2
  exit 2
fi
if ((on_gpus)); then
  device=(--bf16 --use-flash-attn-v2)
else
  device=()  # fp32, and the attention kernel that fits
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi

launcher=(deepspeed --quiet)
# The launcher reads CUDA_VISIBLE_DEVICES only where it is told no number.
if [[ -n $num_gpus || -z ${CUDA_VISIBLE_DEVICES:-} || $model_scale == tiny ]]; then
  launcher+=(--num_gpus "$num_processes")
fi
if [[ -n ${MASTER_PORT:-} ]]; then launcher+=(--master_port "$MASTER_PORT"); fi

# --- arguments ---------------------------------------------------------------------------------------------------------
sequence_parallel=${sequence_parallel:-$num_processes}
model=(
  --num-layers "$num_layers"
  --hidden-size "$hidden_size"
  --num-attention-heads "$num_attention_heads"
  --seq-length "$seq_len"
  --max-position-embeddings "$seq_len"
  --use-rotary-position-embeddings
  --rotary-percent 0.25
  --rotary-position-embeddings-theta 100000000
  --untie-embeddings-and-output-weights
  --init-method-std "$init_method_std"
  --attention-dropout 0
  --hidden-dropout 0
)
fpdt=(
  --ds-sequence-parallel-size "$sequence_parallel"
  --ds-sequence-parallel-fpdt
  --ds-sequence-parallel-fpdt-chunk-size "$chunk_size"
  --ds-sequence-parallel-fpdt-offloading
)
zero=(--deepspeed --zero-stage 3 --deepspeed-activation-checkpointing --checkpoint-in-cpu)
if [[ -n ${DEEPSPEED_CONFIG:-} ]]; then zero+=(--deepspeed-config "$DEEPSPEED_CONFIG"); fi
training=(
  --micro-batch-size "$micro_batch_size"
  --train-tokens "$train_tokens"
  --lr "$lr"
  --min-lr "$min_lr"
  --lr-decay-style cosine
  --lr-warmup-tokens "$warmup_tokens"
  --adam-beta1 0.9
  --adam-beta2 0.95
  --weight-decay 0.1
  --clip-grad 1.0
  --eval-iters "$eval_iters"
  --eval-interval "$eval_interval"
)
if [[ -n $global_batch_size ]]; then training+=(--global-batch-size "$global_batch_size"); fi
files=(
  --log-interval "$log_interval"
  --tensorboard-dir "$output/tensorboard"
  --save "$output/checkpoints"
  --load "$output/checkpoints"
  --save-interval "$save_interval"
)

# --- launch ------------------------------------------------------------------------------------------------------------
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
command=("${launcher[@]}" "$repository/pretrain_gpt.py" "${model[@]}" "${fpdt[@]}" "${zero[@]}" "${device[@]}"
  "${training[@]}" "${data[@]}" "${files[@]}" "$@")
if [[ ${DRY_RUN:-0} == 1 ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
if ! command -v deepspeed >/dev/null; then
  echo "no deepspeed on the PATH; run \`make venv\` and \`. .venv/bin/activate\`, and start again" >&2
  exit 2
fi
mkdir -p "$output"
"${command[@]}" 2>&1 | tee -a "$output/train.log"
