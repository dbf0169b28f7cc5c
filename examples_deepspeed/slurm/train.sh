#!/usr/bin/env bash
# A run under SLURM on one machine or several, one task per GPU, that saves before its time limit and is requeued.
# Submit it from the root of the checkout, with the flags of the program:
#   sbatch --nodes 4 examples_deepspeed/slurm/train.sh --hf-model models/Llama-3.1-8B --seq-length 1048576 ...
# Options of sbatch override those below. docs/clusters.md describes the settings.
#SBATCH --job-name=ulysses
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@1800
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# SLURM runs a copy of this file, so the other one is found from the folder of submission.
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"
task=examples_deepspeed/slurm/rank.sh
if [[ ! -f $task ]]; then
  echo "$PWD has no $task; submit from the root of the checkout" >&2
  exit 2
fi

program=${PROGRAM:-pretrain_gpt.py}
output=${OUTPUT:-runs/$SLURM_JOB_NAME}
max_restarts=${MAX_RESTARTS:-10} # after this many, the job ends where it would be requeued without having saved
restarts=${SLURM_RESTART_COUNT:-0}
machines=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${MASTER_ADDR:-${machines%%$'\n'*}}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export MASTER_ADDR MASTER_PORT

say() { echo "job $SLURM_JOB_ID: $1"; }

requeue() {
  say "$1; requeued"
  scontrol requeue "$SLURM_JOB_ID"
}

mkdir -p "$output/logs"
say "$SLURM_NTASKS ranks on $SLURM_JOB_NUM_NODES machines, rank 0 on $MASTER_ADDR:$MASTER_PORT, $output/logs"

# The caller's --load, of weights to start from, counts only until the run has a checkpoint of its own.
checkpoints=$output/checkpoints
flags=(--load "$checkpoints" "$@" --save "$checkpoints")
if [[ -e $checkpoints/latest ]]; then flags+=(--load "$checkpoints" --finetune=false); fi

# Where a rank is lost the others name it and end by themselves, so srun must not kill them before.
srun --kill-on-bad-exit=0 --wait=0 --open-mode=append --output="$output/logs/rank_%t.log" \
  bash "$task" "${PYTHON:-python}" "$program" "${flags[@]}" &
step=$!

# srun forwards SIGTERM to every rank. The ranks save after the current step, and end with exit code 0.
is_time_up=0
trap 'is_time_up=1; kill -TERM "$step" || true' USR1
code=0
wait "$step" || code=$?
if ((is_time_up && code > 128)); then # the signal interrupted `wait`
  code=0
  wait "$step" || code=$?
fi

if ((code == 0 && is_time_up)); then
  requeue "saved before the time limit"
elif ((restarts < max_restarts && (code == 4 || code == 137 || (code == 143 && is_time_up)))); then
  # 4 and 137: a rank was lost; 143: the ranks had not started to train when time was up
  requeue "exit code $code, restart $((restarts + 1)) of at most $max_restarts"
elif ((code != 0)); then
  say "exit code $code; the reason is in $output/logs" >&2
fi
exit "$code"
