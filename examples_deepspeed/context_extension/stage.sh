# shellcheck shell=bash
# Shared parts of the stages in this folder, on top of sequence_parallel/common.sh: the model, which starts as LLaMA 3
# with 8B parameters, the scaling of its RoPE, and the number of GPUs per sequence. A stage sources this file, sets its
# values, and calls `prepare_stage` and `launch`.
#
# shellcheck disable=SC2034,SC2154  # values are set here for common.sh, and there for the functions below
# shellcheck source=examples_deepspeed/sequence_parallel/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../sequence_parallel/common.sh"

num_layers=32
hidden_size=4096
ffn_hidden_size=14336
num_attention_heads=32
num_key_value_heads=8
tokenizer_type=${TOKENIZER_TYPE:-HFTokenizer}
needed=(LOAD)

# --- RoPE: a larger theta by default, or the model's own theta and a scaling ------------------------------------------
original_theta=${ORIGINAL_THETA:-500000}
original_len=${ORIGINAL_LEN:-8192}           # context of the model before the first stage
rope_scaling=${ROPE_SCALING:-none}           # linear, dynamic, yarn or llama3
rope_scaling_factor=${ROPE_SCALING_FACTOR:-} # default: sequence / original context, rounded up

choose_rope() {
  original_len=$(in_digits ORIGINAL_LEN "$original_len")
  if [[ $rope_scaling == none ]]; then
    rotary_theta=${ROTARY_THETA:-$stretched_theta}
    rope=()
    return
  fi
  local factor=${rope_scaling_factor:-$(((seq_len + original_len - 1) / original_len))}
  rotary_theta=${ROTARY_THETA:-$original_theta}
  rope=(--rope-scaling-type "$rope_scaling" --rope-scaling-factor "$factor")
  if [[ $rope_scaling != linear ]]; then rope+=(--rope-scaling-original-max-position-embeddings "$original_len"); fi
}

prepare_stage() {
  if [[ $model_scale == tiny ]]; then
    SEQ_LEN=${SEQ_LEN:-$tiny_seq_len}
    CHUNK_SIZE=${CHUNK_SIZE:-$((tiny_seq_len / 4))}
    original_len=${ORIGINAL_LEN:-512}
  fi
  scale_model
  find_data
  find_gpus
  choose_rope
  if ((num_processes > gpus_per_sequence)); then sequence_parallel=${sequence_parallel:-$gpus_per_sequence}; fi
  assemble_arguments
  # Only the previous stage's weights may have another RoPE; the checkpoints of this stage must match its own.
  if [[ " ${files[*]} " == *" --finetune "* ]]; then files+=(--change-rope); fi
  model=("${llama[@]}" "${rope[@]}")
  parallel=("${fpdt[@]}")
}
