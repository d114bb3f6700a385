"""The errors bnexp raises on purpose, each with the exit code the command line gives it."""

from __future__ import annotations


class UserError(ValueError):
    """The input is wrong. The message is one line: what is wrong and how to mend it."""

    exit_code = 2


class RunFailed(RuntimeError):
    """The input was right and the run failed all the same (diverged, disk full, ...)."""

    exit_code = 1


class ExpectationNotMet(RuntimeError):
    """The run finished, but an `expect:` of its config does not hold."""

    exit_code = 3


class Interrupted(RuntimeError):
    """The run was asked to stop (Ctrl-C, SIGTERM) and its state is in a checkpoint."""

    exit_code = 130
