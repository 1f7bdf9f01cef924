"""Kernels that TVM has none for, one family per file: a spec that packs the weight and makes the function."""
