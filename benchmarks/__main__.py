"""``python -m benchmarks [NAME …]``: run the named benchmarks, or all of them."""

from __future__ import annotations

import importlib
import sys

NAMES = (
    "quantize_large",
    "cleanup_transformer",
    "scaling",
    "rtn_quality",
    "accuracy_level",
    "decode",
    "input_group_forms",
    "outlier_forms",
    "int8_static",
    "conv_bn_modes",
    "conv_bn_finetune",
    "adapters_as_inputs",
    "merge_large",
    "adapters_quality",
    "real_models",
    "quality",
    "speed",
    "quantize_time",
    "sparse_files",
    "sparsity",
    "sparse_training",
    "prune_time",
    "plan",
    "tvm_kernels",
    "tvm_quality",
    "cuda",
    "tvm_models",
)


def main(names: list[str]) -> None:
    """Run benchmarks by name."""
    unknown = [n for n in names if n not in NAMES]
    if unknown:
        raise SystemExit(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(NAMES)}")
    for name in names or NAMES:
        importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main(sys.argv[1:])
