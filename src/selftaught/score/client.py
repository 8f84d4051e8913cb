"""Manners towards the libraries that load models: silence, plain errors, and no half-minute of retries when offline."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from selftaught.errors import Unreachable, UserError


@contextlib.contextmanager
def told_plainly(name: str) -> Iterator[None]:
    """Turn the long errors of loading into one UserError with the remedy."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # tokenizers and safetensors raise kinds of their own, derived from nothing narrower
        text = str(error).strip()
        reason = (text.splitlines() or [type(error).__name__])[0].rstrip(".")
        if name == "quickstart" or Path(name).expanduser().exists():
            remedy = "save it again with save_pretrained"
            raise UserError(f"model: {name!r} cannot be loaded: {reason}; {remedy}") from error
        if not only_local(name):
            remedy = "check the spelling and, for a gated model, `hf auth login`; or name a local folder"
            raise UserError(f"model: {name!r} could not be had from the Hub ({reason}); {remedy}") from error
        why = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "the Hub cannot be reached from here"
        remedy = "name a local folder or 'quickstart', or fetch it once with the network on"
        raise Unreachable(f"model: {name!r} is no folder here, {why}, and its cache lacks it; {remedy}") from error


@functools.cache
def hub_is_away() -> bool:
    """Is the Hub out of reach? Asked once: the client itself would retry for half a minute at every file."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # the client's own errors differ between its versions; any of them means the same here
        return True
    return False


def only_local(place: Path | str) -> bool:
    """Must `place` be loaded without the network? A folder always; a Hub name while the Hub is out of reach."""
    return isinstance(place, Path) or hub_is_away()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of transformers: what matters is raised."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    verbosity, hub_verbosity = logging.get_verbosity(), hub.logging.get_verbosity()
    bars, hub_bars = logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    logging.set_verbosity_error()
    hub.logging.set_verbosity_error()
    logging.disable_progress_bar()
    said = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        hub.logging.set_verbosity(hub_verbosity)
        if bars:
            logging.enable_progress_bar()
        if hub_bars:
            hub.enable_progress_bars()
