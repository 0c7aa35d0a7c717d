"""The page is one file that loads nothing; its plots are of what the files hold."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from fused_rnn.bench import commands, gpu, machine, page, plots, records, shapes, timing
from fused_rnn.bench.__main__ import main
from fused_rnn.bench.shapes import Shape
from test_bench_compare import measured, sweep

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))
# The plots of each command's file, by title.
PLOTS = {
    "attention": ["Ratio to the peer", "Time", "Peak memory of one call"],
    "cpu": [
        "Ratio to the peer",
        "Time",
        "Operations a second",
        "Share of the machine's limit",
    ],
    "options": ["Ratio to the peer", "Time"],
}
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that every element is closed, and keeps what there is."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.labels: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.labels += [found["aria-label"]] if "aria-label" in found else []
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def written(tmp_path: Path, *files: Path) -> tuple[str, Page]:
    path = tmp_path / "report.html"
    main(["report", *map(str, files), "-o", str(path)])
    text = path.read_text()
    return text, Page(text)


def test_page_is_self_contained(tmp_path: Path) -> None:
    text, found = written(tmp_path, *RESULTS)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(found.tags)
    assert found.links
    assert all(link.startswith("#") for link in found.links)  # markers and clips, within the page
    assert {link[1:] for link in found.links} <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))
    # What remains of other hosts are the names of XML's namespaces.
    hosts = re.findall(r'\b([\w:]+)="https?://', text)
    assert set(hosts) <= {"xmlns", "xmlns:xlink"}
    assert "url(http" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert plots.INK not in text and plots.GRID not in text


def test_page_shows_every_file_and_plot(tmp_path: Path) -> None:
    _, found = written(tmp_path, *RESULTS)
    for path in RESULTS:
        file = records.read(path)
        assert f"fused-rnn-bench {file.command}" in found.text
        assert f"All figures, {len(file.records)} rows" in found.text
    expected = [label for path in RESULTS for label in PLOTS[records.read(path).command]]
    assert {label: found.labels.count(label) for label in expected} == Counter(expected)
    assert set(found.labels) == set(expected)
    cpu = records.read(ROOT / "bench" / "results" / "cpu.json")
    for record in cpu.records:
        assert f"{record.case}" in found.text
        assert page._number(record.ratio) in found.text
    assert str(cpu.machine["processor"]) in found.text


def test_what_files_say_is_escaped(tmp_path: Path) -> None:
    document = measured(0)
    document["machine"] = document["machine"] | {"processor": "<script>alert(1)</script>"}
    document["notes"] = ["</ul><img src=x>"]
    document["rows"][0]["cell"] = "<b>LSTM & co"
    document["invocation"] = "fused-rnn-bench cpu > 'a'"
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document))
    _, found = written(tmp_path, path)
    assert not {"script", "img", "b"} & set(found.tags)
    assert "<script>alert(1)</script>" in found.text
    assert "<b>LSTM & co" in found.text


def test_failures_come_first_and_set_the_status(tmp_path: Path) -> None:
    document = measured(0)
    document["rows"][5]["time"] = None
    document["rows"][5]["check"] = {"passed": False, "message": "h_n: NaN"}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document))
    assert main(["report", str(path), "-o", str(tmp_path / "a.html")]) == 1
    found = Page((tmp_path / "a.html").read_text())
    assert found.text.index("Failed") < found.text.index("Ratio to the peer")
    assert "LSTM 100,6,64,64 forward float32: h_n: NaN" in found.text


def test_sweep_has_plots_of_each_dtype(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    sweep(path)
    document = json.loads(path.read_text())
    other = copy.deepcopy(document["rows"])
    for row in other:
        row.update(dtype="fp32", key=row["key"].replace("bf16", "fp32"))
    document["rows"] += other
    document["running"] = "GRU forward"
    path.write_text(json.dumps(document))
    _, found = written(tmp_path, path)
    for dtype in ("bf16", "fp32"):
        assert f"Ratio to the peer, {dtype}, us/step" in found.labels
        assert f"Operations a second, {dtype}, us/step" in found.labels
    assert "The run was stopped at: GRU forward" in found.text
    assert "haste" in found.text


def test_dry_run_is_told_to_be_one(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    sweep(path)
    document = json.loads(path.read_text()) | {"device": "cpu"}
    path.write_text(json.dumps(document))
    assert "a dry run on the CPU" in written(tmp_path, path)[1].text


def test_without_files_a_quick_run_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "Effort", lambda budget_s: gpu.DRY_EFFORT)
    monkeypatch.setattr(commands, "LAYERS", {"quick": ((Shape(6, 3, 5, 20),), 0.0)})
    monkeypatch.setattr(machine, "copy_bytes_per_s", lambda: 1e9)
    path = tmp_path / "r.html"
    plot = tmp_path / "r.png"
    assert main(["report", "-o", str(path), "--png", str(plot)]) == 0
    told = capsys.readouterr().out
    assert told.count("written:") == 2
    found = Page(path.read_text())
    assert "fused-rnn-bench quick" in found.text
    assert "memory, 1 GB/s" in found.text
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert shapes.QUICK


def svg(figure: Any) -> ElementTree.Element:
    assert figure is not None
    return ElementTree.fromstring(plots.svg(figure, "a", "a"))


def test_plots_hold_the_figures() -> None:
    """The x of every point is that of the file."""
    file = records.read(ROOT / "bench" / "results" / "cpu.json")
    figure = plots.ratios(file.records)
    assert figure is not None
    for axes, mode in zip(figure.axes, shapes.MODES, strict=True):
        expected = sorted(r.ratio for r in file.records if r.mode == mode and r.ratio)
        points = [line for line in axes.lines if line.get_marker() == "o"]
        assert sorted(float(line.get_xdata()[0]) for line in points) == expected
        assert axes.get_xlim()[0] < 1.0 < axes.get_xlim()[1]  # the line at 1 is seen
        heights = [float(line.get_ydata()[0]) for line in points]
        assert len(set(heights)) == len(heights)  # nothing lies on anything
        bottom, top = axes.get_ylim()
        assert all(top < height < bottom for height in heights)
    texts = "".join(svg(figure).itertext())
    for record in file.records:
        assert record.case in texts


def test_roofline_needs_a_measured_limit() -> None:
    file = records.read(ROOT / "bench" / "results" / "cpu.json")
    assert plots.roofline(file.records, None, 1e9) is None
    flat = "".join(svg(plots.roofline(file.records, 5e11, None)).itertext())
    assert "500 GFLOP/s" in flat
    assert "GB/s" not in flat
    both = "".join(svg(plots.roofline(file.records, 5e11, 2e10)).itertext())
    assert "memory, 20 GB/s" in both


def test_nothing_to_plot_is_no_plot() -> None:
    options = records.read(ROOT / "bench" / "results" / "options.json")
    assert plots.rates(options.records) is None
    assert plots.memory(options.records) is None
    assert plots.ratios([]) is None
    assert plots.times([]) is None


def test_colours_are_those_of_the_cells() -> None:
    file = records.read(ROOT / "bench" / "results" / "cpu.json")
    gru = [record for record in file.records if record.cell == "GRU"]
    assert plots._colours(gru)["GRU"] == plots._colours(file.records)["GRU"]
    assert len(set(plots._colours(file.records).values())) == 3


def test_ours_is_plotted_once_for_all_peers() -> None:
    file = records.read(ROOT / "bench" / "results" / "cpu.json")
    both = [*file.records, *(dataclasses.replace(r, peer="other") for r in file.records)]
    assert plots._once(both) == file.records
