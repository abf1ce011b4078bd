# shellcheck shell=bash
# What the scripts beside this one share; they source it, at the root of the repository, inside a job.

asked=""      # why this job was asked to stop
srun_pid=""   # of the step that runs now
sound_node="" # where Python has been seen to start
chosen=()     # srun's options for the nodes that are used; none: all
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

say() { echo "[$(date +%F\ %T)] $*"; }
refuse() { echo "slurm: $*" >&2; exit 2; }

# The signal goes on to every rank, by srun. Who has lost the node with this script on it has no time for a last word, so
# a TERM (SLURM's, before it takes the nodes away) is written down at once.
pass_on() {
    [[ -z $srun_pid ]] || kill -"$1" "$srun_pid" 2>/dev/null
    case $1 in
    TERM) [[ $asked == taken ]] || { note "$(who_took_it)" && asked=taken; } ;;
    *) [[ -n $asked ]] || asked=signal && near_the_limit && asked="time limit" ;;
    esac
}

job_state() { squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T; }

# Why SLURM takes the nodes: one of them is gone, or it (or somebody, by `scontrol requeue`) wants them for another job.
who_took_it() {
    local gone
    gone=$(sinfo --noheader --Node --nodes="$SLURM_JOB_NODELIST" --states=down --format=%N 2>/dev/null)
    if [[ -n $gone ]]; then echo "node lost"; else echo preempted; fi
}

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
    EVENTS=$RUN_DIR/slurm_events.tsv # time, job, what, step reached, newest checkpoint's step, nodes
    mkdir -p "$RUN_DIR" || refuse "the run directory $RUN_DIR cannot be made"
    describe
    refuse_second_job
    if [[ $(last_event) == finished ]]; then say "this job has finished before: not started again" && exit 0; fi
    if [[ $(last_event) == start ]]; then note "node lost"; fi # SLURM requeued it, and nobody was left to say why
    if hopeless; then exit 1; fi
    note start
    export LOG_DIR=$RUN_DIR/logs/$SLURM_JOB_ID-$((${SLURM_RESTART_COUNT:-0} + 1))
    watch_the_limit >/dev/null 2>&1 &
    # shellcheck disable=SC2064 # this one's number, not a later one's
    trap "kill $! 2>/dev/null" EXIT
}

describe() {
    local commit
    commit=$(git rev-parse --short HEAD 2>/dev/null) || commit=unknown
    [[ $commit == unknown ]] || git diff --quiet HEAD || commit+=", changed since"
    say "job $SLURM_JOB_ID ($SLURM_JOB_NAME), start $((${SLURM_RESTART_COUNT:-0} + 1))"
    echo "  nodes       $SLURM_JOB_NUM_NODES x ${SLURM_NTASKS_PER_NODE:-1} ranks: $SLURM_JOB_NODELIST"
    echo "  recipe      $RECIPE"
    echo "  run         $RUN_DIR, newest checkpoint: step $(newest_step)"
    echo "  before      $(causes)"
    echo "  commit      $commit"
    echo "  python      $PYTHON, container: $CONTAINER${IMAGE:+ ($IMAGE)}"
}

refuse_second_job() {
    local other
    other=$(tail -n1 "$EVENTS" 2>/dev/null | cut -f2)
    [[ -z $other || $other == "$SLURM_JOB_ID" ]] && return
    [[ -z $(squeue --noheader --jobs="$other" --states=RUNNING,COMPLETING 2>/dev/null) ]] ||
        refuse "job $other is training in $RUN_DIR; wait for it, or give this one another RUN_DIR"
}

# note WHAT: a line of the events; where the disk is full the run goes on without it.
note() {
    printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$(date +%FT%T)" "$SLURM_JOB_ID" "$1" "$(reached_step)" "$(newest_step)" \
        "$SLURM_JOB_NODELIST" >>"$EVENTS" || say "$EVENTS cannot be written"
}

mine() { awk -F'\t' -v job="$SLURM_JOB_ID" '$2 == job' "$EVENTS" 2>/dev/null; } # this job's events
last_event() { mine | tail -n1 | cut -f3; }

# "2 crashed, 1 time limit": how this job's starts ended, each cause by itself.
causes() {
    local counted
    counted=$(mine | awk -F'\t' '$3 != "start" {n[$3]++} END {for (c in n) printf "%s%d %s", s++ ? ", " : "", n[c], c}')
    echo "${counted:-the first start}"
}

