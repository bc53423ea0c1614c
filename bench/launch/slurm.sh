#!/usr/bin/env bash
#SBATCH --job-name=fastpref
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# One run on several nodes of a Slurm cluster, from the folder of this checkout:
#
#     sbatch bench/launch/slurm.sh train --config run.yaml
#
# Five minutes before its time is over every process finishes its step and saves, and the job is
# queued again: the same command goes on, until the run has its result.
set -euo pipefail
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # to its end: with head it may die of SIGPIPE, and so do we
export HEAD NODES=$SLURM_NNODES JOB=$SLURM_JOB_ID GPUS=${SLURM_GPUS_ON_NODE:-8}

again() {
  srun --overlap --ntasks-per-node=1 pkill -USR1 -x fastpref || true
  sleep "${SAVING:-120}" # a step and a save
  scontrol requeue "$SLURM_JOB_ID"
}
trap again USR1

srun bash bench/launch/nodes.sh "$@" &
wait $!
