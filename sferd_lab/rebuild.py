"""Modules built again from what a file says of them, and never larger than the file itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from sferd_lab.errors import SferdError
from sferd_lab.train import load_part, matching

M = TypeVar("M", bound=nn.Module)


@contextmanager
def at_most(tensors: int) -> Iterator[None]:
    """Raise SferdError as soon as the modules made in this block have many more parameters than a file of so many ``tensors`` can fill."""
    allowed, made = 2 * tensors + 100, 0  # so that a file that lacks some is told which

    def count(_module: nn.Module, _name: str, _parameter: Tensor) -> None:
        nonlocal made
        made += 1
        if made > allowed:
            raise SferdError(f"what it says of its model takes more than {allowed} tensors, and it holds {tensors}")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def rebuild(build: Callable[[], M], tensors: Mapping[str, Tensor], path: Path | str) -> M:
    """The module that ``build`` makes from the words of the file ``path``, with the file's ``tensors`` as its state.

    It is built without memory first, and in earnest once each of its tensors is seen to be one of the file's, of that shape and dtype:
    whatever the file says, no more is allocated than it holds. Raises SferdError for a missing, extra or misshapen tensor, for words that
    make no module, and for a tensor that holds NaN or infinity.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise SferdError(f"{path}: tensor '{name}' holds NaN or infinity; expected finite values")
    try:
        with torch.device("meta"), at_most(len(tensors)):
            shape = build()
    except SferdError as error:
        raise SferdError(f"{path}: {error}") from None
    except Exception as error:  # whatever a constructor, or torch itself, makes of a value that it was never meant to be given
        raise SferdError(f"{path} lacks what rebuilds its model: {error}") from None
    matching(shape.state_dict(), tensors, "", path)
    model = build()
    load_part(model, tensors, "", path)
    return model
