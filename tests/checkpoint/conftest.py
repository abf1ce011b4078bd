"""`tests/tiny_llama.py` and the helpers beside this file are importable, here and in spawned processes."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
for directory in (HERE, HERE.parent):
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
