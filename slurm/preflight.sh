#!/bin/bash
# Looks at nodes before they are trusted with a run: sbatch --nodes=16 slurm/preflight.sh. The train scripts do it first too.
# SPARES=1 sbatch --nodes=17 ... is content with 16 good ones; who is broken or slow is named.
#SBATCH --job-name=preflight
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=00:15:00
#SBATCH --no-requeue
#SBATCH --output=logs/%x-%j.log

RECIPE=preflight
source slurm/lib.sh || {
    echo "submit from the root of the repository: sbatch slurm/preflight.sh" >&2
    exit 2
}

begin
preflight
