"""Targets: their names, and which binary runs on which card."""

import pytest

from tpvc.compiler.errors import TpvcError
from tpvc.kernels.targets import PTX, TARGETS, named, parse, usable


def test_targets_are_read_once_each_in_order():
    assert [t.name for t in parse("hip:gfx942, cuda:90,hip:gfx942")] == ["hip:gfx942", "cuda:90"]
    assert [t.backend for t in parse("hip:gfx942,cuda:90")] == ["hip", "cuda"]
    assert [named(t.name) for t in (*TARGETS, PTX)] == [*TARGETS, PTX]


@pytest.mark.parametrize("text", ["cuda:91", "", "cuda:90,", "sm_90", "ptx:80"])
def test_other_names_are_refused_with_those_that_are_known(text):
    with pytest.raises(TpvcError, match=r"is not a target .* choose among cuda:75, cuda:80.*gfx1201$"):
        parse(text)


def test_limits_are_those_of_the_vendors():
    shared = {t.name: t.shared for t in TARGETS}
    assert shared["cuda:80"] == shared["cuda:87"] == 166_912
    assert shared["cuda:86"] == shared["cuda:89"] == shared["cuda:120"] == shared["cuda:121"] == 101_376
    assert shared["cuda:90"] == shared["cuda:100"] == shared["cuda:103"] == 232_448
    assert shared["hip:gfx942"] == 65_536
    assert {t.warp for t in TARGETS if t.backend == "cuda"} == {32}
    assert [t.warp for t in parse("hip:gfx90a,hip:gfx950,hip:gfx1100,hip:gfx1201")] == [64, 64, 32, 32]
    assert all(t.shared + t.reserved <= t.shared_unit and t.threads <= t.threads_unit for t in (*TARGETS, PTX))


ALL = [*(t.name for t in TARGETS), PTX.name]


@pytest.mark.parametrize(
    ("backend", "arch", "names", "expected"),
    [
        ("cuda", 90, ALL, ("cuda:90", "ptx:80")),
        ("cuda", 86, ALL, ("cuda:86", "cuda:80", "ptx:80")),
        ("cuda", 89, ALL, ("cuda:89", "cuda:86", "cuda:80", "ptx:80")),
        ("cuda", 89, ["cuda:80", "cuda:90"], ("cuda:80",)),
        ("cuda", 87, ["cuda:80", "cuda:86", "ptx:80"], ("ptx:80",)),
        ("cuda", 121, ["cuda:120", "ptx:80"], ("ptx:80",)),
        ("cuda", 130, ALL, ("ptx:80",)),
        ("cuda", 75, ["cuda:80", "ptx:80"], ()),
        ("cuda", 70, ALL, ()),
        ("hip", "gfx942", ALL, ("hip:gfx942",)),
        ("hip", "gfx941", ALL, ()),
    ],
)
def test_what_runs_on_a_device(backend, arch, names, expected):
    assert usable(names, backend, arch) == expected
