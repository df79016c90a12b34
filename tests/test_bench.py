"""The measuring itself, on an engine that only counts."""

import subprocess
import sys

from tpvc.compiler import bench


class Counting:
    vocab_size = 100

    def __init__(self):
        self.asked = []

    def generate(self, ids, new, stop):
        self.asked.append((list(ids), new, stop))
        yield from range(new)


def test_a_run_takes_every_token_and_never_stops_early():
    engine = Counting()
    first, decode = bench.once(engine, 8, 16)
    assert first >= 0 and decode > 0
    assert engine.asked == [(bench.prompt(100, 8), 16, False)]


def test_prompt_is_the_same_every_time_and_inside_the_vocabulary():
    ids = bench.prompt(384, 300)
    assert ids == bench.prompt(384, 300)
    assert min(ids) >= 0 and max(ids) < 384
    assert len(set(ids)) == 300


def test_peak_is_this_process_alone():
    """A child of a large parent does not inherit its peak."""
    ballast = bytearray(300_000_000)
    code = "from tpvc.compiler.bench import peak_bytes; print(peak_bytes())"
    child = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert bench.peak_bytes() > len(ballast)
    assert 1e6 < int(child.stdout) < 2e8
