# shellcheck shell=bash
# Shared parts of the launch scripts in this folder. A script sources this file, sets its values, calls `prepare`, which
# builds blocks of arguments from them, chooses `model` and `parallel`, and calls `launch`. The values below are the
# defaults; a variable of the same name in capitals overrides any of them.
#
# shellcheck disable=SC2034,SC2154  # values are set here for the scripts, and there for the functions below

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

give_up() {
  echo "$1" >&2
  exit 2
}

# Prints a command, or runs it.
step() {
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# in_digits VARIABLE VALUE: print a number of tokens such as 131072, 131,072, 128K or 1.5M in digits; "auto" and nothing
# as they are.
in_digits() {
  local name=$1 text=$2 unit=1 count
  if [[ -z $text || ${text,,} == auto ]]; then
    echo "$text"
    return
  fi
  case $text in
    *[kK]) unit=1024 ;;
    *[mM]) unit=1048576 ;;
  esac
  if [[ $text =~ ^([0-9]+|[0-9]{1,3}([,_][0-9]{3})+)((\.[0-9]+)?[kKmM]|[eE][0-9]{1,2})?$ ]]; then
    text=${text//[,_]/}
    count=$(awk -v number="${text%[kKmM]}" -v unit=$unit 'BEGIN { printf "%.15g", number * unit }')
  fi
  if [[ ! ${count:-} =~ ^[0-9]+$ ]]; then
    give_up "$name ($2) is not a number of tokens; give one, such as 131072, 128K or 1M"
  fi
  echo "$count"
}

# shellcheck source=examples_deepspeed/sequence_parallel/upstream_names.sh
. "$repository/examples_deepspeed/sequence_parallel/upstream_names.sh"
take_upstream_names

# --- values that most scripts leave as they are -----------------------------------------------------------------------
sequence_parallel=${SEQUENCE_PARALLEL:-}  # GPUs that share one sequence; default: all of them
num_gpus=${NUM_GPUS:-}                    # per machine; default: all, or those in CUDA_VISIBLE_DEVICES
num_nodes=${NUM_NODES:-}                  # machines of the hostfile; default: all of them
hostfile=${HOSTFILE:-/job/hostfile}       # lines such as "worker-1 slots=8"; without the file: this machine
micro_batch_size=${MICRO_BATCH_SIZE:-1}
global_batch_size=${GLOBAL_BATCH_SIZE:-}  # default: one micro-batch for each group of GPUs that shares a sequence
zero_stage=${ZERO_STAGE:-3}
attention=${ATTENTION:-use-flash-attn}    # the fastest kernel; or use-flash-attn-v2, -v3, -v4
split=${SPLIT:-99,1,0}                    # shares of the documents for training, validation and test
model_scale=${MODEL_SCALE:-full}
program=pretrain_gpt.py
load_is_made=${LOAD_IS_MADE:-0}           # 1: an earlier step writes LOAD, and a dry run skips that step
needed=() # variables that a script requires
chunk_size=
num_layers=
hidden_size=
num_attention_heads=
ffn_hidden_size=
num_key_value_heads=
rotary_theta=
log_interval=1
eval_iters=10
eval_interval=100
save_interval=100

# --- the tiny scale: the same flags with a model that a CPU can train -------------------------------------------------
# Sets `seq_len` and `chunk_size` in digits as well.
scale_model() {
  case $model_scale in
    full) ;;
    tiny)
      seq_len=${SEQ_LEN:-4K}
      chunk_size=${CHUNK_SIZE:-1K}
      ;;
    *) give_up "MODEL_SCALE ($model_scale) must be full or tiny; leave it out for the full model" ;;
  esac
  seq_len=$(in_digits SEQ_LEN "$seq_len")
  chunk_size=$(in_digits CHUNK_SIZE "$chunk_size")
  if [[ $model_scale == full ]]; then return; fi
  train_tokens=${TRAIN_TOKENS:-$((4 * seq_len))}
  warmup_tokens=${WARMUP_TOKENS:-$seq_len}
  output=${OUTPUT:-${output}_tiny}
  split=${SPLIT:-90,10,0}
  num_layers=2
  hidden_size=64
  ffn_hidden_size=160
  num_attention_heads=4
  num_key_value_heads=2
  eval_iters=1
  eval_interval=2
}

