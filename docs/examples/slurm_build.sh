#!/bin/bash
# A cache by a job array: sbatch slurm_build.sh TEACHER DATA IMAGES CACHE [OPTION ...]
# Every task is a worker on one GPU. Tasks need not run at the same time, and one that is requeued goes on.
#SBATCH --job-name=kdcache-build
#SBATCH --array=0-15
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -eu
teacher=$1 data=$2 images=$3 cache=$4
shift 4
# exec: the signal reaches kdcache, which finishes what it is at.
exec kdcache build --teacher "$teacher" --data "$data" --image-root "$images" --out "$cache" \
  --rank "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))" --world-size "$SLURM_ARRAY_TASK_COUNT" "$@"
