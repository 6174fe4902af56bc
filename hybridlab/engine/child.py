"""A process of ours with a socket to it: started, waited for by its descriptor as well as its socket, and ended."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from hybridlab.engine.channel import Channel

COMMAND = (sys.executable, "-P", "-m", "hybridlab.engine.worker_main")
"""Given a descriptor of its socket and the id of its parent. -P: nothing is imported from the working directory."""
GRACE_S = 5.0
"""For a process that should be ending."""


class Child:
    """A worker process. It does not get the terminal's Ctrl-C, and dies with the thread that starts it here.

    It has the descriptors of `keep`, by the same numbers.
    """

    def __init__(self, command: Sequence[str], keep: Sequence[int] = ()) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [*command, str(theirs.fileno()), str(os.getpid())],
                    pass_fds=(theirs.fileno(), *keep),
                    stdin=subprocess.DEVNULL,
                    process_group=0,
                )
            except BaseException:
                ours.close()
                raise
        self.pid = self._process.pid
        self._sentinel = os.pidfd_open(self.pid)
        self._watcher: threading.Thread | None = None
        self.channel = Channel(ours, self._sentinel)

    def on_end(self, function: Callable[[Child], None]) -> None:
        """Call `function` on a thread of its own once the process has ended, whoever ended it."""

        def watch() -> None:
            poll = select.poll()
            poll.register(self._sentinel, select.POLLIN)
            poll.poll()
            function(self)

        self._watcher = threading.Thread(target=watch, name="hybridlab-worker-end", daemon=True)
        self._watcher.start()

    def is_running(self) -> bool:
        return not select.select([self._sentinel], [], [], 0)[0]

    def was_killed(self) -> bool:
        """Whether a signal ended it."""
        return (self._process.poll() or 0) < 0

    def kill(self) -> None:
        """From any thread."""
        self._process.kill()

    def how_it_ended(self) -> str:
        """End a process that has broken off, if it does not end by itself, and say what became of it."""
        try:
            status = self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
            return f"worker process {self.pid} no longer answered"
        if status >= 0:
            return f"worker process {self.pid} ended with status {status}"
        return f"worker process {self.pid} was ended by {signal.Signals(-status).name}"

    def close(self) -> None:
        """Let it end by closing the channel, and end it if it does not; on the thread that uses the channel."""
        self.channel.close()
        self.how_it_ended()
        if self._watcher is not None:
            self._watcher.join()
        os.close(self._sentinel)
