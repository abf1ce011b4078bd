#!/bin/bash
# One rank: runs its words. srun ends all ranks as soon as one fails (--kill-on-bad-exit), which is right for a crash.
# What it prints goes into a file of its own, named after rank and host; rank 0's into the job's log too. `tee`, unlike the
# program, lives on where the disk is full. A failure leaves its time and exit code beside the file.
# A rank that ends in order (2: bad input, 3: non-finite loss, 4: bad node, 5: hung, 75: saved and stopped) waits a little,
# so that the others, who end for the same reason, can finish what they write; a rank that hangs does not outlive it.
trap : USR1 TERM INT # srun's signals are for the program: it gets them itself, and this shell must live to see its end
mkdir -p "$LOG_DIR"
name=$LOG_DIR/$(printf 'rank_%04d' "${SLURM_PROCID:-0}")_$(hostname -s)
if ((${SLURM_PROCID:-0} == 0)); then exec 3>&1; else exec 3>/dev/null; fi
"$@" > >(trap '' USR1 TERM INT && exec tee -a "$name.log" >&3) 2>&1
code=$?
((code == 0)) || echo "$(date +%s.%N) $code" >"$name.exit"
case $code in 2 | 3 | 4 | 5 | 75) sleep "${LINGER_S:-15}" ;; *) sleep 0.2 ;; esac # and `tee` writes the last words
exit $code
