#!/bin/bash
# CoALM 70B on 32 H100. For adapters: RECIPE=coalm_70b_lora sbatch --nodes=1 ...
#   source slurm/cluster.env
#   sbatch slurm/train_70b.sh model.hf_path=/models/Llama-3.3-70B-Instruct data.train=/data/coalm_it [key=value ...]
#SBATCH --job-name=coalm_70b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.log

RECIPE=${RECIPE:-coalm_70b}
source slurm/lib.sh || {
    echo "submit from the root of the repository: sbatch slurm/train_70b.sh" >&2
    exit 2
}

begin "$@"
[[ -n ${SKIP_PREFLIGHT:-} ]] || preflight
ranks -m coalm_nemo.cli train --recipe "$RECIPE" "$@" run.dir="$RUN_DIR"
end $?
