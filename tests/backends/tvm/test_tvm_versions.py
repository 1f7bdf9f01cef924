from __future__ import annotations

import pytest

from effic.backends.tvm import versions
from effic.ir.errors import MissingToolError


@pytest.mark.parametrize("number", ["0.1.14", "0.1.14.post0", "0.1.14.post1"])
def test_releases_that_tune(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda package: number)
    versions.require_tuning()


@pytest.mark.parametrize("number", ["0.1.15.post2", "0.1.1", "0.1.140", "0.2"])
def test_releases_that_crash_are_refused_in_a_sentence(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda package: number)
    with pytest.raises(
        MissingToolError, match=rf"apache-tvm-ffi {number} crashes; run: pip install"
    ) as caught:
        versions.require_tuning()
    assert caught.value.exit_code == 3
