#!/bin/bash
# The whole chain as dependent jobs: data and import, then train, export, eval. A step whose result is there is left out,
# so the same command goes on after whatever stopped it. Settings are variables; see slurm/README.md:
#   OUT=/scratch/coalm HF=/models/Llama-3.1-8B-Instruct DATA_CONFIG=configs/data/coalm_it.yaml slurm/pipeline.sh start
#   OUT=/scratch/coalm slurm/pipeline.sh status | cancel
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --open-mode=append

STEPS=(data import train export eval)
declare -A NEEDS=([train]="data import" [export]=train [eval]=export)
OUT=$(realpath -m "${OUT:-runs/pipeline}")
: "${RECIPE:=coalm_8b}" "${TRAIN_SCRIPT:=slurm/train_8b.sh}" "${BENCHMARK:=multiwoz}"
read -ra data_words <<<"${DATA_WORDS:-}"     # more words of `coalm data build`
read -ra train_words <<<"${TRAIN_WORDS:-}"   # key=value changes to the recipe
read -ra eval_words <<<"${EVAL_WORDS:-}"     # more words of `coalm eval BENCHMARK`
read -ra step_options <<<"${STEP_SBATCH:-}"  # sbatch options of every step but train
read -ra train_options <<<"${TRAIN_SBATCH:-}"

fail() { echo "pipeline: $*" >&2; exit 2; }

# Whether a step's result is there.
has() {
    case $1 in
    train) grep -qs $'\tfinished\t' "$OUT/run/slurm_events.tsv" ;;
    eval) [[ -s $OUT/eval/scores.json ]] ;;
    *) [[ -e $OUT/steps/$1/finished ]] ;;
    esac
}

job_of() { grep -s "^$1	" "$OUT/jobs.tsv" | tail -n1 | cut -f2; }
state_of() { local job && job=$(job_of "$1") && [[ -n $job ]] && squeue --noheader --jobs="$job" --format='%T %r' 2>/dev/null; }

start() {
    local step need after job
    for step in data import; do has "$step" || [[ -n ${HF:-} ]] || fail "give HF=DIR, the Hugging Face model to start from"; done
    has data || [[ -n ${DATA_CONFIG:-} ]] || fail "give DATA_CONFIG=FILE.yaml, as \`coalm data build --config\` takes it"
    for step in "${STEPS[@]}"; do has "$step" || [[ -z $(state_of "$step") ]] || fail "it is queued or runs already: $0 status, or cancel"; done
    mkdir -p "$OUT/steps" logs && rm -f "$OUT/jobs.tsv"
    export OUT RECIPE BENCHMARK
    for step in "${STEPS[@]}"; do
        if has "$step"; then echo "$step: its result is there" && continue; fi
        after=""
        for need in ${NEEDS[$step]:-}; do after+=$(job_of "$need" | sed 's/^/:/'); done
        job=$(submit "$step" "${after:+--dependency=afterok$after}") || fail "$step was not taken by sbatch; $0 cancel"
        printf '%s\t%s\n' "$step" "$job" >>"$OUT/jobs.tsv"
        echo "$step: job $job${after:+, after ${after#:}}"
    done
}

# submit STEP [DEPENDENCY]: the job's number. A job whose dependency failed is cancelled, so nothing waits for ever.
submit() {
    local options=(--parsable --kill-on-invalid-dep=yes --job-name="coalm_$1" --output="$OUT/steps/$1-%j.log" ${2:+"$2"})
    if [[ $1 == train ]]; then
        RUN_DIR=$OUT/run sbatch "${options[@]}" "${train_options[@]}" "$TRAIN_SCRIPT" \
            model.checkpoint="$OUT/base" data.train="$OUT/set" "${train_words[@]}"
    else
        sbatch "${options[@]}" "${step_options[@]}" slurm/pipeline.sh run "$1"
    fi
}

# The body of a job: one step.
run() {
    source slurm/lib.sh || fail "start it at the root of the repository"
    has "$1" && exit 0
    local words code
    case $1 in
    data) words=(data build --config "$DATA_CONFIG" --tokenizer "$HF" --out "$OUT/set" "${data_words[@]}") ;;
    import) words=(convert import --hf "$HF" --out "$OUT/base") ;;
    export) words=(convert export --ckpt "$(printf '%s\n' "$OUT"/run/checkpoints/step_* | tail -n1)" --out "$OUT/hf") ;;
    eval) words=(eval "$BENCHMARK" --model "$OUT/hf" ${EVAL_DATA:+--data "$EVAL_DATA"} --out "$OUT/eval" "${eval_words[@]}") ;;
    esac
    RECIPE=$1 RUN_DIR=$OUT/steps/$1
    begin
    one_rank -m coalm_nemo.cli "${words[@]}"
    code=$?
    if ((code == 0)); then note finished && touch "$RUN_DIR/finished"; else note failed; fi
    exit "$code"
}

status() {
    local step state
    for step in "${STEPS[@]}"; do
        if has "$step"; then state="done"; else state=$(state_of "$step"); fi
        printf '%-7s %s\n' "$step" "${state:-not queued}${OUT:+$(job_of "$step" | sed 's/^/, job /')}"
    done
    [[ ! -s $OUT/eval/scores.json ]] || echo "scores: $OUT/eval/scores.json"
}

cancel() { cut -f2 "$OUT/jobs.tsv" 2>/dev/null | xargs -r scancel; }

case ${1:-} in
start | status | cancel) "$1" ;;
run) [[ -n ${SLURM_JOB_ID:-} ]] || fail "run is for the jobs" && run "$2" ;;
*) fail "use $0 start, status or cancel" ;;
esac
