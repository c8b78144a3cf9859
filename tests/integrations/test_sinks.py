"""Sinks hear of alerts, and training does not hear of sinks."""

from __future__ import annotations

import json
import logging
import sys
import threading
import types
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch.utils.data import DataLoader, TensorDataset

from diffhook import Alerts
from diffhook.capture import Alert, Detector
from diffhook.capture.alerts.delivery import Delivery
from diffhook.capture.alerts.testing import SinkContract
from diffhook.errors import ConfigurationError
from diffhook.integrations.accelerate import DiffHook
from diffhook.integrations.notify import Apprise, SampleTables, Trackers, Webhook, to_logging
from diffhook.log import Rows, open_log
from tests.runs import TinyDenoiser, denoising_losses, identified, train
from tests.waiting import wait_until


def make_alert(step: int = 12, level: str = "warning") -> Alert:
    return Alert("norm-outlier", level, [7], step, 500.0, 9.0, 4.0, "sample 7 pulls hard")


class EveryStep(Detector):
    """Names another sample in every step."""

    def look(self, rows: Rows) -> Iterator[Alert]:
        yield Alert("made-up", "warning", [int(rows["step"][0])], int(rows["step"][0]), 0.0, 1.0, 0.0, "oh")


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("diffhook-alerts")]


# ── delivery ──────────────────────────────────────────────────────────────────────────────────


def test_every_sink_hears_every_alert_in_order_and_the_threads_end(tmp_path: Path) -> None:
    first, second = [], []
    sinks = [lambda alert: first.append(alert.step), lambda alert: second.append(alert.step)]
    train(tmp_path / "log", alerts=Alerts([EveryStep()], sinks))
    assert first == second == list(range(9))
    assert not threads()


def test_no_alert_no_thread() -> None:
    delivery = Delivery([print], timeout=1)
    assert not threads()
    delivery.close()


def hang(alert: Alert) -> None:
    release.wait(60)


def fail(alert: Alert) -> None:
    raise ConnectionError("nobody there")


release = threading.Event()


