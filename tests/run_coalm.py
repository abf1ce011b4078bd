"""`coalm` run in this process, as it is typed."""

from __future__ import annotations

import sys

from coalm_nemo import cli


def coalm(*words: object) -> int:
    """Run the command here; its exit code."""
    old, sys.argv = sys.argv, ["coalm", *map(str, words)]
    try:
        cli.main()
    except SystemExit as e:
        return int(e.code or 0)
    finally:
        sys.argv = old
    return 0
