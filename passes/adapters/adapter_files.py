"""Adapters as they lie on disk: PEFT folders, and effic's reading of kinds that PEFT does not write.

A folder holds ``adapter_config.json`` (:mod:`effic.passes.adapters.adapter_config`) and
``adapter_model.safetensors``, or an older ``adapter_model.bin``, of which nothing but tensors is
unpickled. Keys of the tensors, after ``base_model.model.`` is taken off the front and ``.default`` out of
the middle::

    <module>.lora_A.weight  .lora_B.weight  .lora_B.bias     Linear, Conv, and (with target_parameters) experts
    <module>.lora_embedding_A  .lora_embedding_B             Embedding
    <module>.lora_magnitude_vector[.weight]                  DoRA
    <module>.token_adapter.trainable_tokens_delta            rows of an embedding, replaced
    <module>[.base_layer].weight  .bias                      replaced as a whole: modules_to_save, trained biases

PEFT 0.21 writes none of PaCA, S²FT, SVFit and L4Q, and their papers fix no file. What is read here is
effic's own layout, the same config with another ``peft_type``; whether any training code writes it is not
verified:

=========  =============================================================================================
PACA       ``.paca_w`` ``[out, r]``, ``.paca_indices`` ``[r]``; σ = ``paca_alpha`` (or ``lora_alpha``) / r
S2FT       ``.s2``, ``.s2_axis`` (0: rows, as for v and up; 1: columns, as for o and down), ``.s2_start``,
           and ``.s2_order``, the permutation over the channels of that axis, where there was one
SVFIT      ``.svfit_u`` ``[out, r]``, ``.svfit_v`` ``[in, r]``, ``.svfit_sigma`` ``[r]``, and perhaps
           ``.svfit_sigma0``, the values before training
L4Q        ``.lora_A.weight``, ``.lora_B.weight``, ``.l4q_scale`` and ``.l4q_offset`` ``[out, groups]``,
           ``bits`` in the config
=========  =============================================================================================
"""

from __future__ import annotations

import hashlib
import os
import pickle
import stat
import struct
import warnings
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

from effic.ir.errors import InvalidModelError, MissingExtraError, UsageError
from effic.ir.safetensors_format import read_safetensors
from effic.passes.adapters.adapter_config import CONFIG_BYTES, read_settings
from effic.passes.adapters.adapter_tensors import Adapter, AdapterModule, Kind, Method, Sorting

__all__ = ["CONFIG", "TENSORS", "Adapter", "AdapterModule", "Kind", "Method", "read_adapter"]

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


# What torch's unpickler trips over in a file that no torch wrote.
_DAMAGE = (
    RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, OSError,
    OverflowError, struct.error,
)  # fmt: skip


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter folder.

    Tensors stay in their file; what is checked on reading is everything that can be without a base:
    names, dtypes, shapes against one another and against the configuration, and that all numbers are
    finite.

    Raises:
        UsageError: there is no such folder, or it lacks a file.
        InvalidModelError: the adapter is broken, hostile, or of a kind that cannot be merged.
        MissingExtraError: the tensors are in a ``.bin`` file and torch is not installed.
    """
    path = os.fspath(path)
    if not os.path.isdir(path):
        raise UsageError(f"{path} is no folder; name the folder that holds {CONFIG} and {TENSORS}.")
    name = os.path.basename(os.path.abspath(path))
    where = _file(path, CONFIG)
    if where is None:
        raise UsageError(f"{path} has no {CONFIG}; name the folder of a PEFT adapter.")
    with open(where, "rb") as file:
        text = file.read(CONFIG_BYTES + 1)
    if len(text) > CONFIG_BYTES:
        raise InvalidModelError(f"{where} has more than {CONFIG_BYTES} bytes; that is no configuration.")
    settings = read_settings(text, where)
    digest = hashlib.sha256(text)
    if (found := _file(path, TENSORS)) is not None:
        tensors, _, mapped = read_safetensors(found)
        digest.update(bytes.fromhex(mapped.sha256()))
    elif (found := _file(path, PICKLE)) is not None:
        tensors = _read_pickle(found)
        with open(found, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    else:
        raise UsageError(f"{path} has no {TENSORS}; name the folder of a PEFT adapter.")
    sorting = Sorting(name, found, settings)
    for key, tensor in tensors.items():
        sorting.take(key, tensor)
    return sorting.finish(path, digest.hexdigest())


def _file(folder: str, name: str) -> str | None:
    """The path of a file of the folder, or None where there is none.

    Raises:
        InvalidModelError: it is a link that leaves the folder. The links of a hub cache, from
            ``snapshots/<revision>/`` to ``blobs/`` of the same repository, may.
    """
    path = os.path.join(folder, name)
    if not os.path.lexists(path):
        return None
    real, root = os.path.realpath(path), os.path.realpath(folder)
    allowed = [root]
    if os.path.basename(os.path.dirname(root)) == "snapshots":
        allowed.append(os.path.join(os.path.dirname(os.path.dirname(root)), "blobs"))
    if not any(os.path.dirname(real) == place for place in allowed):
        raise InvalidModelError(f"{path} is a link that leaves its folder; copy the file there instead.")
    try:
        status = os.stat(real)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}.") from error
    if not stat.S_ISREG(status.st_mode):
        raise InvalidModelError(f"{path} is no regular file.")
    return path


def _check_archive(path: str) -> None:
    """Refuse a compressed archive, which torch never writes: it may unpack to any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        # torch tells what it is, if it is anything.
        return
    if packed:
        raise InvalidModelError(f"{path} is compressed, which torch's files are not; save it as {TENSORS}.")


def _read_pickle(path: str) -> dict[str, np.ndarray]:
    """The tensors of a ``.bin`` file; anything else in it is refused, unexecuted."""
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "torch", f"reading {os.path.basename(path)}") from error
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *_DAMAGE) as error:
        raise InvalidModelError(
            f"{path} holds something else than tensors, or is damaged, and was not opened; "
            f"save the adapter as {TENSORS}."
        ) from error
    if not isinstance(found, dict):
        raise InvalidModelError(f"{path} is no table of tensors; save the adapter as {TENSORS}.")
    tensors, size = {}, os.path.getsize(path)
    for key, tensor in found.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise InvalidModelError(f"{path} holds {key!r:.80}, which is no named dense tensor.")
        # A file of a few bytes may ask for terabytes, by strides of zero or by compression.
        if tensor.device.type != "cpu" or tensor.dtype not in _torch_types() or tensor.nbytes > size:
            raise InvalidModelError(
                f"{path} holds {key!r:.80} of type {tensor.dtype} and shape {list(tensor.shape)}, which is no "
                f"tensor of an adapter; save the adapter as {TENSORS}."
            )
        tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
        if tensor.dtype == torch.bfloat16:
            tensors[key] = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            tensors[key] = tensor.numpy()
    return tensors


def _torch_types() -> set[Any]:
    """What tensors of adapters may consist of."""
    import torch

    return {
        torch.float32, torch.float16, torch.bfloat16, torch.float64,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    }  # fmt: skip
