#!/usr/bin/env bash
# The ranks that a configuration of accelerate asks for:
#
#     examples/jobs/accelerate.sh score --model my-model --data rows.jsonl --out scores
#     CONFIG=my.yaml examples/jobs/accelerate.sh run --model my-model ... --out run
#
# accelerate starts them through torchrun, all of them again when one has died.
set -euo pipefail
command=${1:?must be a command of fastdean, such as score, with its options behind it}

exec accelerate launch --config_file "${CONFIG:-$(dirname "$0")/accelerate.yaml}" \
    --max_restarts 3 --module fastdean "$command" --order layers --rank-timeout 600 "${@:2}"
