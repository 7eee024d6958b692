#!/usr/bin/env bash
# A SLURM job that goes on after its time was up, after preemption and after a failed node:
#
#     sbatch examples/jobs/slurm.sh score --model my-model --data rows.jsonl --out /shared/scores
#
# --out is a folder that all nodes see; it holds how far the job came.
#SBATCH --job-name=fastdean
#SBATCH --nodes=2
# One torchrun a node, which starts a rank for each GPU.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
# A signal for this script, 120 seconds before the time is up. Not SIGTERM, which comes of scancel
# too: a job that is cancelled must not come back.
#SBATCH --signal=B:USR1@120
# SLURM may put the job back into the queue; the log goes on too.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u
command=${1:?must be a command of fastdean, such as score, with its options behind it}
: "${SLURM_JOB_ID:?must be set by SLURM; start this script with sbatch}"

stopping=
step=
# To the ranks alone, not to this script: they write down how far they are, and end. (SIGTERM for
# srun itself would not give them the time.)
stop() {
    stopping=yes
    [ -z "$step" ] || scancel --signal=TERM "$SLURM_JOB_ID"
}
trap stop USR1

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# srun of SLURM 22.05 and some later ones gives a task one CPU, whatever the job has for it.
srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
    torchrun --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "${RANKS:-gpu}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$head:$((20000 + SLURM_JOB_ID % 20000))" \
    --rdzv-id "$SLURM_JOB_ID" \
    --module fastdean "$command" --order layers --rank-timeout 600 "${@:2}" &
step=$!
[ -z "$stopping" ] || stop

# A signal ends `wait` before the step has ended.
while wait "$step"; kill -0 "$step" 2>/dev/null; do :; done
wait "$step"
code=$?

# What failed by itself would fail again; what was stopped goes on.
if [ "$code" -ne 0 ] && [ -n "$stopping" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
