#!/usr/bin/env bash
# Train a tiny LLaMA with FPDT to recall across chunks, and a control that cannot; run the needle test on both.
#
#   examples_deepspeed/long_context_eval/recall.sh      about two minutes on two CPU cores
#
# The control trains on the same documents, cut at the end of each chunk, and is tested with chunks that do not see each
# other. It finds only needles in the last chunk. The other model finds all needles, even in contexts longer than in
# training. Every variable below can be set from the environment; Python's programs must be on PATH. DRY_RUN=1 prints
# the commands and runs nothing.
set -euo pipefail

# --- where -----------------------------------------------------------------------------------------------------------
OUT=${OUT:-runs/recall}
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

step() {
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
step mkdir -p "$OUT"

# --- lengths, in tokens ------------------------------------------------------------------------------------------------
# No answer is at the end of a chunk, where the control has learned that a document ends.
SEQ_LEN=${SEQ_LEN:-128}
CHUNK_SIZE=${CHUNK_SIZE:-32}
read -ra lengths <<<"${LENGTHS:-28 60 92 124 156}"

# --- the training ------------------------------------------------------------------------------------------------------
TRAIN_ITERS=${TRAIN_ITERS:-500}
BATCH_SIZE=${BATCH_SIZE:-16}
LR=${LR:-5e-3}
SEED=${SEED:-1234}

# --- the search --------------------------------------------------------------------------------------------------------
TRIALS=${TRIALS:-8} # needles at each length and depth

ids=(--vocab-size 32)
chunks=(--ds-sequence-parallel-fpdt-chunk-size "$CHUNK_SIZE" --ds-sequence-parallel-fpdt-offloading)
model=(
  --num-layers 2
  --hidden-size 64
  --num-attention-heads 4
  --seq-length "$SEQ_LEN"
  --use-rotary-position-embeddings
  --normalization rmsnorm
  --swiglu
  --disable-bias-linear
  --untie-embeddings-and-output-weights
  --make-vocab-size-divisible-by 1
)
training=(
  --micro-batch-size "$BATCH_SIZE"
  --global-batch-size "$BATCH_SIZE"
  --train-iters "$TRAIN_ITERS"
  --seed "$SEED"
  --lr "$LR"
  --lr-decay-style linear
  --lr-warmup-iters 30
  --weight-decay 0.1
  --adam-beta2 0.95
  --clip-grad 1.0
  --eval-iters 0
  --log-interval 50
)

# train_and_ask NAME "FLAGS of the corpus" "FLAGS of the training" "FLAGS of the search"
train_and_ask() {
  local name=$1 corpus training_flags search
  read -ra corpus <<<"$2"
  read -ra training_flags <<<"$3"
  read -ra search <<<"$4"
  step python "$repository/tools/make_recall_corpus.py" --output-prefix "$OUT/$name/data" "${ids[@]}" \
    --documents "$((TRAIN_ITERS * BATCH_SIZE))" --length "$SEQ_LEN" --max-mentions 40 "${corpus[@]}"
  step python "$repository/pretrain_gpt.py" "${model[@]}" "${training[@]}" --ds-sequence-parallel-fpdt "${chunks[@]}" \
    --tokenizer-type NullTokenizer "${ids[@]}" --data-path "$OUT/$name/data" --split 100,0,0 \
    --save "$OUT/$name/checkpoints" "${training_flags[@]}"
  step python "$repository/tools/eval_long_context.py" needle --load "$OUT/$name/checkpoints" \
    --tokenizer-type NullTokenizer "${ids[@]}" "${chunks[@]}" --lengths "${lengths[@]}" --depths 5 --trials "$TRIALS" \
    --output-dir "$OUT/$name" "${search[@]}"
}

train_and_ask model "" "" ""
train_and_ask control "--ends-every $CHUNK_SIZE" --reset-attention-mask --isolated-chunks
