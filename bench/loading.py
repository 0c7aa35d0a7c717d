"""A user's model and its inputs, from a function in a file of theirs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .machine import UnusableError


class Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: torch.dtype | None = None  # what products were cast to around the call


def load(target: str) -> tuple[nn.Module, Call]:
    """The model and the inputs that the user's factory returns.

    Args:
        target: ``PATH:FACTORY``: a ``.py`` file or the dotted name of a module, and in it a
            callable without arguments. It returns ``(model, inputs)``: a tuple of positional
            arguments, a dictionary of keyword arguments, or one tensor.

    Raises:
        UnusableError: it is no such thing, or the user's code raises; with its traceback.
    """
    path, _, name = target.rpartition(":")
    if not path or not name.isidentifier():
        raise UnusableError(f"{target}: expected PATH:FACTORY, as in model.py:make")
    with told(f"importing {path}"):
        module = _imported(path)
    factory = getattr(module, name, None)
    if not callable(factory):
        raise UnusableError(f"{path} has no function {name}")
    with told(f"{name}()"):
        made = factory()
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
        raise UnusableError(f"{name}() returned {_kind(made)}, expected (model, inputs)")
    model, inputs = made
    if isinstance(inputs, Mapping):
        return model, Call((), dict(inputs))
    if isinstance(inputs, (Tensor, PackedSequence)):
        return model, Call((inputs,), {})
    if isinstance(inputs, (tuple, list)):
        return model, Call(tuple(inputs), {})
    raise UnusableError(
        f"{name}() returned inputs of {type(inputs).__name__}, expected a tuple of arguments, a "
        "dictionary of keyword arguments or a tensor"
    )


def _imported(path: str) -> Any:
    if not path.endswith(".py"):
        sys.path.insert(0, os.getcwd())
        return importlib.import_module(path)
    if not Path(path).is_file():
        raise UnusableError(f"{path}: no such file")
    sys.path.insert(0, str(Path(path).resolve().parent))  # its neighbours, as for a script
    spec = importlib.util.spec_from_file_location("benchmarked_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """What the user's code raises, with the frames that are the user's."""
    try:
        yield
    except UnusableError:
        raise
    except (Exception, SystemExit) as error:
        found = traceback.TracebackException.from_exception(error)
        ours = (Path(__file__).parent, Path(importlib.__file__).parent)
        theirs = [
            frame
            for frame in found.stack
            if Path(frame.filename).parent not in ours
            and not frame.filename.startswith("<frozen importlib")
        ]
        found.stack = traceback.StackSummary.from_list(theirs)
        raise UnusableError(f"{what} failed:\n{''.join(found.format()).rstrip()}") from error


def _kind(value: Any) -> str:
    if not isinstance(value, tuple):
        return type(value).__name__
    return f"({', '.join(type(each).__name__ for each in value)})"
