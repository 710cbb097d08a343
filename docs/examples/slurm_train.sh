#!/bin/bash
# A student on two machines with 8 GPUs each: sbatch slurm_train.sh CACHE IMAGES STUDENT OUT [OPTION ...]
#SBATCH --job-name=kdcache-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
set -eu
cache=$1 images=$2 student=$3 out=$4
shift 4
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" --no-python \
  kdcache train --cache "$cache" --image-root "$images" --student "$student" --out "$out" --resume "$@"
