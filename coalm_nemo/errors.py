"""The one exception that a user is meant to see."""


class UserError(Exception):
    """Something the user can mend. The command prints its one sentence and exits with code 2.

    The sentence says what is wrong, where (file, line, key), and what to do about it.
    """


EXIT_USER_ERROR = 2
"""Bad input: nothing was started, nothing was written."""

EXIT_NON_FINITE = 3
"""The loss or the gradient norm was not finite; the batch's row ids were saved."""

EXIT_BAD_NODE = 4
"""Nodes should not be trained on: the sentence names them."""

EXIT_STOPPED = 75
"""A signal asked for a stop: a checkpoint was saved, the same command goes on. (EX_TEMPFAIL of sysexits.h)"""