# --- data and tokenizer -----------------------------------------------------------------------------------------------
# Sets `data`. Nothing is downloaded: every file is named by the user, and `needed` may name more of them.
find_data() {
  local tokenizer missing=() data_words
  needed+=(DATA_PATH)
  case $tokenizer_type in
    GPT2BPETokenizer)
      needed+=(VOCAB_FILE MERGE_FILE)
      tokenizer=(--vocab-file "${VOCAB_FILE:-}" --merge-file "${MERGE_FILE:-}")
      ;;
    NullTokenizer)
      needed+=(VOCAB_SIZE)
      tokenizer=(--vocab-size "${VOCAB_SIZE:-}")
      ;;
    *)
      needed+=(TOKENIZER_MODEL)
      tokenizer=(--tokenizer-model "${TOKENIZER_MODEL:-}")
      ;;
  esac
  for name in "${needed[@]}"; do
    if [[ -z ${!name:-} ]]; then missing+=("$name"); fi
  done
  if ((${#missing[@]} > 0)); then
    give_up "${missing[*]} not set: with TOKENIZER_TYPE $tokenizer_type this script needs ${needed[*]}; set them and\
 start again (tools/preprocess_data.py makes data, tools/train_tokenizer.py a tokenizer)"
  fi
  read -ra data_words <<<"$DATA_PATH"
  data=(--data-path "${data_words[@]}" --split "$split" --tokenizer-type "$tokenizer_type" "${tokenizer[@]}")
}

# --- GPUs and machines ------------------------------------------------------------------------------------------------
count_gpus() {
  if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .
  elif command -v nvidia-smi >/dev/null; then
    nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
  else
    echo 0
  fi
}

# Sets `num_processes`, `gpus_per_node`, `launcher` and `device`. One machine is started without ssh.
find_gpus() {
  local gpus_found slots=() on_gpus=1
  launcher=(deepspeed --quiet)
  device=(--bf16 "--$attention")
  if [[ -n ${MASTER_PORT:-} ]]; then launcher+=(--master_port "$MASTER_PORT"); fi
  if [[ -n ${HOSTFILE:-} && ! -f $hostfile ]]; then
    give_up "HOSTFILE ($hostfile) is no file; name one with a line such as \"worker-1 slots=8\" for each machine"
  fi
  if [[ -f $hostfile && $model_scale == full ]]; then
    while read -r line; do
      line=${line%%#*}
      if [[ $line =~ slots=([0-9]+) ]]; then slots+=("${BASH_REMATCH[1]}"); fi
    done <"$hostfile"
  fi
  if [[ $model_scale == full ]] && ((${num_nodes:-1} > 1 && num_nodes > ${#slots[@]})); then
    give_up "NUM_NODES ($num_nodes) is more than the ${#slots[@]} machines of $hostfile; use at most\
 $((${#slots[@]} > 0 ? ${#slots[@]} : 1)), or name each machine in HOSTFILE"
  fi
  if ((${#slots[@]} > 1)) && [[ ${num_nodes:-2} != 1 ]]; then
    gpus_per_node=${num_gpus:-${slots[0]}}
    num_nodes=${num_nodes:-${#slots[@]}}
    for count in "${slots[@]:0:num_nodes}"; do
      if ((count < gpus_per_node)); then
        give_up "$hostfile has a machine with $count GPUs, and $gpus_per_node are to be used on each; set NUM_GPUS=$count"
      fi
    done
    num_processes=$((num_nodes * gpus_per_node))
    launcher+=(--hostfile "$hostfile" --num_nodes "$num_nodes" --num_gpus "$gpus_per_node")
    return
  fi
  gpus_found=$(count_gpus)
  if [[ $model_scale == tiny ]]; then
    if ((gpus_found == 0)); then on_gpus=0; fi
    num_processes=${num_gpus:-$((gpus_found == 1 ? 1 : 2))}
  else
    num_processes=${num_gpus:-$gpus_found}
  fi
  if ((num_processes == 0)); then
    give_up "no GPU found; set NUM_GPUS if that is wrong, or MODEL_SCALE=tiny for a tiny model on the CPU"
  fi
  gpus_per_node=$num_processes
  # The launcher reads CUDA_VISIBLE_DEVICES only where it gets no --num_gpus.
  if [[ -n $num_gpus || -z ${CUDA_VISIBLE_DEVICES:-} || $model_scale == tiny ]]; then
    launcher+=(--num_gpus "$num_processes")
  fi
  if ((!on_gpus)); then
    device=() # fp32, and the attention kernel that fits
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} # or every process of DeepSpeed warns that it found no GPU
  fi
}

# --- blocks of arguments ----------------------------------------------------------------------------------------------
# Sets `gpt`, `llama`, `fpdt`, `ulysses`, `zero`, `training` and `files`.
assemble_arguments() {
  gpt=(
    --num-layers "$num_layers"
    --hidden-size "$hidden_size"
    --num-attention-heads "$num_attention_heads"
    --seq-length "$seq_len"
    --max-position-embeddings "$seq_len"
  )
  llama=(
    --num-layers "$num_layers"
    --hidden-size "$hidden_size"
    --ffn-hidden-size "$ffn_hidden_size"
    --num-attention-heads "$num_attention_heads"
    --num-key-value-heads "$num_key_value_heads"
    --seq-length "$seq_len"
    --max-position-embeddings "$seq_len"
    --use-rotary-position-embeddings
    --rotary-position-embeddings-theta "$rotary_theta"
    --normalization rmsnorm
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
  )
  ulysses=(--ds-sequence-parallel-size "${sequence_parallel:-$num_processes}")
  fpdt=(
    "${ulysses[@]}"
    --ds-sequence-parallel-fpdt
    --ds-sequence-parallel-fpdt-chunk-size "$chunk_size"
    --ds-sequence-parallel-fpdt-offloading
  )
  zero=(--deepspeed --zero-stage "$zero_stage" --deepspeed-activation-checkpointing --checkpoint-in-cpu)
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
    --attention-dropout 0
    --hidden-dropout 0
    --eval-iters "$eval_iters"
    --eval-interval "$eval_interval"
  )
  if [[ -n $global_batch_size ]]; then training+=(--global-batch-size "$global_batch_size"); fi
  files=(
    --log-interval "$log_interval"
    --tensorboard-dir "$output/tensorboard"
    --save "$output/checkpoints"
    --save-interval "$save_interval"
  )
  # A restarted run resumes from its own checkpoints; only a new run starts from the weights of LOAD.
  if [[ -n ${LOAD:-} && ! -f $output/checkpoints/latest ]]; then
    files+=(--load "$LOAD" --finetune)
  else
    files+=(--load "$output/checkpoints")
  fi
}

# Check whether a folder holds weights of any form: safetensors, a checkpoint, or checkpoints.
holds_weights() {
  local folder=$1
  if [[ -f $folder/latest ]]; then
    folder+=/$(<"$folder/latest")
  elif compgen -G "$folder/global_step*" >/dev/null; then
    return
  fi
  compgen -G "$folder/model.safetensors*" >/dev/null || [[ -f $folder/zero/optimizer_state.pt ]] ||
    compgen -G "$folder/*mp_rank_00_model_states.pt" >/dev/null
}

# Check LOAD here, so that a dry run fails, too, where the run could not start.
check_load() {
  if [[ $load_is_made != 1 && " ${files[*]} " == *" --finetune "* ]] && ! holds_weights "$LOAD"; then
    give_up "LOAD ($LOAD) holds no weights; name a folder of checkpoints, one of them (global_stepN), or a folder of\
 safetensors such as tools/hf2megads_weight_converter.py to-megatron writes"
  fi
}

prepare() {
  scale_model
  find_data
  find_gpus
  assemble_arguments
}

# Print the estimates of tools/plan_context.py for the flags to standard error.
print_plan() {
  local gpu=(--gpu "${PLAN_GPU:-$(name_gpu)}")
  if [[ -z ${gpu[1]} ]]; then
    echo "no plan: this is no GPU that the planner knows; set PLAN_GPU, such as PLAN_GPU=H100" >&2
    return
  fi
  if [[ -n ${PLAN_HOST_MEMORY:-} ]]; then
    gpu+=(--host-memory "$PLAN_HOST_MEMORY")
  elif [[ -r /proc/meminfo ]]; then
    gpu+=(--host-memory here)
  fi
  "${PYTHON:-python3}" "$repository/tools/plan_context.py" "${gpu[@]}" --gpus "$num_processes" \
    --gpus-per-node "$gpus_per_node" -- "$@" >&2 || true
}

name_gpu() {
  local name
  name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 || true)
  case $name in
    *H200*) echo H200 ;;
    *H100* | *H800*) echo H100 ;;
    *A100*80GB* | *A800*80GB*) echo A100-80GB ;;
  esac
}

# Copy the log to the output, in the compact form on a terminal.
show_log() {
  if [[ -t 1 ]]; then "${PYTHON:-python3}" "$repository/tools/compact_log.py"; else cat; fi
}

# --- launch -----------------------------------------------------------------------------------------------------------
# The arguments are more flags of the program, which override the script's own.
launch() {
  local flags=("${model[@]}" "${parallel[@]}" "${zero[@]}" "${device[@]}" "${training[@]}" "${data[@]}" "${files[@]}")
  flags+=("${upstream_flags[@]}" "$@")
  check_load
  local command=("${launcher[@]}" "$repository/$program" "${flags[@]}")
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "${command[@]}"
    echo
    if [[ $model_scale == full ]]; then
      print_plan "${flags[@]}"
    fi
    return
  fi
  if ! command -v deepspeed >/dev/null; then
    give_up "no deepspeed on the PATH; run \`make venv\` and \`. .venv/bin/activate\`, and start again"
  fi
  mkdir -p "$output"
  "${command[@]}" 2>&1 | tee -a "$output/train.log" | show_log
}
