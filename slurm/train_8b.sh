#!/bin/bash
# CoALM 8B on 8 H100. RECIPE=coalm_8b_lora (or any other name in recipes/) changes the recipe.
#   source slurm/cluster.env
#   sbatch slurm/train_8b.sh model.hf_path=/models/Llama-3.1-8B-Instruct data.train=/data/coalm_it [key=value ...]
#SBATCH --job-name=coalm_8b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.log

RECIPE=${RECIPE:-coalm_8b}
source slurm/lib.sh || {
    echo "submit from the root of the repository: sbatch slurm/train_8b.sh" >&2
    exit 2
}

begin "$@"
[[ -n ${SKIP_PREFLIGHT:-} ]] || preflight
ranks -m coalm_nemo.cli train --recipe "$RECIPE" "$@" run.dir="$RUN_DIR"
end $?
