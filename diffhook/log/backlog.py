"""Work that waits for the disk, so that training does not."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable

from diffhook.errors import LogError, LogUnavailableError
from diffhook.log import store as files

logger = logging.getLogger("diffhook")

Job = Callable[[], None]

_LONGEST_PAUSE = 30.0  # seconds between attempts at a disk that fails
_LAST_PAUSE = 2.0  # the same, at the end
HANGS = 60.0  # seconds without a write after which a disk is not waited for
LAST_TRIES = 5.0  # seconds that a disk that fails is still tried, at the end
_TRIES = 2.0  # the same, at a checkpoint
# Attempts that a network is given at the end, however long one takes: a request hides several of its own.
_ATTEMPTS = 5
_MOST_ATTEMPTS = 100  # at one job, though each writes a part of it: a quota may take small files
_SLOWEST = 10 << 20  # bytes/s: a job that needs longer than this and the time given is one that hangs


class Backlog:
    """Jobs for one thread, which does them in order and tries again what failed.

    A job must be able to run again after it failed. Its giver waits at most ``patience`` seconds for
    room, once: after that offers are turned down at once, until half of the backlog is done.

    Args:
        where: the log's location, for messages.
        memory: bytes that may wait; a single larger job is taken when nothing else waits.
        patience: seconds.
        network: the place is one that comes back, and requests to it fail one by one. At the end it is tried
            as long as files get written, as well by attempts that fail in all; a disk that fails is not.
        strict: what failed is not tried again: it has failed for good.
        ended: called by the thread when it is over, which after a wait in vain is later than
            :meth:`close`.
    """

    def __init__(
        self,
        where: str,
        *,
        memory: int,
        patience: float,
        network: bool = False,
        strict: bool = False,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self._where = where
        self._strict = strict
        self._ended = ended
        self._memory = memory
        self._patience = patience
        self._network = network
        self._jobs: deque[tuple[Job, int]] = deque()
        self._bytes = 0
        self._written = 0  # files and commits
        self._attempts = 0  # at the job at hand, that failed
        self._in_vain = 0  # since the last file was written
        self._overrun = False  # an offer was turned down, and the backlog is not yet half done
        self._stalled = False  # a wait for the backlog timed out, and nothing was written since
        self._trouble: Exception | None = None  # of the attempt before
        self._failure: Exception | None = None  # for good
        self._hurry = self._closing = self._given_up = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="diffhook-writer", daemon=True)
        self._thread.start()

    def begin(self, job: Job, timeout: float) -> None:
        """Do the first job. Comes back when it is done or was tried once, or after ``timeout`` seconds.

        Raises:
            LogError: it failed for good, and the thread is over.
        """
        try:
            with self._changed:
                self._add(job, 0)
                self._changed.wait_for(lambda: not self._jobs or self._failure or self._trouble, timeout)
                if self._failure is not None:
                    known = isinstance(self._failure, LogError)
                    raise self._failure if known else self._error(self._failure)
        except BaseException:  # the thread must not go on by itself, and hold what the job has locked
            self._closing = True
            self._stop()
            raise

    def offer(self, job: Job, size: int) -> bool:
        """Hand a job over. False: there was no room, and it will not be done.

        Args:
            size: bytes that the job keeps in memory; one that keeps none is always taken.

        Raises:
            LogError: an earlier job failed for good.
        """
        with self._changed:
            self._raise()
            if size == 0:
                pass
            elif self._overrun:
                self._overrun = self._bytes > self._memory // 2
            elif not self._fits(size):
                self._overrun = not self._changed.wait_for(
                    lambda: self._fits(size) or self._failure is not None, self._patience
                )
            if self._overrun and size:
                return False
            self._add(job, size)
            return True

    def offer_patiently(self, job: Job, size: int) -> bool:
        """Like :meth:`offer`, for what is rare and large: waits for room as long as the disk works.

        Where it fails or hangs, ``patience`` seconds at most, and that was found out once.
        """
        with self._changed:
            timeout = self._patience if self._stalled else HANGS
            if not self._wait_while_it_works(lambda: self._fits(size), timeout, self._patience):
                self._stalled = True
                return False
            self._raise()
            self._add(job, size)
            return True

    def finish(self, job: Job) -> bool:
        """Hand a job over, and wait until it is done, as long as the disk works.

        Returns:
            False: it fails or hangs; the job stays, and is done when it works again.

        Raises:
            LogError: a job failed for good.
        """
        done = threading.Event()

        def noted() -> None:
            job()
            done.set()

        with self._changed:
            self._raise()
            self._add(noted, 0)
            timeout = self._patience if self._stalled else HANGS
            self._stalled = not self._wait_while_it_works(done.is_set, timeout, self._patience)
            self._raise()
            return done.is_set()

    def drain(self, timeout: float) -> None:
        """Wait until every job is done: ``timeout`` seconds at most, and 2 where the disk fails.

        Raises:
            LogError: one failed for good, or the time is over; the jobs stay.
        """
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            done = self._wait_while_it_works(lambda: not self._jobs, timeout, _TRIES, total=timeout)
            self._end_wait(done, f"it took longer than {timeout:g} s")

    def close(self, timeout: float) -> None:
        """Finish and stop the thread. Idempotent.

        Args:
            timeout: seconds without a file written after which it is given up: of a disk that fails 5 at
                most, of a network five times as many unless there were five attempts until then. A large
                file has a second more for each 10 MiB.

        Raises:
            LogError: not all jobs could be done.
        """
        if self._closing:
            return
        self._closing = True
        try:
            with self._changed:
                self._hurry = True
                self._changed.notify_all()
                done = self._wait_while_it_works(lambda: not self._jobs, timeout, LAST_TRIES, last=True)
                waited = self._patience_with(timeout, LAST_TRIES, last=True)
                self._end_wait(done, f"nothing more was written for {waited:.3g} s")
        finally:
            self._stop()

    def _stop(self) -> None:
        with self._changed:
            self._given_up = True
            self._changed.notify_all()
        self._thread.join(1.0 if self._jobs else None)  # a disk that hangs does not keep us

    @property
    def failing(self) -> bool:
        """The last attempt at a job failed, and the user was told so."""
        return self._trouble is not None

    @property
    def stalled(self) -> bool:
        """A wait for the jobs was given up, and nothing has been written since."""
        return self._stalled

    @property
    def trouble(self) -> str:
        """Why writing is stalled, in words."""
        return f"it fails: {self._trouble}" if self._trouble is not None else "it hangs"

    @property
    def idle(self) -> bool:
        """Within a job: none comes after it."""
        return len(self._jobs) == 1

    def _add(self, job: Job, size: int) -> None:
        self._jobs.append((job, size))
        self._bytes += size
        self._changed.notify_all()

    def _fits(self, size: int) -> bool:
        return not self._jobs or self._bytes + size <= self._memory

    def _wait_while_it_works(
        self,
        ready: Callable[[], bool],
        timeout: float,
        failing: float,
        *,
        total: float = math.inf,
        last: bool = False,
    ) -> bool:
        """Wait as long as files get written. False: none was for ``timeout`` seconds and what the size
        of the job adds, or for ``failing`` seconds while attempts fail; or it took ``total`` seconds.

        Args:
            last: what is not written now is lost, so a network is tried longer.
        """
        until = time.monotonic() + total
        seen: tuple[bool, int] | None = None
        since = 0.0
        while not ready() and self._failure is None:
            # A disk that is full for large files may take small ones.
            partly = last and self._network and self._attempts < _MOST_ATTEMPTS
            now = self.failing, self._written if partly or not self.failing else 0
            if now != seen:
                seen, since = now, time.monotonic()
            limit = self._patience_with(timeout, failing, last)
            left = min(since + limit, until) - time.monotonic()
            if left <= 0:
                return False
            self._changed.wait(min(left, 1.0))  # what happens within a job is not notified
        return True

    def _patience_with(self, timeout: float, failing: float, last: bool) -> float:
        """Seconds without progress."""
        if last and self._network and self._in_vain < _ATTEMPTS:
            timeout *= _ATTEMPTS
        if self.failing:
            return timeout if last and self._network else min(timeout, failing)
        return timeout + (self._jobs[0][1] if self._jobs else 0) / _SLOWEST

    def _end_wait(self, done: bool, reason: str) -> None:
        self._raise()
        if not done:
            error = self._error(self._trouble or reason)
            self._stalled = True
            raise error from self._trouble

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._error(self._failure) from self._failure

    def _error(self, reason: Exception | str) -> LogError:
        error = LogError(f"writing to {self._where} failed: {reason}; rows written before are safe")
        error.told = self.failing
        return error

    # ── the thread ────────────────────────────────────────────────────────────────────────────

    def _work(self) -> None:
        files.tell_writes(self._note_write)
        try:
            self._do_all()
        finally:
            self._ended()

    def _do_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._given_up)
                if not self._jobs or self._given_up:  # others may write there now
                    return
                job, size = self._jobs[0]
            self._do(job)
            del job  # it may keep its giver alive
            with self._changed:
                self._jobs.popleft()
                self._bytes -= size
                self._changed.notify_all()

    def _note_write(self) -> None:
        self._written += 1
        self._in_vain = 0
        self._stalled = False

    def _do(self, job: Job) -> None:
        pause, self._attempts = 0.1, 0
        while self._failure is None:
            try:
                job()
                self._recovered()
                return
            except Exception as error:
                if self._strict or not _may_pass(error):
                    self._failure = error
                    return
                self._tell(error)
                self._attempts += 1
                self._in_vain += 1
                with self._changed:
                    self._changed.notify_all()
                    if self._changed.wait_for(lambda: self._hurry or self._given_up, pause):
                        self._hurry, pause = False, 0.1
                    if self._given_up:
                        self._failure = error
                pause = min(2 * pause, _LAST_PAUSE if self._closing else _LONGEST_PAUSE)

    def _tell(self, error: Exception) -> None:
        if self._trouble is None:
            logger.warning(
                "diffhook cannot write to %s (%s: %s): it keeps trying, and training goes on; up to %d MB "
                "wait in memory, after which whole steps are left out",
                self._where, type(error).__name__, error, self._memory >> 20,
            )  # fmt: skip
        self._trouble = error

    def _recovered(self) -> None:
        if self._trouble is not None:
            logger.warning("diffhook can write to %s again", self._where)
            self._trouble = None


def _may_pass(error: Exception) -> bool:
    """Whether to try again can help: a full disk, a network; not a log that is damaged or another's."""
    return isinstance(error, LogUnavailableError) or not isinstance(error, LogError)
