#!/usr/bin/env bash
# One run on several nodes without a scheduler: the same line on each of them, in any order, within
# a quarter of an hour. HEAD: the name of one, which the others reach at PORT; the output_dir and the
# data are on a disk that all see.
#
#     HEAD=node-0 NODES=4 bash bench/launch/nodes.sh train --config run.yaml
#
# A process that dies takes its node's others with it; all start again from the last checkpoint, as
# often as RESTARTS says.
set -euo pipefail
exec torchrun \
  --nnodes "${NODES:?how many nodes}" --nproc-per-node "${GPUS:-8}" \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:?the name of one node}:${PORT:-29500}" \
  --rdzv-id "${JOB:-fastpref}" --max-restarts "${RESTARTS:-3}" \
  --no-python fastpref "$@"
