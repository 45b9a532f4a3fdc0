#!/bin/bash
# A training script on several machines of a SLURM cluster: one torchrun on each, one process for each GPU.
#
#   sbatch --nodes=4 scripts/launch_slurm.sh train_sft.py --dataset_path rows.jsonl --output_dir=/shared/sft
#
# What is typed to sbatch beats the lines below. The output folder has to lie on a file system that all
# machines share. Five minutes before the time is up the run saves, and the job is queued again; so it is where
# SLURM takes its machines away. It then goes on from its newest checkpoint, as it does where a process has died.
#SBATCH --job-name=nanoforge
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300

# seconds that torchrun leaves a process to save, after it has passed the signal on; its default is 30
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
# or processes that torchrun starts again look for those of the start before (pytorch issue 135712)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 40000))      # of its own, as another job may run on that machine

srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" --max_restarts=3 \
    --rdzv_backend=c10d --rdzv_endpoint="$first_node:$port" --rdzv_id="$SLURM_JOB_ID" "$@" --resume=auto &
step=$!
out_of_time=
trap 'out_of_time=1; kill -TERM "$step"' USR1
trap 'kill -TERM "$step"' TERM              # cancelled, or taken off its machines: SLURM queues it itself
while kill -0 "$step" 2>/dev/null; do       # a signal breaks `wait` off
    wait "$step"
    status=$?
done
if [ -n "$out_of_time" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
