"""What comes with a model for its prompts: tokenizer or processor, and the chat template, which is a program
and is tried once before a run depends on it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final

from jinja2.exceptions import TemplateError

from copd_megatron.config.models import check_tokenizer
from copd_megatron.data.failures import name_and_text, template_memory
from copd_megatron.errors import DataError

_LIMIT_SECONDS: Final = 20.0
"""Rendering one message takes milliseconds."""
_MESSAGE: Final = {"role": "user", "content": "1 + 1?"}


class _TooSlowError(Exception):
    pass


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ConfigError, DataError: it cannot be loaded, or its chat template does not end.
    """
    from transformers import AutoTokenizer

    return _loaded(AutoTokenizer, folder, "its tokenizer cannot be loaded", "tokenizer files")


def load_processor(folder: str | Path) -> Any:
    """The processor of a vision-language model's folder. Raises as ``load_tokenizer``."""
    from transformers import AutoProcessor

    files = "preprocessor_config.json, video_preprocessor_config.json and tokenizer"
    return _loaded(AutoProcessor, folder, "holds no usable processor", files)


def _loaded(kind: Any, folder: str | Path, problem: str, files: str) -> Any:
    check_tokenizer(folder)
    try:
        found = kind.from_pretrained(folder)
    except MemoryError:
        raise
    except Exception as error:  # the library raises whatever a file's content leads to
        raise DataError(
            f"{folder}: {problem} ({name_and_text(error)}). Copy the base model's {files} into it."
        ) from error
    _try_template(found, folder)
    return found


def _try_template(owner: Any, folder: str | Path) -> None:
    """Renders one short message by the template of a tokenizer or processor, if it has one. What the template
    refuses is left to the samples, each of which it may refuse for a reason of its own.

    Raises:
        DataError: it does not end, or takes all memory.
    """
    if getattr(owner, "chat_template", None) is None:
        return
    try:
        with _limited(_LIMIT_SECONDS), template_memory():
            owner.apply_chat_template([_MESSAGE], add_generation_prompt=True, tokenize=False)
    except _TooSlowError:
        raise DataError(
            f"{folder}: the chat template has not ended after {_LIMIT_SECONDS:g} s for one short message. "
            "Look at chat_template.jinja or tokenizer_config.json there."
        ) from None
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
        return


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises _TooSlowError in the block when the time is up. Outside of the main thread, which alone gets
    signals, there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise _TooSlowError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
