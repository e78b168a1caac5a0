"""Triton's interpreter without what takes most of its time and changes nothing."""

from dataclasses import replace
from functools import cache

import triton.language as tl
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang


def make_faster() -> None:
    """For this process."""
    # whether integers overflow is worked out at every operation, and told only where `debug` is on as well
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter._patch_lang = _patch_lang_once


def _patch_lang_once(fn):
    """Replace the language by its interpreted form, unless the launch has: Triton looks through it at every helper's call."""
    if any(tl.core.is_builtin(module.load) for module in _languages(fn)):
        return _patch_lang(fn)
    return interpreter._LangPatchScope()


@cache
def _languages(fn) -> list:
    return [value for value in fn.__globals__.values() if value is tl or value is tl.core]
