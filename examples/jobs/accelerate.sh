#!/usr/bin/env bash
# The ranks that a configuration of accelerate asks for:
#
#     examples/jobs/accelerate.sh score --model my-model --data rows.jsonl --out scores
#     CONFIG=my.yaml examples/jobs/accelerate.sh run --model my-model ... --out run
#
# accelerate starts them through torchrun, all of them again when one has died.
set -euo pipefail

exec accelerate launch --config_file "${CONFIG:-$(dirname "$0")/accelerate.yaml}" \
    --max_restarts 3 --module fastdean "$1" --order layers --rank-timeout 600 "${@:2}"
