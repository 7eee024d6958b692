#!/usr/bin/env bash
# One machine, a rank for each of its GPUs:
#
#     examples/jobs/one_node.sh score --model my-model --data rows.jsonl --out scores
#     RANKS=4 examples/jobs/one_node.sh run --model my-model --fairness fair.csv ... --out run
#
# Where torch sees no GPU, RANKS must be given. Layer by layer a job keeps how far it came in --out.
# So when a rank dies, torchrun starts all of them again, up to three times, and they go on where
# they were; and so does this command, typed again. A request that is refused is tried again too:
# see the first message.
set -euo pipefail
command=${1:?must be a command of fastdean, such as score, with its options behind it}

# What stands behind the name of the command comes last, and wins.
exec torchrun --standalone --nproc-per-node "${RANKS:-gpu}" --max-restarts 3 \
    --module fastdean "$command" --order layers --rank-timeout 600 "${@:2}"
