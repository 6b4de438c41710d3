"""Processes that begin as copies of this one: real ones, without the seconds that importing PyTorch takes."""

from __future__ import annotations

import functools
import json
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


COMMANDS = [
    *sorted((ROOT / "scripts").glob("*.py")),
    *sorted((ROOT / "evaluation").glob("[a-z]*.py")),
    ROOT / "main.py",
]
HELPS = """
import contextlib, io, json, runpy, sys

helps = {}
for command in sys.argv[1:]:
    sys.argv, before, out = [command, "--help"], {*sys.modules}, io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_path(command, run_name="__main__")
        except SystemExit as end:
            code = end.code
    helps[command] = code, out.getvalue(), [*{*sys.modules} - before]
print(json.dumps(helps))
"""


@functools.cache
def _helps() -> dict[str, tuple[int, str, list[str]]]:
    """What each command ends with, prints and imports with --help; all in one new process, one after the other."""
    done = subprocess.run(
        [sys.executable, "-c", HELPS, *map(str, COMMANDS)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return json.loads(done.stdout)


def quick_help(command: Path) -> str:
    """What a command prints with --help: at once, since PyTorch, whose import takes seconds, is not imported."""
    code, printed, imported = _helps()[str(command)]
    assert code == 0 and not {*imported} & {"torch", "pytorch_lightning", "transformers"}
    return printed
