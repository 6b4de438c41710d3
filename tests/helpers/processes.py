"""Processes that begin as copies of this one: real ones, without the seconds that importing PyTorch takes."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.helpers.paths import ROOT


class Child:
    """A process that runs `work`, whose result is its exit code; what it prints goes to a file."""

    def __init__(self, work: Callable[[], int], log: Path, env: Mapping[str, str] | None = None):
        self.log = log
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.environ.update(env or {})
                stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(stream, 1)
                os.dup2(stream, 2)
                # Not those of pytest, which keeps what is printed.
                sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
                code = work()
                sys.stdout.flush()
                sys.stderr.flush()
            except BaseException:
                traceback.print_exc(file=sys.__stderr__)
            finally:
                os._exit(code)

    def running(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def end(self, signal: int | None = None) -> int:
        """Send a signal, if one is given, and wait; the exit code, or minus the signal that ended it."""
        if signal is not None:
            os.kill(self.pid, signal)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def quick_help(script: Path) -> str:
    """What a command prints with --help: at once, since PyTorch, whose import takes seconds, is not imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(script), "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"torch", "pytorch_lightning", "transformers"}
    return done.stdout
