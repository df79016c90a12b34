"""A short run of the fuzzer, and that it notices what it is there for. The long run: `python tests/fuzz/run.py`."""

import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parent

BAD = """
import os, sys
sys.path.insert(0, {fuzz!r})
import run, worker
from pathlib import Path
worker.SECONDS = 0.2
outside = Path({outside!r})

def forever(root):
    while True: pass
def waits(root):
    import signal
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])
    os.read(os.pipe()[0], 1)

bad = dict(
    error=lambda root: [][1],
    hang=forever,
    memory=lambda root: bytearray(64 << 30),
    writes=lambda root: (outside / "x").write_text("x"),
    reads=lambda root: (outside / "secret").read_text(),
    pickles=lambda root: __import__("pickle").loads(__import__("pickle").dumps(os.getcwd)),
    starts=lambda root: os.system("true"),
    dies=lambda root: os.abort(),
    waits=waits,
    fine=lambda root: None,
)
run.seeds.SEEDS |= dict.fromkeys(bad, run.seeds.SEEDS["recipe"])
run.readers.SHARES |= dict.fromkeys(bad, 1)
for name, call in bad.items():
    run.DEAD = 2.0 if name == "waits" else 300.0
    print("RESULT", name, run.one(name, call, 2, 0, Path({work!r}), Path({work!r})))
"""


def test_what_must_not_happen_is_noticed(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    (tmp_path / "work").mkdir()
    script = BAD.format(fuzz=str(FUZZ), outside=str(tmp_path / "outside"), work=str(tmp_path / "work"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = dict(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT"))
    kinds = ("error", "hang", "memory", "writes", "reads", "pickles", "starts", "dies", "waits")
    assert found == dict.fromkeys(kinds, "1") | {"fine": "0"}, done.stdout
    for word in ("IndexError at", "hang at", "memory at", "to write", "not part of", "pickle.find_class", "signal 6"):
        assert word in done.stdout


def test_a_short_run_finds_nothing(tmp_path):
    command = [sys.executable, str(FUZZ / "run.py"), "--cases", "2500", "--seed", "1", "--keep", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
