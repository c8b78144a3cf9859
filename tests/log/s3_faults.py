"""A training into an object store that misbehaves: every fault must cost time only, and not the loop's.

The store is moto's server on loopback, behind a middleware that refuses, delays or cuts off requests.
"""

from __future__ import annotations

import os
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from diffhook.log import open_log
from diffhook.log import table_writer as writing
from tests.runs import SteppedTraining

BATCH = 4
KINDS = (*8 * ["503"], *5 * ["500"], *4 * ["cut"], *4 * ["slow"], *4 * ["short"], "silent")
_SILENCE = 30.0  # seconds
_CODES = {"503": b"SlowDown", "500": b"InternalError"}
_LISTED = re.compile(rb"<(Contents|CommonPrefixes)>.*?</\1>", re.DOTALL)


class FaultyApp:
    """moto's application, with faults while there are any left.

    Attributes:
        left: faults still to come.
        share: of the requests, while there are.
        kinds: of which one is drawn each time.
        seen: kind of fault → how often.
    """

    def __init__(self, app: Any, seed: int) -> None:
        self._app = app
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self.left, self.share, self.kinds = 0, 0.25, KINDS
        self.seen: Counter[str] = Counter()

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        kind = self._draw("list-type=2" in environ["QUERY_STRING"])
        if kind == "short":
            return self._cut_list(environ, start_response)
        if kind == "slow":
            time.sleep(0.3)
        elif kind == "cut":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError("cut off")
        elif kind == "silent":  # the client gives up first
            time.sleep(_SILENCE)
            raise ConnectionAbortedError("no answer")
        elif kind:
            start_response(f"{kind} Fault", [("Content-Type", "application/xml")])
            return [b"<?xml version='1.0'?><Error><Code>%s</Code></Error>" % _CODES[kind]]
        answer: Iterable[bytes] = self._app(environ, start_response)
        return answer

    def _cut_list(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        """A listing that lacks half of what is there, and does not say so."""
        told: list[Any] = []
        content = b"".join(self._app(environ, lambda *answer: told.extend(answer)))
        content = _LISTED.sub(lambda entry: entry[0] if self._random.random() < 0.5 else b"", content)
        headers = [(n, v) for n, v in told[1] if n.lower() != "content-length"]
        start_response(told[0], [*headers, ("Content-Length", str(len(content)))])
        return [content]

    def _draw(self, listing: bool) -> str:
        with self._lock:
            if not self.left or self._random.random() > self.share:
                return ""
            kind = self._random.choice(self.kinds)
            if kind == "short" and not listing:
                return ""
            self.left -= 1
            self.seen[kind] += 1
            return kind


@contextmanager
def faulty_s3(seed: int = 0) -> Iterator[FaultyApp]:
    """The store, with a bucket "runs"; the environment points to it meanwhile."""
    import fsspec
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *_: Any) -> None:
            pass

    app = FaultyApp(DomainDispatcherApplication(create_backend_app), seed)
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        fsspec.filesystem("s3", use_listings_cache=False).makedirs("runs", exist_ok=True)
        yield app
    finally:
        app.left = 0
        server.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@dataclass(frozen=True)
class Result:
    """What a training left.

    Attributes:
        weights: the trained parameters.
        longest_step, first_step, ending: seconds: of a step after the first, of the first, which opens the
            log, and of what comes after the last.
    """

    weights: torch.Tensor
    longest_step: float
    first_step: float
    ending: float


def train(location: str | None, steps: int, app: FaultyApp | None = None, faults: int = 0) -> Result:
    """A deterministic training of ``steps``; the faults begin with it. None: without us."""
    training, seconds = SteppedTraining(location, snapshot_every=max(steps // 8, 1)), []
    if app is not None:
        app.left = faults
    for step in range(steps):
        began = time.perf_counter()
        training.step(step, BATCH)
        seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    training.accelerator.end_training()
    weights = torch.cat([p.detach().flatten() for p in training.model.parameters()])
    return Result(weights, max(seconds[1:]), seconds[0], time.perf_counter() - began)


def check(
    app: FaultyApp, steps: int, faults: int, kinds: tuple[str, ...] = KINDS
) -> tuple[dict[str, Any], list[str]]:
    """Train beside the faults. Returns the counts, and what was wrong.

    Where the store still fails when the run ends, the rest is given up, and told: "given_up". "lost" are rows
    that are not there although later ones are.
    """
    rows_per_shard, writing.rows_per_shard = writing.rows_per_shard, lambda dim, dtype: 64
    app.kinds = kinds
    try:
        plain = train(None, steps)
        found = train("s3://runs/faulty", steps, app, faults)
    finally:
        app.left = 0
        writing.rows_per_shard = rows_per_shard
    log = open_log("s3://runs/faulty")
    rows = Counter(zip(log.train["step"].tolist(), log.train["sample"].tolist(), strict=True))
    damaged, dropped, snapshots = log.verify(), log.dropped(), len(log.snapshots)
    missing = steps * BATCH - len(rows) - dropped[1]
    reached = BATCH * (max((step for step, _ in rows), default=-1) + 1)
    counts = {
        "steps": steps,
        "faults": dict(app.seen),
        "rows": rows.total(),
        "lost": max(reached - len(rows) - dropped[1], 0),
        "given_up": missing - max(reached - len(rows) - dropped[1], 0),
        "doubled": rows.total() - len(rows),
        "counted_as_dropped": dropped[1],
        "snapshots": snapshots,
        "bit_identical": bool(torch.equal(plain.weights, found.weights)),
        "first_step_seconds": round(found.first_step, 2),
        "longest_later_step_seconds": round(found.longest_step, 2),
        "ending_seconds": round(found.ending, 2),
    }
    problems = [*damaged]
    problems += [f"{counts[what]} rows are {what}" for what in ("lost", "doubled") if counts[what]]
    problems += [] if counts["bit_identical"] else ["the training is another one with us"]
    return counts, problems
