#!/usr/bin/env bash
# Two machines, a rank for each GPU of both; typed on both, with the name of one of the two:
#
#     HEAD=node-a:29400 examples/jobs/two_nodes.sh score --model my-model --data rows.jsonl \
#         --out /shared/scores
#
# Model and rows are read on both. --out is a folder that both see: which rank a process is may
# change when all are started again after one has died. Then they go on where they were.
set -euo pipefail
command=${1:?must be a command of fastdean, such as score, with its options behind it}

exec torchrun --nnodes 2 --nproc-per-node "${RANKS:-gpu}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:?must be HOST:PORT of one of the machines}" \
    --rdzv-id "${JOB:-fastdean}" \
    --module fastdean "$command" --order layers --rank-timeout 600 "${@:2}"
