import errno
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tpvc.compiler import charts, report, units
from tpvc.compiler.errors import TpvcError

VOID = {"meta", "link", "br", "hr", "img", "input"}


def learning(i: int) -> dict:
    curve = [[s, 0.02 * 1.3**i * 0.98**s] for s in range(0, 101, 10)]
    return {"error_rtn": 0.02 * 1.3**i, "error": 0.004 * 1.3**i, "steps": 100, "curve": curve}


def manifest(blocks: int = 6, learned: bool = True) -> dict:
    records = [
        {
            "block": i,
            **(learning(i) if learned else {}),
            "linears": [
                {
                    "name": f"model.layers.{i}.{n}",
                    "shape": [64, 64],
                    "grid": "W3 g64 asymmetric",
                    "bits": 3,
                    "flips": 0.1 if learned else 0.0,
                }
                for n in ("self_attn.q_proj", "mlp.<down>&proj")
            ],
        }
        for i in range(blocks)
    ]
    return {
        "tpvc": "0.1.0",
        "source": {"name": "tiny & <small>", "files": {"model.safetensors": "ab" * 32}, "config": {}},
        "options": {"bits": 3, "group_size": 64, "dataset": "builtin", "seed": 0, "adapters": []},
        "calibration": {"tokens": 32768, "sha256": "cd" * 32, "domains": {"prose": 12}},
        "passes": [{"name": "FlexRound", "grid": "W3 g64 asymmetric"}, {"name": "Fold", "options": {"adapters": 2}}],
        "blocks": records,
        "head": {"name": "lm_head", "bits": 8},
        "left_in_float": [{"name": "model.layers.0.gate", "why": "64 does not divide it"}],
        "size": {"bytes": 110_000_000, "float_bytes": 269_000_000},
        "versions": {"torch": "2.13.0"},
    }


class Balance(HTMLParser):
    """Every tag that is opened is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def html_of(tmp_path: Path, given: dict, timings: list[float]) -> str:
    report.write(tmp_path / "report.html", given, timings)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def parsed(html: str) -> Balance:
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    return parser


def test_a_whole_report(tmp_path):
    html = html_of(tmp_path, manifest(), [12.0, 61.0, 7.5, 8.0, 9.0, 3700.0])
    tags = parsed(html)
    assert tags.seen.count("svg") == 3 + 6
    assert tags.seen.count("details") == 6
    for text in (
        "tiny &amp; &lt;small&gt;",
        "W3 g64 asymmetric",
        "110.0 MB",
        "269.0 MB before, 2.45 times smaller",
        "5.0×",
        "1 h 03 min",
        "ab" * 32,
        "64 does not divide it",
        "10.00 %",
        "torch 2.13.0",
    ):
        assert text in html, text


def test_nothing_is_fetched(tmp_path):
    html = html_of(tmp_path, manifest(), [1.0] * 6).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|src=|@import|url\(|<script", html)


@pytest.mark.parametrize(
    "given",
    [{}, manifest(0), manifest(1), manifest(40), manifest(3, learned=False)],
    ids=["empty", "no blocks", "one block", "forty blocks", "rounded to nearest"],
)
def test_what_is_missing_is_left_out(given, tmp_path):
    html = html_of(tmp_path, given, [])
    tags = parsed(html)
    blocks = given.get("blocks", [])
    learned = any("curve" in block for block in blocks)
    assert ("learned rounding" in html) == learned
    assert tags.seen.count("svg") == (2 + len(blocks) if learned else 0)
    assert tags.seen.count("details") == len(blocks)


def test_the_same_manifest_gives_the_same_bytes(tmp_path):
    assert html_of(tmp_path, manifest(), [1.0] * 6) == html_of(tmp_path, manifest(), [1.0] * 6)


def test_pictures_are_svg_and_points_are_inside():
    for picture in (
        charts.lines([0, 1, 2], [("a", [1e-4, None, 3.0]), ("b", [0.0, 2e-4, 0.5])]),
        charts.lines([0, 1, 2], [("a", [2.0, math.inf, 3.0])]),
        charts.bars(list(range(80)), [0.0, 3.7] * 40, units.seconds),
        charts.curve([[0, 1.0], [10, 0.1], [20, 0.1]]),
    ):
        svg = ElementTree.fromstring(picture[picture.index("<svg") :])
        width, height = (float(v) for v in svg.attrib["viewBox"].split()[2:])
        for points in re.findall(r'points="([^"]*)"', picture):
            for x, y in (p.split(",") for p in points.split()):
                assert 0 <= float(x) <= width and 0 <= float(y) <= height
        for x, y in re.findall(r'cx="([^"]*)" cy="([^"]*)"', picture):
            assert 0 <= float(x) <= width and 0 <= float(y) <= height


def test_an_all_zero_series_draws_nothing_and_zero_bars_do_not_divide_by_zero():
    assert charts.lines([0], [("a", [0.0])]) == ""
    assert ">4<" in charts.lines([0, 1], [("a", [3.7, 4.6])])  # between 2 and 5 a step of its own
    assert charts.bars([0, 1], [0.0, None], report.percent_text).count("<rect") == 2
    assert charts.curve([[0, 0.0], [1, 0.0]]) == ""


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(TpvcError, match="No space left"):
        report.write(tmp_path / "report.html", manifest(), [])


def test_widths_that_were_chosen_are_a_picture(tmp_path):
    names = (["q_proj", "k_proj"], ["mlp.down_proj"])
    groups = [
        {"block": i, "names": [f"model.layers.{i}.{n}" for n in own], "bits": bits}
        for i in range(6)
        for own, bits in zip(names, (2 + i % 3, 8), strict=True)
    ]
    chosen = {"asked": 3.5, "taken": 3.4875, "codes": 3.2, "groups": groups}
    html = html_of(tmp_path, manifest() | {"chosen_bits": chosen}, [])
    parsed(html)
    assert "Bits of each group of linears" in html and "3.487" in html and "3.5 were asked for" in html
    assert html.count("block 4, q k: 3 bits") == html.count("block 5, down: 8 bits") == 1
    assert "Bits of each group" not in html_of(tmp_path, manifest(), [])
