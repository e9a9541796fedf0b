"""A judge behind an OpenAI-compatible address (OpenAI, vLLM, SGLang, llama.cpp, Ollama, ...)."""

from __future__ import annotations

import email.utils
import json
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import urlsplit

from keeplora.errors import ConfigError
from keeplora.evaluation.judges.base import Heard, JudgeError, Question, Verdict
from keeplora.evaluation.judges.http_json import NoAnswer, Reply, post_json
from keeplora.evaluation.judges.prompt import PROMPT_VERSION, messages
from keeplora.evaluation.judges.reply import parse_score

#: Seconds before the second attempt; each further wait is twice as long, up to `LONGEST_PAUSE`, and drawn from its upper half.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
#: Statuses that may pass: too early, busy, too many requests, and the server's own faults.
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 507, 520, 521, 522, 523, 524, 529})


class Failure(Exception):
    """An attempt that failed; ``again`` where another may succeed, ``after`` the seconds that the server asks for."""

    def __init__(self, reason: str, *, again: bool = True, after: float | None = None) -> None:
        super().__init__(reason)
        self.again, self.after = again, after


class EndpointJudge:
    """Asks ``POST {base_url}/chat/completions`` for one rating per answer, greedily, several at a time.

    What may pass (a lost connection, no answer in time, status 408, 409, 425, 429 or 5xx, an answer that is no JSON or holds no
    choice) is tried again after a pause that doubles, with jitter; where the server says how long (``Retry-After``), everyone
    waits that long. An answer without words is tried again too, and is unparsable if that is all that ever comes. Anything
    else ends the judging at once.

    Args:
        model: the name that the server knows it by; it is the judge's identity, the address is not.
        base_url: as OpenAI's clients take it, usually ending in "/v1"; without a name and password in it.
        api_key_env: the environment variable that holds the key; None sends none. The key itself is never kept or told.
        timeout: seconds that one request may take.
        retries: further attempts for one answer.
        concurrency: requests under way at once.
        max_wait: the longest wait, in seconds, that a server may ask for.
        max_tokens: of the judge's words.
        body: further entries of the request, e.g. ``{"chat_template_kwargs": {"enable_thinking": False}}``; None as a value
            leaves an entry out. They are part of the identity.

    Raises:
        ConfigError: an address, key or number that cannot be used.
    """

    def __init__(
        self, model: str, base_url: str, *, api_key_env: str | None = None, timeout: float = 60.0, retries: int = 6,
        concurrency: int = 8, max_wait: float = 300.0, max_tokens: int = 128, body: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"judge.base_url is {base_url!r}: give an address such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query:
            raise ConfigError(
                f"judge.base_url names {parts.hostname} with a password or a query in it, which would be kept with the run; "
                "put the key into an environment variable and name that as judge.api_key_env"
            )
        self.model, self.timeout, self.retries, self.max_wait = model, timeout, retries, max_wait
        self.concurrency = concurrency
        self.url = f"{base_url.rstrip('/').removesuffix('/chat/completions')}/chat/completions"
        self._key_env, self._key = api_key_env, _key(api_key_env)
        fixed = {"model": model, "temperature": 0, "max_tokens": max_tokens, **(body or {})}
        self._fixed = {name: value for name, value in fixed.items() if value is not None}
        self.identity: Mapping[str, Any] = {"kind": "openai", "request": self._fixed, "prompt": PROMPT_VERSION}
        self._stop = threading.Event()
        self._quiet_until = 0.0  # time.monotonic() before which nobody asks: the server's wish
        self._lock = threading.Lock()

    def close(self) -> None: ...

    def judge(self, items: Sequence[Question], heard: Heard | None = None) -> list[Verdict]:
        verdicts: list[Verdict] = [Verdict(None)] * len(items)
        self._stop = threading.Event()
        failed: Exception | None = None
        done = 0
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge")
        places = iter(range(len(items)))
        running: dict[Future[Verdict], int] = {}
        try:
            while True:
                while failed is None and len(running) < self.concurrency and (place := next(places, None)) is not None:
                    running[pool.submit(self._ask, items[place])] = place
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    place = running.pop(future)
                    try:
                        verdicts[place] = future.result()
                    except Failure as error:
                        failed = failed or error
                        self._stop.set()  # those that wait for another attempt give up; those under way are heard
                        continue
                    done += 1
                    if heard is not None:
                        heard(place, verdicts[place])
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
        if failed is not None:
            raise JudgeError(
                f"the judge {self.model!r} at {self.url} cannot be asked ({done:,} of {len(items):,} answers judged): {failed}"
            ) from failed
        return verdicts

    def _ask(self, item: Question) -> Verdict:
        """The verdict on one answer, after as many attempts as it takes."""
        for attempt in range(self.retries + 1):
            try:
                self._wait_for_leave()
                text = self._words(item)
                return Verdict(parse_score(text), text)
            except Failure as error:
                last = attempt == self.retries
                if last and isinstance(error, Wordless):
                    return Verdict(None, "")
                if not error.again or last or self._stop.is_set():
                    tried = f" (after {attempt + 1} attempts)" if attempt else ""
                    raise Failure(f"{error}{tried}") from error
                self._pause(attempt, error.after)
        raise AssertionError("unreachable")

    def _words(self, item: Question) -> str:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            reply = post_json(self.url, {**self._fixed, "messages": messages(item)}, headers, self.timeout)
        except NoAnswer as error:
            raise Failure(str(error)) from error
        if reply.status != 200:
            raise self._refusal(reply)
        return _content(reply.body)

    def _refusal(self, reply: Reply) -> Failure:
        told = self._hidden(_message(reply.body))
        reason = f"status {reply.status}{f' ({told})' if told else ''}"
        if reply.status in (401, 403):
            named = (
                f"the key in {self._key_env} is refused"
                if self._key
                else "it wants a key: name its variable as api_key_env"
            )
            return Failure(f"{reason}; {named}", again=False)
        if 300 <= reply.status < 400:
            return Failure(f"{reason}: it lies at another address, which base_url must name", again=False)
        if reply.status == 404:
            return Failure(f"{reason}; check base_url (does it end in /v1?) and model", again=False)
        if reply.status not in PASSING:
            return Failure(reason, again=False)
        after = retry_after(reply.headers.get("retry-after"))
        if after is not None and after > self.max_wait:
            return Failure(f"{reason}; it asks to wait for {after:,.0f} s, longer than max_wait", again=False)
        return Failure(reason, after=after)

    def _hidden(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _pause(self, attempt: int, after: float | None) -> None:
        pause = pause_after(attempt)
        if after is not None:
            with self._lock:
                self._quiet_until = max(self._quiet_until, time.monotonic() + after)
            pause = after + FIRST_PAUSE * random.uniform(0.0, 0.5)  # not everyone in the same instant
        self._stop.wait(pause)

    def _wait_for_leave(self) -> None:
        with self._lock:
            left = self._quiet_until - time.monotonic()
        if left > 0:
            self._stop.wait(left)
        if self._stop.is_set():
            raise Failure("another question failed", again=False)


class Wordless(Failure):
    """An answer in the right form without a word in it."""


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ConfigError(
            f"judge.api_key_env names the environment variable {variable}, which is not set; set it to the key"
        )
    if not value.isascii() or any(letter.isspace() for letter in value):
        raise ConfigError(f"the key in {variable} holds blanks or letters that no key has; set it again")
    return value


def pause_after(attempt: int) -> float:
    """Seconds to wait after attempt number ``attempt`` (from 0) has failed."""
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * random.uniform(0.5, 1.0)


def retry_after(value: str | None) -> float | None:
    """Seconds that a ``Retry-After`` header asks for, a number or a date; None where it says neither.

    >>> retry_after("2.5"), retry_after("Wed, 21 Oct 2015 07:28:00 GMT"), retry_after("soon")
    (2.5, 0.0, None)
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if seconds == seconds and seconds != float("inf") else None


def _content(body: bytes) -> str:
    """The words of the first choice."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Failure("its answer is no JSON") from error
    choices = found.get("choices") if isinstance(found, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        told = _message(body)
        raise Failure(f"its answer holds no choices{f' ({told})' if told else ''}")
    message = choices[0].get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if isinstance(text, list):  # the form in parts
        text = "".join(part["text"] for part in text if isinstance(part, dict) and isinstance(part.get("text"), str))
    if text is not None and not isinstance(text, str):
        raise Failure("its answer holds no text")
    if not text or not text.strip():
        raise Wordless("its answers are empty")
    return text


def _message(body: bytes) -> str:
    """What an error's body says, in a line."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    error = found.get("error", found) if isinstance(found, dict) else found
    told = error.get("message") if isinstance(error, dict) else error
    return " ".join(told.split())[:200] if isinstance(told, str) else ""
