#!/bin/bash
# One rank: runs its words. srun ends all ranks as soon as one fails (--kill-on-bad-exit), which is right for a crash.
# A rank that ends in order (2: bad input, 3: non-finite loss, 4: bad node, 75: saved and stopped) waits a little, so that
# the others, who end for the same reason, can finish what they write; a rank that hangs does not outlive it.
trap : USR1 TERM INT # srun's signals are for the program: it gets them itself, and this shell must live to see its end
"$@"
code=$?
case $code in 2 | 3 | 4 | 75) sleep "${LINGER_S:-15}" ;; esac
exit $code
