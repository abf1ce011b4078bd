"""`coalm convert` in small pieces with a pause after each, so that a kill lands anywhere in it: WORDS as the command's.

python slow_convert.py SECONDS_A_MEGABYTE PIECE_BYTES WORDS...
"""

from __future__ import annotations

import sys
import time

from coalm_nemo import cli
from coalm_nemo.checkpoint import export_hf, import_hf, planned_files, rows, streams
from coalm_nemo.checkpoint.streams import ProgressMeter
from coalm_nemo.checkpoint.torch_dist import TorchDistPlan


def make_small_and_slow(seconds_a_megabyte: float, piece_bytes: int) -> None:
    rows._LARGEST_BUFFER_BYTES = streams.STAGE_BYTES = piece_bytes // 4
    import_hf.MAX_CHUNK_BYTES = export_hf._ITEM_BYTES = planned_files.MARK_BYTES = piece_bytes
    TorchDistPlan.__init__.__kwdefaults__["max_file_bytes"] = 8 * piece_bytes
    export_hf.export_checkpoint.__kwdefaults__["max_shard_bytes"] = 8 * piece_bytes
    add = ProgressMeter.add

    def slowly(self: ProgressMeter, count: int, *, found: bool = False) -> None:
        add(self, count, found=found)
        if not found:
            time.sleep(seconds_a_megabyte * count / 1e6)

    ProgressMeter.add = slowly  # type: ignore[method-assign]


if __name__ == "__main__":
    make_small_and_slow(float(sys.argv[1]), int(sys.argv[2]))
    sys.argv[1:] = sys.argv[3:]
    cli.main()