# Step of the newest complete checkpoint; 0 if there is none.
newest_step() {
    local manifest newest=0
    for manifest in "$RUN_DIR"/checkpoints/step_*/manifest.json; do
        [[ $manifest =~ /step_([0-9]+)/manifest.json$ ]] && newest=$((10#${BASH_REMATCH[1]}))
    done
    echo "$newest"
}

# The last step that was done, by the run's metrics; 0 if none.
reached_step() {
    local step
    step=$(tail -n1 "$RUN_DIR/metrics.jsonl" 2>/dev/null | grep -o '"step": [0-9]*' | grep -o '[0-9]*$')
    echo "${step:-0}"
}

# Whether this job has failed too often, at one step or at the newest checkpoint, or started too often; says so.
hopeless() {
    local step reached stalled same all
    step=$(newest_step) reached=$(reached_step)
    stalled=$(mine | awk -F'\t' -v s="$step" '$3 ~ /crashed|killed|hung|lost/ && $5 == s' | wc -l)
    same=$(mine | awk -F'\t' -v s="$reached" '$3 ~ /crashed|killed|hung/ && $4 == s && $4 > $5' | wc -l)
    all=$(mine | awk -F'\t' '$3 == "start"' | wc -l)
    if ((same >= MAX_STALLED_STARTS)); then
        say "giving up: step $((reached + 1)) has failed $same times (MAX_STALLED_STARTS); look at its rows:"
        one_rank -m coalm_nemo.training.rows_of_step "$RUN_DIR" $((reached + 1))
    elif ((stalled >= MAX_STALLED_STARTS)); then
        say "giving up: $stalled failures since step $step brought no newer checkpoint (MAX_STALLED_STARTS)"
        ((reached < step)) || one_rank -m coalm_nemo.training.rows_of_step "$RUN_DIR" $((reached + 1))
    elif ((all >= MAX_STARTS)); then
        say "giving up: this job has started $all times (MAX_STARTS)"
    else
        return 1
    fi
}

# Seconds until SLURM ends this job; nothing where it has no limit.
seconds_left() {
    local until
    until=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e 2>/dev/null)
    [[ $until == 2* ]] && echo $(($(date -d "$until" +%s) - $(date +%s)))
}

# What a stop takes: by the saves that the run has measured, and a reserve.
stop_takes() {
    local measured
    measured=$(cat "$RUN_DIR/stop_seconds" 2>/dev/null)
    echo $((${measured:-0} + ${STOP_RESERVE_S:-60}))
}

near_the_limit() { local left && left=$(seconds_left) && ((left <= ${SIGNAL_LEAD_S:-900} + 90)); }

# --signal comes at a fixed time before the limit; where saves take longer than that, this comes first.
watch_the_limit() {
    trap - USR1 TERM EXIT
    local left
    while sleep "${LIMIT_EVERY_S:-20}"; do
        left=$(seconds_left) || continue
        ((left > $(stop_takes))) || { kill -USR1 $$ && return; }
    done
}

# step_of OPTIONS -- ARGUMENTS: sets `step` to the srun that runs `python ARGUMENTS` once a task, in the container if any.
step_of() {
    local cpus=$((SLURM_CPUS_ON_NODE / ${SLURM_NTASKS_PER_NODE:-1})) inside=() mounts options=()
    ((cpus < 2)) || cpus=$((cpus / 2 * 2)) # whole cores, where a core has two threads
    while [[ $1 != -- ]]; do options+=("$1") && shift; done
    shift
    mounts=$PWD:$PWD,$RUN_DIR:$RUN_DIR${MOUNTS:+,$MOUNTS}
    options+=(--mpi=none --cpus-per-task="$((cpus > 0 ? cpus : 1))")
    case $CONTAINER in
    none) ;;
    pyxis) options+=(--container-image="$IMAGE" --container-mounts="$mounts" --container-workdir="$PWD") ;;
    apptainer) inside=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$IMAGE") ;;
    *) refuse "CONTAINER=$CONTAINER in the cluster's settings; use none, pyxis or apptainer" ;;
    esac
    step=(srun "${options[@]}" bash slurm/rank.sh "${inside[@]}" "$PYTHON" "$@")
}

# one_rank ARGUMENTS: `python ARGUMENTS` once, on `sound_node` or whichever.
one_rank() {
    local step
    step_of --nodes=1 --ntasks=1 --ntasks-per-node=1 ${sound_node:+--nodelist="$sound_node"} -- "$@"
    LOG_DIR=$LOG_DIR/one LINGER_S=0 "${step[@]}"
}

# ranks [OPTIONS --] ARGUMENTS: `python ARGUMENTS` once a task. The ranks find one another from SLURM's own variables.
ranks() {
    [[ -z $asked ]] || return 75
    local code step
    step_of --kill-on-bad-exit=1 "${chosen[@]}" -- "$@"
    wait_for "${step[@]}"
}

