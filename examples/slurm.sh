#!/bin/bash
# Train on several nodes with Slurm: sbatch examples/slurm.sh. Edit what stands between the two lines.
# Slurm sends TERM to this script five minutes before the time is up; the run saves, and the job queues again.
# ----
#SBATCH --job-name=losscurve
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --output=slurm-%j.out
# ----
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
set -u

# both on a disk that every node sees
RUN=runs/gpt2
DATA=data/corpus
source .venv/bin/activate

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
launch=(
    torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" --max-restarts=3
    --rdzv_backend=c10d --rdzv_endpoint="$head:29500" --rdzv_id="$SLURM_JOB_ID"
)
if ls -d "$RUN"/step-* > /dev/null 2>&1; then
    train=(-m llm train --out_dir "$RUN" --resume)
else
    train=(-m llm train --preset gpt2-124m --data_dir "$DATA" --out_dir "$RUN" --save_every 10m --parallel ddp)
fi

# TERM goes to the tasks of the step, which are the torchruns; each hands it to its processes, which save. The node that
# ends first must not end the others, one of which may still be writing.
ending=
trap 'ending=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
srun --kill-on-bad-exit=0 --wait=0 "${launch[@]}" "${train[@]}" &
step=$!
code=0
wait "$step" || code=$?
if [ -n "$ending" ]; then # the trap has cut the wait short
    wait "$step" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
