"""A client of any OpenAI-compatible chat endpoint: the only module that talks to a language model's server.

The key is read from an environment variable, sent to that endpoint alone (redirects are not followed) and never shown.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from selftaught.errors import UserError

AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})  # what a server says that may do better in a moment
LONGEST_PAUSE = 60.0
SAID = 300  # characters of a server's own words in a message
THINKING = re.compile(r"\A.*</think>", re.DOTALL)


class Failed(Exception):
    """One request that did not work out, in words for people; others may."""


@dataclass(frozen=True)
class Reply:
    """What the model wrote, without its thinking; `whole` is False where it was cut off."""

    text: str
    whole: bool


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """None: a redirect is an error, so that the key goes nowhere else."""


@dataclass
class Chat:
    """POST `endpoint`/chat/completions. May be shared by threads.

    `retries` is how often a request is sent again after 429, 5xx, a time-out, a broken connection or an answer that is
    no chat completion; pauses begin at `pause` seconds, double, vary by a half, and heed Retry-After.
    """

    endpoint: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    retries: int = 5
    pause: float = 1.0
    _met: threading.Event = field(default_factory=threading.Event, repr=False)  # it has answered something
    _stopped: threading.Event = field(default_factory=threading.Event, repr=False)

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--endpoint {self.endpoint!r}: give a URL such as https://host/v1")
        if parts.username or parts.password:
            raise UserError("--endpoint: leave user and password out of the URL; the key belongs in the environment "
                            f"variable {self.key_variable}")
        url = self.endpoint.rstrip("/")
        self._url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        self._open = urllib.request.build_opener(_NoRedirect).open
        self._key = os.environ.get(self.key_variable, "").strip()

    def ask(self, model: str, messages: Sequence[Mapping[str, str]]) -> Reply:
        """The model's answer.

        Raises:
            UserError: nothing can work: the endpoint is not there, refuses the key, or does not know the model.
            Failed: this request did not work out, after all retries.
        """
        body = json.dumps({"model": model, "messages": list(messages)}).encode()
        for attempt in range(self.retries + 1):
            try:
                return _reply(self._post(body))
            except _Again as error:
                if attempt == self.retries:
                    raise Failed(self._redacted(f"{error}, after {attempt + 1} attempts")) from None
                wait = self.pause * 2**attempt * random.uniform(0.5, 1.5)
                if self._stopped.wait(min(LONGEST_PAUSE, max(wait, error.after))):
                    raise Failed("stopped") from None
        raise AssertionError("unreachable: the last attempt returns or raises")

    def stop(self) -> None:
        """End all pauses; nothing is sent again."""
        self._stopped.set()

    def _post(self, body: bytes) -> Any:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(self._url, body, headers, method="POST")
        try:
            with self._open(request, timeout=self.timeout) as response:
                raw = response.read()
        except urllib.error.HTTPError as error:
            self._met.set()
            raise self._judged(error) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._unreached(error) from None
        self._met.set()
        try:
            return json.loads(raw)
        except (ValueError, RecursionError):
            raise _Again(f"the answer is not JSON: {_short(raw)}") from None

    def _judged(self, error: urllib.error.HTTPError) -> Exception:
        """What a status other than 2xx means."""
        with error:
            said = _message(error.read(10_000))
        what = self._redacted(f"{error.code} {error.reason}" + (f": {said}" if said else ""))
        if error.code in (401, 403):
            hint = f"set {self.key_variable} to a key that it takes" if self._key else f"{self.key_variable} is not set"
            return UserError(f"--endpoint {self.endpoint}: it refuses the key ({what}); {hint}")
        if error.code == 404 or 300 <= error.code < 400:
            return UserError(f"--endpoint {self.endpoint}, --model: {self._url} or the model is not there ({what}); "
                             "check both (the URL usually ends in /v1)")
        if error.code in AGAIN:
            return _Again(what, _seconds(error.headers.get("Retry-After")))
        return Failed(what)

    def _unreached(self, error: Exception) -> Exception:
        """No answer at all: of a server that has answered before, worth another attempt."""
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, TimeoutError):
            return _Again(f"no answer within {self.timeout:g} s")
        what = str(reason) or type(reason).__name__
        if self._met.is_set() or isinstance(error, http.client.HTTPException | ConnectionResetError):
            return _Again(f"the connection broke: {what}")
        return UserError(f"--endpoint {self.endpoint}: it cannot be reached ({what}); start the server or mend the URL")

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class _Again(Exception):
    """A failure that another attempt may mend, not before `after` seconds."""

    def __init__(self, what: str, after: float = 0.0) -> None:
        super().__init__(what)
        self.after = after


def _reply(answer: Any) -> Reply:
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise _Again(f"the answer is no chat completion: {_short(json.dumps(answer).encode())}") from None
    if not isinstance(text, str) or not text.strip():
        raise _Again("the answer is empty")
    return Reply(THINKING.sub("", text).strip(), choice.get("finish_reason") != "length")


def _message(raw: bytes) -> str:
    """What a server said of an error, as short as it can be had."""
    try:
        value = json.loads(raw)
        error = value.get("error", value)
        return _short(str(error.get("message", error) if isinstance(error, dict) else error).encode())
    except (ValueError, AttributeError, RecursionError):
        return _short(raw)


def _short(raw: bytes) -> str:
    text = " ".join(raw.decode("utf-8", "replace").split())
    return text if len(text) <= SAID else text[:SAID] + " ..."


def _seconds(header: str | None) -> float:
    """Retry-After in seconds; its other form, a date, counts as none."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0