@pytest.mark.parametrize("sink", [hang, fail])
def test_a_bad_sink_changes_nothing_of_the_training_nor_of_the_other_sinks(
    tmp_path: Path, sink: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plain = train(None)
    heard: list[Alert] = []
    with caplog.at_level(logging.WARNING, "diffhook"):
        watched = train(tmp_path / "log", alerts=Alerts([EveryStep()], [sink, heard.append], timeout=2))
    release.set()
    for before, after in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(before, after)
    assert len(heard) == 9
    assert len(open_log(tmp_path / "log").alerts()) == 9, "the log has them all"
    told = [r.message for r in caplog.records]
    if sink is fail:
        assert sum("the sink fail failed: ConnectionError: nobody there" in m for m in told) == 1
    else:
        assert sum("the sink hang has not answered within 2 s" in m for m in told) == 1
    assert any("9 alerts did not reach the sink" in m or "8 alerts did not reach the sink" in m for m in told)


def test_sending_never_waits_and_what_waits_is_bounded() -> None:
    release.clear()
    delivery = Delivery([hang], timeout=0.2)
    for step in range(2000):
        delivery.send(make_alert(step))
    (outlet,) = delivery._outlets
    assert outlet._queue.qsize() <= 256
    assert outlet.lost >= 2000 - 257
    delivery.close()
    release.set()
    wait_until(lambda: not threads())  # of a sink that was given up, once it returns


def test_a_sink_that_recovers_is_used_again() -> None:
    heard: list[int] = []

    def flaky(alert: Alert) -> None:
        if alert.step < 3:
            raise OSError("not yet")
        heard.append(alert.step)

    delivery = Delivery([flaky], timeout=5)
    for step in range(5):
        delivery.send(make_alert(step))
    delivery.close()
    assert heard == [3, 4]


# ── the sinks ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def server() -> Iterator[Any]:
    """An HTTP server on this machine that keeps what is posted."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null"
            served.posts.append((dict(self.headers), json.loads(body)))  # type: ignore[attr-defined]
            moved = self.path.startswith("/moved-")
            self.send_response(int(self.path.removeprefix("/moved-")) if moved else 204)
            if moved:
                self.send_header("Location", f"http://localhost:{served.server_port}/elsewhere")
            self.end_headers()

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    served = HTTPServer(("127.0.0.1", 0), Handler)
    served.posts = []  # type: ignore[attr-defined]
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


class _Served(SinkContract):
    """Of sinks that post to a server."""

    @pytest.fixture(autouse=True)
    def _server(self, server: Any) -> None:
        self.server = server

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.server_port}/hook"

    def arrived(self) -> list[str]:
        return [body["message"] for _, body in self.server.posts]


class TestWebhook(_Served):
    def make(self, folder: Path) -> Any:
        return Webhook(f"http://{self.address}")


class TestApprise(_Served):
    def make(self, folder: Path) -> Any:
        return Apprise(f"json://{self.address}")


class TestLogging(SinkContract):
    @pytest.fixture(autouse=True)
    def _log(self, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
        self.log = caplog
        with caplog.at_level(logging.INFO, "diffhook"):
            yield

    def make(self, folder: Path) -> Any:
        return to_logging

    def arrived(self) -> list[str]:
        return [record.getMessage() for record in self.log.records]


class Terse(TestLogging):
    """Cuts long sentences."""

    def make(self, folder: Path) -> Any:
        return lambda alert: to_logging(replace(alert, message=alert.message[:12]))


def test_a_sink_that_cuts_sentences_breaks_the_contract(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    contract = Terse()
    contract.log = caplog
    with caplog.at_level(logging.INFO, "diffhook"), pytest.raises(AssertionError, match="sample 7 pul"):
        contract.test_odd_alerts_arrive(tmp_path)


def test_a_webhook_posts_the_alert(server: Any) -> None:
    Webhook(f"http://127.0.0.1:{server.server_port}/x", {"Authorization": "Bearer 1"})(make_alert())
    ((headers, body),) = server.posts
    assert headers["Authorization"] == "Bearer 1"
    assert body["samples"] == [7]
    assert body["text"] == "diffhook, step 12: sample 7 pulls hard"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_webhook_that_is_redirected_is_not_delivered_and_its_headers_go_nowhere_else(
    server: Any, status: int
) -> None:
    url = f"http://127.0.0.1:{server.server_port}/moved-{status}"
    with pytest.raises(HTTPError, match=str(status)):
        Webhook(url, {"Authorization": "Bearer 1"})(make_alert())
    assert len(server.posts) == 1, "nobody else was asked"


def test_apprise_notifies_and_tells_when_it_could_not(server: Any) -> None:
    Apprise(f"json://127.0.0.1:{server.server_port}/x")(make_alert(level="error"))
    ((_, body),) = server.posts
    assert body["title"] == "diffhook: norm-outlier, step 12"
    assert body["message"] == "sample 7 pulls hard"
    assert body["type"] == "failure"
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError):
        Apprise(f"json://127.0.0.1:{server.server_port}/x")(make_alert())


def test_tensorboard_shows_alerts_as_text_at_their_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path))
    sink = Trackers(accelerator)
    sink(make_alert())  # before the trackers are there
    accelerator.init_trackers("run")
    sink(make_alert())
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    (event,) = events.Tensors("diffhook/norm-outlier/text_summary")
    assert event.step == 12
    assert event.tensor_proto.string_val[0] == b"sample 7 pulls hard"


def test_wandb_and_trackio_get_alerts_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the signatures of wandb 0.31 and trackio 0.43."""
    told = []

    class Run:
        def alert(self, title: str, text: str, level: Any = None, step: int | None = None) -> None:
            told.append((title, text, level, step))

    module = types.ModuleType("trackio")
    module.AlertLevel = {"INFO": "info!", "WARN": "warn!", "ERROR": "error!"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", module)
    trackers = [types.SimpleNamespace(name=name, tracker=Run()) for name in ("wandb", "trackio", "comet_ml")]
    Trackers(types.SimpleNamespace(is_main_process=True, trackers=trackers))(make_alert())
    Trackers(types.SimpleNamespace(is_main_process=False, trackers=trackers))(make_alert())
    title, text = "diffhook: norm-outlier", "step 12: sample 7 pulls hard"
    assert told == [(title, text, "WARN", None), (title, text, "warn!", 12)]


def test_trackers_show_the_samples_every_so_many_steps(tmp_path: Path) -> None:
    """What `diffhook watch` shows of the log at that time, at the step of the loop's own numbers after it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown: list[tuple[int, list[list[Any]]]] = []

    class Tables(GeneralTracker):
        name = "wandb"
        requires_logging_directory = False
        tracker: Any = None

        def log(self, values: Any, step: int | None = None, **_: Any) -> None: ...
        def store_init_configuration(self, values: Any) -> None: ...
        def log_table(self, name: str, columns: Any, data: list[list[Any]], step: int) -> None:
            shown.append((step, data))

    def told(accelerator: Accelerator, step: int) -> None:
        wait_until(lambda: "diffhook-table" not in [t.name for t in threading.enumerate()])
        accelerator.log({"loss": 0.0}, step=step)

    accelerator = Accelerator(cpu=True, log_with=[Tables(), "tensorboard"], project_dir=str(tmp_path))
    accelerator.init_trackers("run")
    hook = DiffHook(accelerator, tmp_path / "log", alerts=())
    SampleTables(hook, every=4, top=3)
    model: Any = TinyDenoiser()
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), 0.01), DataLoader(TensorDataset(identified(10)), 2)
    )
    for step, (clean,) in enumerate(loader):
        batch = clean, torch.randn_like(clean), torch.randint(0, 1000, (2,))
        accelerator.backward(denoising_losses(model, batch).mean())
        optimizer.step()
        optimizer.zero_grad()
        told(accelerator, step)
    accelerator.end_training()
    ((at, rows),) = shown
    assert at == 4, "read off after the fourth step, which is number 3"
    assert len(rows) == 3
    assert {row[0] for row in rows} <= {str(sample) for sample in range(8)}
    assert [row[4] for row in rows] == sorted((row[4] for row in rows), reverse=True)
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    (found,) = events.Tensors("diffhook/samples/text_summary")
    lines = found.tensor_proto.string_val[0].decode().splitlines()
    assert found.step == 4
    assert [line.split(" | ")[0] for line in lines] == ["| name", "| ---", *(f"| {row[0]}" for row in rows)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Webhook("slack.com/hook"), "'slack.com/hook' is no URL; expected http://"),
        (lambda: Apprise("nonsense://secret"), "URL that begins 'nonsense'"),
        (lambda: Apprise(), "was given no URL"),
    ],
)
def test_a_bad_address_is_told_at_once(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as told:
        make()
    assert "secret" not in str(told.value)


def test_a_missing_apprise_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apprise", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'diffhook\[apprise\]'"):
        Apprise("json://x")
