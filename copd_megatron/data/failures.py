"""Whatever goes wrong with one sample is that sample's failure, not the run's.

Decoders, processors, tokenizers and chat templates meet what other people wrote, and raise whatever their
authors did not foresee: a malformed EXIF block is a TypeError, a video of changing size a ValueError. Code
that handles one sample runs inside ``sample_failure``, which turns any of these into a BadSampleError; the
stream skips and counts it.

A failure must depend on the sample alone: every rank reads the same samples and must skip the same ones. For
this reason nothing here measures time, and two kinds pass through: MemoryError, which depends on the machine,
and DataError, which says that the data set as a whole cannot be read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from copd_megatron.errors import BadSampleError, DataError

logger = logging.getLogger(__name__)

UNEXPECTED = "unexpected"
"""Reason of failures that no part of the code foresees."""


@contextmanager
def sample_failure(where: str, reason: str, problem: str, remedy: str) -> Iterator[None]:
    """Turns an exception into ``BadSampleError(where, reason, problem, remedy)`` with the exception's type.

    DataError (BadSampleError included), MemoryError and what is not an Exception, such as
    KeyboardInterrupt, pass through.
    """
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        logger.debug("%s: %s", where, problem, exc_info=True)
        raise BadSampleError(where, reason, f"{problem} ({name_and_text(error)})", remedy) from error


@contextmanager
def template_memory() -> Iterator[None]:
    """Says that it was the chat template that took all memory: a few letters can ask for any amount."""
    try:
        yield
    except MemoryError as error:
        raise DataError(
            "the chat template of the model's tokenizer takes more memory than there is. Look at "
            "chat_template.jinja or tokenizer_config.json in the model's folder."
        ) from error


def any_failure(where: str) -> AbstractContextManager[None]:
    """The last resort: ``sample_failure`` with reason ``unexpected``."""
    return sample_failure(
        where,
        UNEXPECTED,
        "reading the sample failed in a way that was not foreseen",
        "Drop the sample; if many fail like this, report it with one of them.",
    )


def name_and_text(error: Exception) -> str:
    """``TypeError: an integer is required``, on one line and not longer than 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__
