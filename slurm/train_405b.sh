#!/bin/bash
# CoALM 405B on 128 H100. The signal before the time limit comes early: a save is terabytes.
# For adapters: RECIPE=coalm_405b_lora sbatch --nodes=4 ...
#   source slurm/cluster.env
#   sbatch slurm/train_405b.sh model.hf_path=/models/Llama-3.1-405B-Instruct data.train=/data/coalm_it [key=value ...]
#SBATCH --job-name=coalm_405b
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.log

RECIPE=${RECIPE:-coalm_405b}
source slurm/lib.sh || {
    echo "submit from the root of the repository: sbatch slurm/train_405b.sh" >&2
    exit 2
}

begin "$@"
[[ -n ${SKIP_PREFLIGHT:-} ]] || preflight
ranks -m coalm_nemo.cli train --recipe "$RECIPE" "$@" run.dir="$RUN_DIR"
end $?