# wait_for COMMAND: run it so that signals are handled meanwhile; its exit code.
wait_for() {
    "$@" &
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

# preflight: look at every node; what is broken or slow is left out, where the job was given SPARES.
preflight() {
    local wanted=$((SLURM_JOB_NUM_NODES - ${SPARES:-0})) code step found=$LOG_DIR/preflight
    mkdir -p "$found"
    step_of --kill-on-bad-exit=0 --wait=240 -- -m coalm_nemo.preflight look --found "$found" --run-dir "$RUN_DIR"
    LOG_DIR=$found LINGER_S=0 wait_for "${step[@]}"
    [[ -z $asked ]] || end 75
    sound_node=$(cat "$found"/node_*_0.json 2>/dev/null | grep -o '"host": "[^".]*' | head -n1 | cut -d'"' -f4)
    one_rank -m coalm_nemo.preflight judge --found "$found" --wanted "$wanted" --nodes "$SLURM_JOB_NODELIST" \
        --ranks-per-node "${SLURM_NTASKS_PER_NODE:-1}" --gpus-per-node "${GPUS_PER_NODE:-0}" \
        --min-disk-gib "${MIN_DISK_GIB:-0}" --min-disk-mb-per-s "${MIN_DISK_MB_PER_S:-0}" \
        --min-shm-gib "${MIN_SHM_GIB:-0}" --min-pair-gb-per-s "${MIN_PAIR_GB_PER_S:-0}" --max-slowdown "${MAX_SLOWDOWN:-0}"
    code=$?
    if ((code == 0)); then
        choose "$(cat "$found/nodes")"
        ranks -m coalm_nemo.preflight together --min-bus-gb-per-s "${MIN_BUS_GB_PER_S:-0}"
        code=$?
    fi
    ((code == 0)) && return
    [[ -z $asked ]] || end 75
    note "bad node"
    say "preflight failed ($code): not trained; sbatch --exclude=NODE ... leaves a node out, SKIP_PREFLIGHT=1 the check"
    exit "$code"
}

# choose NODELIST: the steps that follow run there.
choose() {
    local count
    count=$(scontrol show hostnames "$1" | wc -l)
    chosen=(--nodes="$count" --ntasks="$((count * ${SLURM_NTASKS_PER_NODE:-1}))" --nodelist="$1")
}

# end CODE: what the training's exit code means for this job. What took the nodes is written down already.
end() {
    trap : USR1 TERM # the ranks are gone: no cause of its own any more
    case $1 in
    0) note finished && say "finished at step $(newest_step)" && exit 0 ;;
    2) note "bad input" && last_words && say "bad input (exit code 2): not started again" && exit 2 ;;
    3) note "non-finite" && say "the loss was not finite (exit code 3): not started again; the rows are named in $RUN_DIR" && exit 3 ;;
    75) [[ $asked == taken ]] || note "${asked:-signal}"
        say "stopped by a signal at step $(newest_step) (exit code 75): ${asked:-signal}"
        ;;
    *) failed "$1" ;;
    esac
    local state
    state=$(job_state)
    if [[ $state != RUNNING && $state != CONFIGURING ]]; then # what follows is SLURM's decision
        say "cancelled, preempted, past its time or without a node (${state:-no answer from squeue}): not requeued from here"
        exit "$1"
    fi
    if hopeless; then exit "$1"; fi
    say "requeued: goes on from step $(newest_step)"
    scontrol requeue "$SLURM_JOB_ID" || say "SLURM refuses to requeue; the same sbatch line goes on from there"
    exit "$1"
}

# failed CODE: written down by its cause, with the last words of the rank that failed first.
failed() {
    local what=crashed
    case $1/$(first_failure) in 5/*) what=hung ;; */137\ *) what=killed ;; esac
    [[ $(job_state) == RUNNING ]] || what=$(who_took_it) # the ranks may have noticed before SLURM did
    [[ $asked == taken ]] || note "${asked:-$what}"
    last_words
    say "ended with exit code $1 ($what) at step $(reached_step)${asked:+, asked to stop: $asked}"
}

# "CODE NAME" of the rank that failed first. Who was killed counts before those who fell over it in the next moments, and
# one whom srun ended with the others does not count.
first_failure() {
    local rank
    for rank in "$LOG_DIR"/rank_*.exit; do [[ ! -r $rank ]] || echo "$(<"$rank") $(basename "$rank" .exit)"; done | sort -n |
        awk '$2 != 143 {if (!start) start = $1; if ($1 < start + 3 && (!name || ($2 > 128 && code < 128))) {name = $3; code = $2}}
            END {if (name) print code, name}'
}

# What the rank that failed first said last. A rank without a stack after a hang is where it hangs.
last_words() {
    local code name
    read -r code name <<<"$(first_failure)"
    [[ -n $name ]] || return 0
    say "the first to fail: $name, exit code $code; its last lines, of $LOG_DIR/$name.log:"
    tail -n "${LAST_LINES:-25}" "$LOG_DIR/$name.log" | sed 's/^/  | /'
    ((code != 5)) ||
        grep -Ls "^watchdog: rank" "$LOG_DIR"/rank_*.log | sed 's/^/  no stack, so it hangs itself or its node does: /'
}
