"""A child process that does the work on the GPU, so that a fault there costs one case and not the run."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import ParamSpec, TypeVar

from torch_conv_triton.bench.timing import in_words

P = ParamSpec("P")
T = TypeVar("T")


class WorkerError(RuntimeError):
    """The call failed in the worker, killed it, or ran out of time."""


class Worker:
    """Runs calls one after another in a child process, which is started at the first call and again after a failed one.

    Functions, arguments and results must pickle. Use as a context manager, or `close` it.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``function(*args, **kwargs)`` in the child. Raises WorkerError with the child's error in words."""
        if self._process is None:
            self._start()
        try:
            self._connection.send((function, args, kwargs))
            if not self._connection.poll(self._timeout_s):
                raise WorkerError(f"no answer in {self._timeout_s:.0f} s")
            succeeded, answer = self._connection.recv()
            if not succeeded:
                raise WorkerError(answer)
            return answer
        except WorkerError:
            self.close()
            raise
        except (EOFError, ConnectionError) as error:
            code = self._process.wait()
            self.close()
            raise WorkerError(f"the process died with exit code {code}") from error

    def close(self) -> None:
        """End the child, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._connection.close()
            self._process = self._connection = None

    def _start(self) -> None:
        # A forked child could not use CUDA, and one that multiprocessing spawns imports the program's main module again: a
        # script without a guard around its main part would run once more.
        self._connection, theirs = multiprocessing.Pipe()
        handle = theirs.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve({handle})"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            stdin=subprocess.DEVNULL,
            pass_fds=(handle,),
        )
        theirs.close()


class Here:
    """The same calls in this process: for debuggers, and for profilers."""

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise WorkerError(in_words(error)) from error


def serve(handle: int) -> None:
    """Answer the calls that come through the file descriptor of a pipe, until its other end is closed: what the child runs."""
    connection = Connection(handle)
    while True:
        try:
            function, args, kwargs = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer = True, function(*args, **kwargs)
        except Exception as error:
            traceback.print_exc()
            answer = False, in_words(error)
        connection.send(answer)
