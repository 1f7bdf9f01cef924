"""Which releases of TVM's packages work, asked before something crashes without a word."""

from __future__ import annotations

from importlib.metadata import version

from effic.ir.errors import MissingToolError

FFI = "0.1.14"
"""The release of apache-tvm-ffi that MetaSchedule was tried with; 0.1.15 makes it crash, and nothing else."""


def require_tuning() -> None:
    """Refuse to tune with packages that crash when tuning.

    Raises:
        MissingToolError: apache-tvm-ffi is of another release.
    """
    have = version("apache-tvm-ffi")
    if have != FFI and not have.startswith(f"{FFI}."):
        raise MissingToolError(
            f"tuning with apache-tvm-ffi {have} crashes; run: pip install 'apache-tvm-ffi=={FFI}.post0'"
        )
