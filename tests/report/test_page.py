"""What the page says, and what it is made of."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import diffhook
from diffhook.analysis.draws import Uncertainty
from diffhook.analysis.execution import Execution
from diffhook.analysis.methods import COMPARED
from diffhook.analysis.reason import Reason
from diffhook.analysis.tables import loss_queries
from diffhook.cli import main
from diffhook.errors import ConfigurationError
from diffhook.log import LogWriter, RunLog
from diffhook.log.samples import short_names
from diffhook.report import write_page
from diffhook.report.explorer import Explorer
from diffhook.report.parts.norms import norms_part, sentences
from diffhook.report.parts.outliers import outliers_part
from diffhook.report.parts.queries import TimestepShares, queries_part, shown
from diffhook.report.parts.run import run_part
from diffhook.report.thumbnails import PictureCache, data_uri
from tests.report.conftest import SAMPLES
from tests.report.logs import CONFIG, QUERIES, SUMMARY, photographs, write_log, write_queries

NONE = PictureCache(None)
VALUES = re.compile(r'class="value"[^>]*>(.*?)</button>.*?class="number">(\d+)<')


def values_of(facet: str) -> list[tuple[str, str]]:
    """(value, count), without the places where a long value may break."""
    return [(value.replace("<wbr>", ""), count) for value, count in VALUES.findall(facet)]


def test_it_stays_under_5_megabytes_and_names_no_address(page_file: Path) -> None:
    html = page_file.read_text()
    assert html.count("data:image/webp") >= SAMPLES
    assert len(html.encode()) < 5e6
    assert "://" not in html, "the page must not reach outside"
    assert "default-src 'none'" in html


def test_it_says_what_the_run_was(page_file: Path) -> None:
    html = page_file.read_text()
    assert "UNet2DModel, 60 trained parameters" in html
    assert "75 steps, 200 samples, 3 visits each" in html
    assert "8.7%: 8.0 s of capture, beside 1 min 32 s of training" in html
    assert "one step in 2, 600 rows, norms and D = 16 projections" in html
    assert "<pre>diffhook: capturing every step\n  8 rows &lt;each&gt;</pre>" in html


def test_of_a_run_that_has_not_ended_it_says_what_is_not_known(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", 16, 1)
    (tmp_path / "log" / "summary.json").unlink()
    html = run_part(log).html
    assert "every step" not in html.replace("diffhook: capturing every step", "")
    assert "stride not known, 16 rows" in html
    assert "not known: the run still goes on, or was killed" in html


def test_after_a_resume_the_overhead_is_said_to_be_one_sessions(tmp_path: Path) -> None:
    whole = write_log(tmp_path / "log", 16, 1)
    assert "session" not in run_part(whole).html
    writer = LogWriter(tmp_path / "log", CONFIG, start_step=2)
    writer.alert({"step": 2, "kind": "test", "message": "…"})
    writer.record("summary.json", {**SUMMARY, "probe_seconds": 2.0, "snapshot_seconds": 61.0})
    writer.close()
    took = "244.8%: 8.0 s of capture + 1 min 1 s of snapshots + 2.0 s of probes, beside 29.0 s of training"
    html = run_part(diffhook.open_log(tmp_path / "log")).html
    assert f"{took}; in the last session that ended, of 2" in html


def test_words_from_the_log_are_escaped(page_file: Path) -> None:
    html = page_file.read_text()
    assert "&lt;b&gt;0&lt;/b&gt;" in html
    assert "&lt;now&gt;" in html
    assert "<now>" not in html


def test_every_query_lists_the_samples_that_influence_names(log: RunLog, page_file: Path) -> None:
    listed = re.findall(r'<ol class="influences.*?</ol>', page_file.read_text(), re.DOTALL)
    found = [[int(sample) for sample in re.findall(r"<b[^>]*>#(\d+)</b>", row)] for row in listed]
    expected = []
    scores = [diffhook.influence(log, "held-out", method) for method in COMPARED]
    for query in range(QUERIES):
        for each in scores:
            for sign in (1, -1):
                top = each.top(8, opponents=sign < 0)
                known = each.certainty(top, opponents=sign < 0)
                beyond = np.ones(8, np.bool_) if known is None else known.beyond[query]
                named = top.sample_ids[query][(sign * top.scores[query] > 0) & beyond].tolist()
                expected.append(named or top.sample_ids[query].tolist())
    assert found == expected


def test_errors_and_timesteps_are_drawn_where_known(log: RunLog) -> None:
    scores = diffhook.influence(log, "held-out", "retrac")
    k = 2
    vars(scores)["_uncertainty"] = None
    plain = queries_part("held-out", [scores], NONE, NONE, k=k)
    assert plain is not None
    assert "±" not in plain.html
    assert 'class="strip"' not in plain.html
    for cached in ("errors", "margins"):
        vars(scores).pop(cached)
    error = np.full(scores.values.shape, 0.25e-4, np.float32)
    vars(scores)["_uncertainty"] = Uncertainty(error, np.full_like(error, 1e6))
    carried = np.zeros((QUERIES, 2 * k, 4), np.float32)
    carried[:, :, 1], carried[:, :, 3] = 1.0, -0.5
    when = TimestepShares(carried, np.array([0, 250, 500, 750, 1000]))
    drawn = queries_part("held-out", [scores], NONE, NONE, k=k, timesteps=[when])
    assert drawn is not None
    value = scores.top(1).scores[0, 0]
    exponent = int(np.floor(np.log10(np.abs(scores.values[0]).max())))
    assert f"{value / 10.0**exponent:+.2f}" in drawn.html
    assert f"± {0.25e-4 / 10.0**exponent:.2f}" in drawn.html
    assert drawn.html.count('class="strip"') == QUERIES * 2 * k
    assert "most of it at timesteps 250 to 500" in drawn.html
    assert '<path class="p5" d="M1 0h1v1h-1z"/><path class="n3" d="M3 0h1v1h-1z"/>' in drawn.html
    assert shown(scores, k).shape == (QUERIES, 2 * k)
    top = [scores.top(k).scores, scores.top(k, opponents=True).scores]
    within = sum(int((np.abs(part) <= 1.96 * 0.25e-4).sum()) for part in top)
    assert drawn.html.count('<li class="noise">') == within, "what draws of noise may have made is grey"


def test_an_opponent_has_a_negative_score_beyond_its_error(log: RunLog) -> None:
    scores = diffhook.influence(log, "held-out", "retrac")

    def part(values: np.ndarray, error: float) -> str:
        vars(scores)["values"] = values
        for cached in ("errors", "margins"):
            vars(scores).pop(cached, None)
        vars(scores)["_uncertainty"] = Uncertainty(np.full_like(values, error), np.full_like(values, 1e6))
        drawn = queries_part("held-out", [scores], NONE, NONE, k=2, queries=1)
        assert drawn is not None
        return str(drawn.html)

    def lists(html: str) -> dict[str, int]:
        found = re.findall(r'<ol class="influences (\w+)".*?</ol>', html, re.DOTALL)
        rows = re.findall(r'<ol class="influences \w+".*?</ol>', html, re.DOTALL)
        return {kind: row.count("<li") for kind, row in zip(found, rows, strict=True)}

    values = np.tile(np.linspace(-1, 1, scores.values.shape[1], dtype=np.float32), (QUERIES, 1))
    assert lists(part(values, 0.1)) == {"proponents": 2, "opponents": 2}
    assert lists(part(values + 2, 0.1)) == {"proponents": 2, "least": 2}, "all scores are positive"
    assert lists(part(values, 10.0)) == {"most": 2, "least": 2}, "noise"
    one = values.copy()
    one[:, 1:] += 2
    assert lists(part(one, 0.1)) == {"proponents": 2, "opponents": 1}


def test_bias_is_told_with_its_direction_and_size(log: RunLog) -> None:
    report = diffhook.bias(log, queries=())
    assert report.generality == []
    measured, follows = sentences(report)
    first, last = report.norms[0], report.norms[-1]  # the norms fall with the timestep
    expected = f"is {first.median / last.median:.2g} times as large at timesteps {first.low:.0f} to"
    assert expected in measured
    assert f" as at {last.low:.0f} to {last.high:.0f} (" in measured
    assert f"{report.correlation:+.2f}, p < 0.001".replace("-", "−") in measured
    assert "ReTrac divides it out" in follows
    flat = replace(report, correlation=0.01, p_value=0.8)
    assert "p = 0.8" in sentences(flat)[0]
    assert "The correlation is weak here" in sentences(flat)[1]


def test_timesteps_from_0_to_1_are_told_apart(log: RunLog) -> None:
    report = diffhook.bias(log, queries=())
    scaled = [replace(b, low=b.low / 1000, high=b.high / 1000) for b in report.norms]
    flow = replace(report, norms=scaled)
    first, last = scaled[0], scaled[-1]
    expected = f"at timesteps {first.low:.2f} to {first.high:.2f} as at {last.low:.2f} to {last.high:.2f} ("
    assert expected in sentences(flow)[0]
    html = norms_part(flow).html
    for b in scaled:
        assert f">{b.low:.2f} – {b.high:.2f}<" in html
    assert "All rows are in one range of timesteps" in sentences(replace(report, norms=scaled[:1]))[0]
    scores = diffhook.influence(log, "held-out", "retrac")
    carried = np.zeros((QUERIES, 4, 4), np.float32)
    carried[:, :, 1] = 1.0
    when = TimestepShares(carried, np.array([0.003, 0.25, 0.5, 0.75, 0.998]))
    drawn = queries_part("held-out", [scores], NONE, NONE, k=2, timesteps=[when])
    assert drawn is not None
    assert "most of it at timesteps 0.2 to 0.5" in drawn.html
    assert "from 0.0 at the left to\n1.0 at the right" in drawn.html


def test_query_sets_of_another_scalar_are_left_out(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", 16, 1)
    assert loss_queries(log) == ["held-out"]
    write_queries(tmp_path / "log", "squared", measurement="squared-output")
    assert loss_queries(log) == ["held-out"]


def test_the_score_s_parts_are_sort_orders(log: RunLog) -> None:
    ranking = diffhook.outliers(log)
    parts = {"loss": -np.arange(len(ranking), dtype=float)}
    parts["loss"][3] = np.nan
    ranking = _with_signals(ranking, parts)
    explorer = Explorer.make(log, ranking, None, "train", None, Execution())
    drawn = outliers_part(ranking, NONE, top=5, explorer=explorer)
    assert drawn is not None
    assert '<option value="1">loss</option>' in drawn.html
    (keys,) = explorer.data()["keys"]
    assert keys[:5] == [0, 1, 2, None, 4], "ascending: −loss; of NaN nothing is known"


def test_reasons_are_filtered_by_kind_shown_in_brief_and_told_in_a_sentence(log: RunLog) -> None:
    ranking = diffhook.outliers(log)
    explorer = Explorer.make(log, ranking, None, "train", None, Execution())
    drawn = outliers_part(ranking, NONE, explorer=explorer)
    assert drawn is not None
    facet = re.search(r'<fieldset id="facet-reason".*?</fieldset>', drawn.html, re.DOTALL)
    assert facet is not None
    offered = values_of(facet[0])
    assert {"high norm", "not finite", "none"} <= {kind for kind, _ in offered}
    assert not any(re.search(r"\d", kind) for kind, _ in offered)
    for kind, count in offered:
        flagged = [any(Reason.of(flag).kind == kind for flag in flags) for flags in ranking.reasons]
        assert int(count) == (sum(not flags for flags in ranking.reasons) if kind == "none" else sum(flagged))
    loud = re.search(r'data-sample="23" .*?</ul>', drawn.html, re.DOTALL)
    assert loud is not None
    told = re.search(r"<details><summary[^>]*>norm \+([\d.]+)σ</summary>([^<]+)</details>", loud[0])
    assert told is not None
    assert told[2] == f"gradient norm {told[1]} deviations above its timesteps&#39; usual, on average"


def test_each_sample_with_a_high_score_has_a_reason(log: RunLog) -> None:
    ranking = diffhook.outliers(log)
    assert all(flags for flags, score in zip(ranking.reasons, ranking.scores, strict=True) if score > 2)
    assert any("unusual in sum: " in flag for flags in ranking.reasons for flag in flags)


def test_an_image_that_cannot_be_read_is_shown_as_such(log: RunLog, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for index, pixels in enumerate(photographs(SAMPLES, 8)):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index:03d}.png")
    (tmp_path / "images" / "007.png").write_bytes(b"torn")
    write_page(tmp_path / "page.html", log, images=tmp_path / "images", queries={}, top=20)
    html = (tmp_path / "page.html").read_text()
    assert 'title="ConfigurationError: cannot read' in html
    assert html.count("data:image/webp") >= 19


def test_the_log_s_own_thumbnails_are_the_default(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", 16, 1)
    png = io.BytesIO()
    Image.fromarray(photographs(1, 8)[0]).save(png, "PNG")
    writer = LogWriter(tmp_path / "log", CONFIG, start_step=2)
    writer.thumbnail(3, png.getvalue())
    writer.close()
    write_page(tmp_path / "page.html", log, queries={})
    html = (tmp_path / "page.html").read_text()
    assert data_uri(png.getvalue()) in html
    assert "cannot be read" not in html, "the others have none, which is no fault"


def test_samples_with_names_have_their_pictures_and_are_listed_by_name(tmp_path: Path) -> None:
    names = [f"cat/<{index}>.png" for index in range(16)]
    log = write_log(tmp_path / "log", 16, 1, names=names)
    (tmp_path / "images" / "cat").mkdir(parents=True)
    pixels = photographs(16, 8)
    for name, each in zip(names, pixels, strict=True):
        Image.fromarray(each).save(tmp_path / "images" / name)
    write_page(tmp_path / "page.html", log, images=tmp_path / "images")
    html = (tmp_path / "page.html").read_text()
    for part in ("queries-0", "alerts", "generality"):
        text = re.search(rf'id="{part}".*?</section>', html, re.DOTALL)
        assert text is not None
        assert re.search(r"<b[^>]*>&lt;\d+&gt;.png</b>", text[0])
        assert not re.search(r"<b[^>]*>#\d+", text[0])
    for index, each in enumerate(pixels):
        tile = re.search(rf'data-name="cat/&lt;{index}&gt;.png".*?</li>', html, re.DOTALL)
        assert tile is not None
        assert data_uri(each) in tile[0]
        assert f">&lt;{index}&gt;.png</span>" in tile[0]


def test_the_command_filters_by_the_labels_of_a_file(
    log: RunLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.txt").write_text("".join(f"{('cat', 'dog')[i % 2]}\n" for i in range(SAMPLES)))
    place = ["report", log.location, "--out", str(tmp_path / "page.html")]
    assert main([*place, "--labels", str(tmp_path / "labels.txt")]) == 0
    facet = re.search(r'id="facet-label".*?</fieldset>', (tmp_path / "page.html").read_text(), re.DOTALL)
    assert facet is not None
    assert sorted(values_of(facet[0])) == [("cat", "100"), ("dog", "100")]


def test_when_no_image_can_be_read_the_first_error_is_raised(log: RunLog, tmp_path: Path) -> None:
    def broken(sample: int) -> Any:
        raise KeyError(f"no column for {sample}")

    with pytest.raises(KeyError, match="no column for 7"):
        write_page(tmp_path / "page.html", log, images=broken, queries={})


def test_a_run_without_alerts_and_queries_has_a_page(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", 16, 1, alerts=False)
    size = write_page(tmp_path / "page.html", log, queries={})
    html = (tmp_path / "page.html").read_text()
    assert size == len(html.encode())
    assert "None was raised." in html
    assert "What made these images" not in html


def test_without_matplotlib_the_error_names_the_extra(
    log: RunLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigurationError, match=r"charts need matplotlib: pip install 'diffhook\[report\]'"):
        write_page(tmp_path / "page.html", log, queries={})


def _with_signals(ranking: diffhook.analysis.Ranking, signals: Any) -> diffhook.analysis.Ranking:
    try:
        return replace(ranking, signals=signals)
    except TypeError:
        vars(ranking)["signals"] = signals
        return ranking


def test_names_are_shown_without_the_folders_that_all_share_and_listed_whole(tmp_path: Path) -> None:
    names = [
        f"/data/pictures of mine/cats/{'old' if index % 2 else 'new'}/{index}.png" for index in range(16)
    ]
    write_page(tmp_path / "page.html", write_log(tmp_path / "log", 16, 1, names=names))
    html = (tmp_path / "page.html").read_text()
    assert set(re.findall(r'data-name="([^"]+)"', html)) == set(names)
    shown = re.findall(r'<span class="name">(.+?)</span>', html)
    assert {name.replace("<wbr>", "") for name in shown} == {
        name[len("/data/pictures of mine/cats/") :] for name in names
    }
    assert short_names({1: "/a/b.png"}) == {1: "b.png"}
    assert short_names({1: "ab/c.png", 2: "ac/d.png"}) == {1: "ab/c.png", 2: "ac/d.png"}
    assert short_names({}) == {}
