"""Pickles of torch's checkpoint metadata, as any Python writes them, and those that ask for more."""

from __future__ import annotations

import io
import os
import pickle
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata

from coalm_nemo.checkpoint.torch_pickle import loads
from coalm_nemo.errors import UserError


class EarlyPickler(pickle.Pickler):
    """Pickles enumerations as Python 3.11.0 to 3.11.3 does: as an attribute of their class."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def pickled(pickler: type[pickle.Pickler], value: Any) -> bytes:
    file = io.BytesIO()
    pickler(file).dump(value)
    return file.getvalue()


@pytest.mark.parametrize("pickler", [pickle.Pickler, EarlyPickler])
def test_metadata_as_every_python_writes_it(pickler: type[pickle.Pickler]) -> None:
    import torch

    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), torch.Size([3, 5]), [])
    data = pickled(pickler, Metadata(state_dict_metadata={"w": tensor}))
    early = pickler is EarlyPickler or sys.version_info < (3, 11, 4)
    assert (b"getattr" in data) == early
    found = loads(data, "x").state_dict_metadata["w"]
    assert (found.properties.dtype, found.size) == ("bfloat16", (3, 5))


class Attribute:
    """Pickled as `getattr(*of)`."""

    def __init__(self, *of: Any) -> None:
        self.of = of

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return getattr, self.of


@pytest.mark.parametrize("of", [("text", "upper"), ({}, "clear"), (dict, "fromkeys"), (Path("x"), "unlink")])
def test_attributes_of_anything_else_are_refused(of: tuple[Any, ...]) -> None:
    with pytest.raises(UserError):
        loads(pickle.dumps(Attribute(*of)), "x")


def test_other_names_are_refused() -> None:
    with pytest.raises(UserError, match="not trusted"):
        loads(pickle.dumps(os.getcwd), "x")
