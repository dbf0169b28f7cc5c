#!/usr/bin/env bash
# Extend the context of a LLaMA of 8B parameters from 8,192 to 1,048,576 tokens, in stages: each starts from the weights
# of the previous one, the first from those of LOAD. After a restart, it resumes where it stopped.
#
#   DATA_PATH=data/corpus_text_document TOKENIZER_MODEL=llama/tokenizer.json LOAD=weights/llama \
#     examples_deepspeed/context_extension/extend_llama_8B_to_1m.sh
#
#   DRY_RUN=1, MODEL_SCALE=tiny   as for each stage
#
# A variable applies to all stages; with a stage's name as suffix, to that one: DATA_PATH_1M=data/books LR_128K=1e-5
set -euo pipefail
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

stages=(128k 1m)
output=${OUTPUT:-runs/llama_8B_extended}
if [[ -z ${OUTPUT:-} && ${MODEL_SCALE:-full} == tiny ]]; then output+=_tiny; fi # the full model must not resume from it
load=${LOAD:-}
load_is_made=0

for stage in "${stages[@]}"; do
  settings=()
  for variable in $(compgen -e | grep "_${stage^^}\$" || true); do
    settings+=("${variable%"_${stage^^}"}=${!variable}")
  done
  env LOAD="$load" LOAD_IS_MADE="$load_is_made" OUTPUT="$output/$stage" "${settings[@]}" \
    "$folder/ds_extend_llama_8B_fpdt_$stage.sh" "$@"
  load=$output/$stage/checkpoints
  load_is_made=${DRY_RUN:-0}
done
