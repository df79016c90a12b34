"""`compiler/sha256.py` against digests published with the standard (FIPS 180-4: "abc" and a million times "a")."""

from __future__ import annotations

from tpvc.compiler.sha256 import sha256


def test_published_digests(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    (tmp_path / "a").write_bytes(b"a" * 1_000_000)
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "a") == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"
