# shellcheck shell=bash
# Megatron-DeepSpeed's launch scripts use other names for their values. A name set in the environment counts as the
# variable or flag next to it in these lists. common.sh sources this file before it sets anything.
#
# shellcheck disable=SC2034  # upstream_flags is for common.sh

# NAME THERE, VARIABLE HERE; an exponent after the latter is appended to the value, too
upstream_variables=(
  seq_len SEQ_LEN SEQ_LENGTH SEQ_LEN
  sp_size SEQUENCE_PARALLEL
  batch_size MICRO_BATCH_SIZE global_batch_size GLOBAL_BATCH_SIZE
  zero_stage ZERO_STAGE
  train_tokens TRAIN_TOKENS train_tokens_in_billion TRAIN_TOKENSe9
  lr_warmup_tokens WARMUP_TOKENS lr_warmup_tokens_in_million WARMUP_TOKENSe6
  lr LR min_lr MIN_LR
  num_gpus NUM_GPUS num_gpus_pernode NUM_GPUS GPUS_PER_NODE NUM_GPUS num_node NUM_NODES NNODES NUM_NODES
  data_path DATA_PATH DATASET_PATH DATA_PATH vocab_path VOCAB_FILE merge_path MERGE_FILE
  HF_LLAMA_PATH HF_MODEL
  output_home OUTPUT
  config_json DEEPSPEED_CONFIG DS_CONFIG DEEPSPEED_CONFIG
)

# NAME THERE, FLAG; the same
upstream_settings=(
  train_samples --train-samples
  lr_decay_tokens --lr-decay-tokens lr_decay_tokens_in_billion --lr-decay-tokense9 lr_decay_style --lr-decay-style
  exit_duration --exit-duration-in-mins
  log_interval --log-interval eval_iters --eval-iters eval_interval --eval-interval save_interval --save-interval
  seed --seed init_std --init-method-std
  num_layers --num-layers hidden_size --hidden-size num_attn_heads --num-attention-heads
  NUM_LAYERS --num-layers HIDDEN_SIZE --hidden-size NUM_HEADS --num-attention-heads FFN_HIDDEN_SIZE --ffn-hidden-size
)

# NAME THERE, THE ONLY VALUE that can be honored
upstream_fixed=(mp_size 1 pp_size 1 TP 1 PP 1 activation_checkpoint true)

# take_upstream_variable VARIABLE NAME_THERE VALUE
take_upstream_variable() {
  if [[ -n ${!1:-} && ${!1} != "$3" ]]; then
    give_up "$2 ($3) and $1 (${!1}) say the same and differ; set one of them"
  fi
  printf -v "$1" %s "$3"
}

take_upstream_names() {
  local i name here
  for ((i = 0; i < ${#upstream_fixed[@]}; i += 2)); do
    name=${upstream_fixed[i]} here=${upstream_fixed[i + 1]}
    if [[ ${!name:-$here} != "$here" ]]; then
      give_up "$name (${!name}) must be $here here; set it to that or leave it out"
    fi
  done
  for ((i = 0; i < ${#upstream_variables[@]}; i += 2)); do
    name=${upstream_variables[i]} here=${upstream_variables[i + 1]}
    if [[ -n ${!name:-} ]]; then
      take_upstream_variable "${here%e[0-9]}" "$name" "${!name}${here#"${here%e[0-9]}"}"
    fi
  done
  upstream_flags=()
  for ((i = 0; i < ${#upstream_settings[@]}; i += 2)); do
    name=${upstream_settings[i]} here=${upstream_settings[i + 1]}
    if [[ -n ${!name:-} ]]; then upstream_flags+=("${here%e[0-9]}" "${!name}${here#"${here%e[0-9]}"}"); fi
  done
}
