# shellcheck shell=bash
# What the scripts beside this one share; they source it, at the root of the repository, inside a job.

asked=""    # the signal that asked this job to stop
srun_pid="" # of the step that runs now
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

say() { echo "[$(date +%F\ %T)] $*"; }
refuse() { echo "slurm: $*" >&2; exit 2; }
pass_on() { asked=$1; [[ -z $srun_pid ]] || kill -"$1" "$srun_pid" 2>/dev/null; } # srun hands it to every rank

# begin [key=value ...]: the cluster's settings, the run directory, and whether this job may start (again).
begin() {
    [[ -n ${SLURM_JOB_ID:-} ]] || refuse "start this with sbatch"
    local settings=${CLUSTER_ENV:-slurm/cluster.env} word
    [[ -r $settings ]] || refuse "the cluster's settings $settings cannot be read"
    # shellcheck source=slurm/cluster.env
    source "$settings"
    : "${CONTAINER:=none}" "${PYTHON:=python3}" "${MAX_STALLED_STARTS:=3}" "${MAX_STARTS:=50}"
    for word; do [[ $word != run.dir=* ]] || RUN_DIR=${word#run.dir=}; done
    RUN_DIR=$(realpath -m "${RUN_DIR:-runs/$RECIPE}")
    STARTS=$RUN_DIR/slurm_starts.tsv # a line a start: time, job, newest checkpoint's step, nodes
    mkdir -p "$RUN_DIR" || refuse "the run directory $RUN_DIR cannot be made"
    describe
    refuse_second_job
    if hopeless; then exit 1; fi # a node failure is requeued by SLURM, without `end`
    printf '%s\t%s\t%s\t%s\n' "$(date +%FT%T)" "$SLURM_JOB_ID" "$(newest_step)" "$SLURM_JOB_NODELIST" >>"$STARTS"
}

describe() {
    local commit
    commit=$(git rev-parse --short HEAD 2>/dev/null) || commit=unknown
    [[ $commit == unknown ]] || git diff --quiet HEAD || commit+=", changed since"
    say "job $SLURM_JOB_ID ($SLURM_JOB_NAME), start $((${SLURM_RESTART_COUNT:-0} + 1))"
    echo "  nodes       $SLURM_JOB_NUM_NODES x ${SLURM_NTASKS_PER_NODE:-1} ranks: $SLURM_JOB_NODELIST"
    echo "  recipe      $RECIPE"
    echo "  run         $RUN_DIR, newest checkpoint: step $(newest_step)"
    echo "  commit      $commit"
    echo "  python      $PYTHON, container: $CONTAINER${IMAGE:+ ($IMAGE)}"
}

refuse_second_job() {
    local other
    other=$(tail -n1 "$STARTS" 2>/dev/null | cut -f2)
    [[ -z $other || $other == "$SLURM_JOB_ID" ]] && return
    [[ -z $(squeue --noheader --jobs="$other" --states=RUNNING,COMPLETING 2>/dev/null) ]] ||
        refuse "job $other is training in $RUN_DIR; wait for it, or give this one another RUN_DIR"
}

# Step of the newest complete checkpoint; 0 if there is none.
newest_step() {
    local manifest newest=0
    for manifest in "$RUN_DIR"/checkpoints/step_*/manifest.json; do
        [[ $manifest =~ /step_([0-9]+)/manifest.json$ ]] && newest=$((10#${BASH_REMATCH[1]}))
    done
    echo "$newest"
}

# Whether this job has started too often, at the newest checkpoint or at all; says so.
hopeless() {
    local step stalled all
    step=$(newest_step)
    stalled=$(awk -v job="$SLURM_JOB_ID" -v step="$step" '$2 == job && $3 == step' "$STARTS" 2>/dev/null | wc -l)
    all=$(awk -v job="$SLURM_JOB_ID" '$2 == job' "$STARTS" 2>/dev/null | wc -l)
    if ((stalled >= MAX_STALLED_STARTS)); then
        say "giving up: $stalled starts since step $step brought no newer checkpoint (MAX_STALLED_STARTS)"
    elif ((all >= MAX_STARTS)); then
        say "giving up: this job has started $all times (MAX_STARTS)"
    else
        return 1
    fi
}

# ranks ARGUMENTS: `python ARGUMENTS` once a task. The ranks find one another from SLURM's own variables.
ranks() {
    [[ -z $asked ]] || return 75
    local cpus=$((SLURM_CPUS_ON_NODE / ${SLURM_NTASKS_PER_NODE:-1})) inside=() mounts code
    ((cpus < 2)) || cpus=$((cpus / 2 * 2)) # whole cores, where a core has two threads
    mounts=$PWD:$PWD,$RUN_DIR:$RUN_DIR${MOUNTS:+,$MOUNTS}
    local options=(--mpi=none --label --kill-on-bad-exit=1 --cpus-per-task="$((cpus > 0 ? cpus : 1))")
    case $CONTAINER in
    none) ;;
    pyxis) options+=(--container-image="$IMAGE" --container-mounts="$mounts" --container-workdir="$PWD") ;;
    apptainer) inside=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$IMAGE") ;;
    *) refuse "CONTAINER=$CONTAINER in the cluster's settings; use none, pyxis or apptainer" ;;
    esac
    srun "${options[@]}" bash slurm/rank.sh "${inside[@]}" "$PYTHON" "$@" &
    srun_pid=$!
    wait "$srun_pid"
    code=$?
    while kill -0 "$srun_pid" 2>/dev/null; do # a signal ends `wait`, not srun
        wait "$srun_pid"
        code=$?
    done
    srun_pid=""
    return "$code"
}

preflight() {
    ranks -m coalm_nemo.preflight --run-dir "$RUN_DIR" --gpus-per-node "${GPUS_PER_NODE:-0}" \
        --min-disk-gib "${MIN_DISK_GIB:-0}" --min-shm-gib "${MIN_SHM_GIB:-0}" --min-bus-gb-per-s "${MIN_BUS_GB_PER_S:-0}"
    local code=$?
    ((code == 0)) && return
    [[ -z $asked ]] || end 75
    say "preflight failed ($code): not trained; sbatch --exclude=NODE ... leaves a node out, SKIP_PREFLIGHT=1 the check"
    exit "$code"
}

# end CODE: what the training's exit code means for this job.
end() {
    case $1 in
    0) say "finished at step $(newest_step)" && exit 0 ;;
    2) say "bad input (exit code 2): not started again" && exit 2 ;;
    3) say "the loss was not finite (exit code 3): not started again; the rows are named in $RUN_DIR" && exit 3 ;;
    75) say "stopped by a signal at step $(newest_step) (exit code 75)" ;;
    *) say "ended with exit code $1 at step $(newest_step)${asked:+, after SIG$asked}" ;;
    esac
    local state
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
    if [[ $state != RUNNING && $state != CONFIGURING ]]; then # what follows is SLURM's decision
        say "cancelled, preempted, past its time or without a node (${state:-no answer from squeue}): not requeued from here"
        exit "$1"
    fi
    if hopeless; then exit "$1"; fi
    say "requeued: goes on from step $(newest_step)"
    scontrol requeue "$SLURM_JOB_ID" || say "SLURM refuses to requeue; the same sbatch line goes on from there"
    exit "$1"
}
