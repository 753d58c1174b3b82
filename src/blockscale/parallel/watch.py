"""Who is still there: a thread that shows this rank's life and looks for the others'.

Every rank counts up a key of the rendezvous store (torchrun's). A rank whose count stands still for `timeout` seconds
is given up, and the first error that a rank reports ends all of them with that rank's message. A collective alone
cannot tell: NCCL waits for a dead peer as for a slow one.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable

from torch._C._distributed_c10d import Store

BEAT = 0.5
"""Seconds between two signs of life."""
_SILENT = 4 * BEAT
"""After a collective has failed, a rank that was silent for this long is the one that died."""
_ERROR = "blockscale/error"
_DONE = "blockscale/done"


class Watch:
    """rank, size: of this process. timeout: seconds without a sign of life. give_up: called with the message.

    Between `start` and `stop` the thread runs; a rank that has stopped is not missed.
    """

    def __init__(
        self, store: Store, rank: int, size: int, timeout: float, give_up: Callable[[str], None] | None = None
    ) -> None:
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self._give_up = give_up or self._leave
        self._beats = [(b"", time.monotonic())] * size
        self._stop = threading.Event()
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._waker, False)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="blockscale-watch", daemon=True)

    def start(self) -> None:
        """From the main thread: torchrun's SIGTERM, which it sends when another rank has ended, goes to the thread.

        The main thread may be inside a collective, where no Python handler runs; the wake-up byte is written anyway.
        """
        self._beat(0)
        self._handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
        self._wakeup = signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; the others shall not miss this rank."""
        if not self._stop.is_set():
            self._stop.set()
            os.write(self._waker, b"\0")
            self._thread.join(4 * BEAT)
            signal.set_wakeup_fd(self._wakeup)
            signal.signal(signal.SIGTERM, self._handler)
            with self._lock:
                self.store.set(f"{_DONE}/{self.rank}", "1")

    def report(self, message: str) -> None:
        """Tell the other ranks why this one ends; the first report stands."""
        with self._lock:
            self.store.compare_set(_ERROR, "", f"{self.rank}:{message}")

    def reported(self) -> str | None:
        """The first error of any other rank, as it shall be printed."""
        with self._lock:
            if not self.store.check([_ERROR]):
                return None
            rank, _, message = self.store.get(_ERROR).decode().partition(":")
        return None if int(rank) == self.rank else f"rank {rank} of {self.size}: {message}"

    def cause(self, error: BaseException) -> str:
        """Why a collective failed: another rank's report, or a rank that fell silent; waits a moment to find out."""
        deadline = time.monotonic() + _SILENT + 2 * BEAT
        while time.monotonic() < deadline:
            found = self._look(_SILENT)
            if found:
                return found
            time.sleep(BEAT / 2)
        return f"rank {self.rank} of {self.size}: {error}"

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        count = 0
        while not self._stop.is_set():
            count += 1
            if select.select([self._woken], [], [], BEAT)[0] and signal.SIGTERM in os.read(self._woken, 64):
                self._give_up(self.cause(RuntimeError("ended by torchrun (SIGTERM)")))
                return
            try:
                self._beat(count)
                found = self._look(self.timeout)
            except (RuntimeError, OSError) as e:  # the store's host is gone
                found = f"rank {self.rank} of {self.size} lost torchrun's rendezvous store: {str(e).splitlines()[0]}"
            if found and not self._stop.is_set():
                self._give_up(found)
                return

    def _beat(self, count: int) -> None:
        with self._lock:
            self.store.set(f"blockscale/beat/{self.rank}", str(count))

    def _look(self, patience: float) -> str | None:
        """What ended another rank, if anything did."""
        if (found := self.reported()) is not None:
            return found
        now = time.monotonic()
        for rank in range(self.size):
            if rank == self.rank:
                continue
            with self._lock:
                key = f"blockscale/beat/{rank}"
                beat = self.store.get(key) if self.store.check([key]) else b""
                done = self.store.check([f"{_DONE}/{rank}"])
            if done or beat != self._beats[rank][0]:
                self._beats[rank] = (beat, now)
            elif now - self._beats[rank][1] > patience:
                return f"rank {rank} of {self.size} died or hangs: no sign of life for {patience:g} s"
        return None

    def _leave(self, message: str) -> None:
        """The main thread may be inside a collective that never returns: end the process from here."""
        if speaks(self.rank, message):
            print(f"\nerror: {message}", file=sys.stderr, flush=True)  # a line of its own, whatever was being printed
        os._exit(2)


def speaks(rank: int, message: str) -> bool:
    """Whether this rank prints a message: rank 0, rank 1 if it is about rank 0, a rank of another host about itself."""
    about = message.startswith
    return (
        rank == 0
        or (rank == 1 and about("rank 0 "))
        or (about(f"rank {rank} ") and os.environ.get("GROUP_RANK") != "0")
    )
