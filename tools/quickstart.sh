#!/usr/bin/env bash
# Train a small LLaMA with FPDT on real text: the sources of the running Python's own standard library.
#
#   tools/quickstart.sh                             from nothing to a checkpoint and curves
#   CONTINUE=1 TRAIN_ITERS=160 tools/quickstart.sh   resume from the checkpoint
#
# It runs two processes with sequence-parallel size 2, ZeRO-3, and FPDT with offloading: on two GPUs in bf16, or on the
# CPU in fp32. With one GPU it runs one process. Every variable below can be set from the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# --- where -----------------------------------------------------------------------------------------------------------
VENV=${VENV:-$PWD/.venv}
OUT=${OUT:-quickstart_out}
CONTINUE=${CONTINUE:-0}

# --- the text and the tokenizer ----------------------------------------------------------------------------------------
CORPUS_BYTES=${CORPUS_BYTES:-6000000}
VOCAB_SIZE=${VOCAB_SIZE:-2048}

# --- the model ---------------------------------------------------------------------------------------------------------
NUM_LAYERS=${NUM_LAYERS:-2}
HIDDEN_SIZE=${HIDDEN_SIZE:-128}
NUM_ATTENTION_HEADS=${NUM_ATTENTION_HEADS:-4}
NUM_KEY_VALUE_HEADS=${NUM_KEY_VALUE_HEADS:-2}
SEQ_LENGTH=${SEQ_LENGTH:-8192}
CHUNK_SIZE=${CHUNK_SIZE:-2048}

# --- the training ------------------------------------------------------------------------------------------------------
TRAIN_ITERS=${TRAIN_ITERS:-80}
LR=${LR:-3e-3}
LR_WARMUP_ITERS=${LR_WARMUP_ITERS:-5}
EVAL_INTERVAL=${EVAL_INTERVAL:-20}
EVAL_ITERS=${EVAL_ITERS:-2}

if [[ ! -x $VENV/bin/deepspeed ]]; then
  echo "quickstart: $VENV has no deepspeed; run \`make quickstart\`, or \`make venv\` first" >&2
  exit 1
fi
export PATH="$VENV/bin:$PATH"

count_gpus() {
  if command -v nvidia-smi >/dev/null; then nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true; else echo 0; fi
}

# Copy the log to the output, in the compact form on a terminal.
show_log() {
  if [[ -t 1 ]]; then python tools/compact_log.py; else cat; fi
}

free_port() {
  python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# --- device ------------------------------------------------------------------------------------------------------------
num_gpus=$(count_gpus)
num_processes=2
precision=()
if ((num_gpus > 0)); then
  precision=(--bf16)
  if ((num_gpus == 1)); then num_processes=1; fi
else
  threads=$(($(nproc) / num_processes))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
  export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} # or every process of DeepSpeed warns that it found no GPU
fi
echo "quickstart: $num_gpus GPUs, $num_processes processes, writing to $OUT"

# --- data: made once, each part appears only when it is complete --------------------------------------------------------
data=$OUT/data
mkdir -p "$data"
if [[ ! -f $data/corpus.jsonl ]]; then
  python tools/make_stdlib_corpus.py --output "$data/corpus.jsonl" --max-bytes "$CORPUS_BYTES"
fi
if [[ ! -f $data/vocab.json || ! -f $data/merges.txt ]]; then
  python tools/train_tokenizer.py --input "$data/corpus.jsonl" --vocab-size "$VOCAB_SIZE" --output-dir "$data"
fi
tokenizer=(--tokenizer-type GPT2BPETokenizer --vocab-file "$data/vocab.json" --merge-file "$data/merges.txt")
if [[ ! -f $data/stdlib_text_document.idx ]]; then
  python tools/preprocess_data.py --input "$data/corpus.jsonl" --output-prefix "$data/stdlib" --append-eod \
    --workers "$(nproc)" "${tokenizer[@]}"
fi

# --- train -------------------------------------------------------------------------------------------------------------
model=(
  --num-layers "$NUM_LAYERS"
  --hidden-size "$HIDDEN_SIZE"
  --num-attention-heads "$NUM_ATTENTION_HEADS"
  --num-key-value-heads "$NUM_KEY_VALUE_HEADS"
  --seq-length "$SEQ_LENGTH"
  --max-position-embeddings "$SEQ_LENGTH"
  --use-rotary-position-embeddings
  --normalization rmsnorm
  --swiglu
  --disable-bias-linear
  --untie-embeddings-and-output-weights
  --init-method-std 0.05
)
parallel=(
  --ds-sequence-parallel-size "$num_processes"
  --ds-sequence-parallel-fpdt
  --ds-sequence-parallel-fpdt-chunk-size "$CHUNK_SIZE"
  --ds-sequence-parallel-fpdt-offloading
  --deepspeed
  --zero-stage 3
  --deepspeed-activation-checkpointing
  --checkpoint-in-cpu
)
training=(
  --micro-batch-size 1
  --global-batch-size 1
  --train-iters "$TRAIN_ITERS"
  --lr "$LR"
  --lr-decay-style constant
  --lr-warmup-iters "$LR_WARMUP_ITERS"
  --weight-decay 0.1
  --adam-beta2 0.95
  --clip-grad 1.0
  --eval-interval "$EVAL_INTERVAL"
  --eval-iters "$EVAL_ITERS"
)
output=(
  --log-interval 1
  --tensorboard-dir "$OUT/tensorboard"
  --save "$OUT/checkpoints"
  --save-interval "$TRAIN_ITERS"
)
if [[ $CONTINUE == 1 ]]; then
  output+=(--load "$OUT/checkpoints")
else
  : >"$OUT/train.log"
fi

deepspeed --quiet --num_gpus "$num_processes" --master_port "${MASTER_PORT:-$(free_port)}" pretrain_gpt.py \
  "${model[@]}" "${parallel[@]}" "${precision[@]}" "${training[@]}" "${output[@]}" "${tokenizer[@]}" \
  --data-path "$data/stdlib_text_document" --split 95,5,0 2>&1 | tee -a "$OUT/train.log" | show_log

# --- result ------------------------------------------------------------------------------------------------------------
python tools/plot_run.py "$OUT" --output "$OUT/loss.png" >/dev/null
cat <<END

checkpoint   $OUT/checkpoints
curves       $OUT/loss.png
TensorBoard  $VENV/bin/tensorboard --logdir $OUT/tensorboard
continue     CONTINUE=1 OUT=$OUT TRAIN_ITERS=$((TRAIN_ITERS * 2)) tools/quickstart.sh
END
