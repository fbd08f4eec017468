"""A served model instead of a local one: any OpenAI-compatible server, asked over HTTP.

One request is one response. So the server counts the tokens of each; of n > 1 it would give their
sum, where it does not ignore or refuse it.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from machinery.processes import InputError, say, seed_of
from machinery.scores import Grader, Problem, graded

ATTEMPTS, LONGEST_WAIT = 8, 60.0  # of a request, and seconds between two: about two minutes in all
TIMEOUT = 3600.0  # seconds: nothing comes before a long thought is at its end


class Server:
    """A model that a server knows by a name. OPENAI_API_KEY is sent, if it is set."""

    def __init__(self, url: str, model: str, concurrency: int, first_wait: float = 1.0):
        """url: up to and with /v1. Raises InputError if nothing answers there."""
        self.url, self.model, self.concurrency = url.rstrip("/"), model, concurrency
        self.first_wait, self.told = first_wait, set[str]()
        if not self.url.startswith(("http://", "https://")):
            raise InputError(f"--url {url}: expected http://HOST:PORT/v1")
        self.root: Any = None  # of the model, where the server tells (vLLM's: its directory)
        try:
            self.root = root_of(self.request("/models", None, timeout=60), model)
        except urllib.error.HTTPError as error:  # not all servers list what they have
            if error.code in (401, 403):
                said = f"{describe(error)}; the key is read from OPENAI_API_KEY"
                raise self.complaint(said) from None
        except (OSError, http.client.HTTPException) as error:
            raise self.complaint(f"nothing answers ({describe(error)})") from error
        except (ValueError, RecursionError):  # no JSON, or no text at all
            raise self.complaint("not an OpenAI-compatible server; is /v1 missing?") from None

    def respond(
        self,
        problems: list[Problem],
        blocks: list[list[int]],
        grader: Grader,
        *,
        samples: int,
        seeds: Sequence[int],
        lenient: bool,
        **options: Any,
    ) -> Iterator[list[dict]]:
        """The rows of scores.respond to one problem after the other, as they are complete.

        If a request fails, those under way are waited for and the problems that they complete are
        yielded; then this raises what failed.
        """
        answers: dict[int, list[dict]] = defaultdict(list)
        failures, threads = [], ThreadPoolExecutor(self.concurrency)

        def answer(i: int, j: int) -> tuple[int, dict | None]:
            if failures:
                return i, None
            try:  # some servers have seeds of 32 bits
                seed_of_it = seed_of(seeds[i], j) % 2**31
                found = self.ask(problems[i].prompt, seed=seed_of_it, **options)
            except Exception as error:
                failures.append(error)  # at once, so that nothing more is asked
                return i, None
            p = problems[i]
            return i, {"problem": i, "sample": j, "source": p.source, "answer": p.answer} | found

        try:
            numbers = [i for block in blocks for i in block]
            jobs = [threads.submit(answer, i, j) for i in numbers for j in range(samples)]
            for i, row in (job.result() for job in as_completed(jobs)):
                answers[i] += [row] if row else []
                if row and len(answers[i]) == samples:
                    rows = sorted(answers.pop(i), key=lambda row: row["sample"])
                    yield graded(rows, problems, grader, lenient)
        finally:  # an interrupted program does not wait for an hour
            threads.shutdown(wait=False, cancel_futures=True)
        if failures:
            raise failures[0]

    def ask(
        self, messages: list[dict[str, str]], *, temperature: float, max_tokens: int, seed: int
    ) -> dict:
        """One response: its text, its tokens by the server's count, and whether it was cut off."""
        options = dict(temperature=temperature, max_tokens=max_tokens, seed=seed)
        found = self.call({"model": self.model, "messages": messages} | options)
        try:
            choice = found["choices"][0]
            text, tokens = text_of(choice["message"]), int(found["usage"]["completion_tokens"])
            text = text.encode(errors="replace").decode()  # half a surrogate pair: no file takes it
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
            raise self.complaint(
                "expected an answer with a choice, its message and usage.completion_tokens, "
                f"found {json.dumps(found):.300}"
            ) from None
        complete = choice.get("finish_reason") in ("stop", "eos_token")
        return {"tokens": tokens, "response": text, "truncated": not complete}

    def call(self, body: dict) -> Any:
        """Ask, and again if that may help: the server is busy, or the connection broke."""
        wait = self.first_wait
        for attempt in range(ATTEMPTS):
            try:
                return self.request("/chat/completions", body, TIMEOUT)
            except urllib.error.HTTPError as error:
                said, asked = describe(error), error.headers.get("Retry-After", "")
                if error.code not in (408, 429) and error.code < 500:
                    no_v1 = error.code == 404 and not self.url.endswith("/v1")
                    raise self.complaint(said + "; is /v1 missing?" * no_v1) from None
            except (OSError, http.client.HTTPException) as error:
                said, asked = describe(error), ""
            except (ValueError, RecursionError) as error:
                raise self.complaint(f"its answer is not JSON ({error})") from None
            if said not in self.told:
                self.told.add(said)
                say(f"--url {self.url}: {said}; asking again")
            if attempt < ATTEMPTS - 1:
                time.sleep(min(max(wait, float(asked) if asked.isdigit() else 0.0), LONGEST_WAIT))
                wait *= 2
        raise self.complaint(
            f"{said}, {ATTEMPTS} times in a row. Complete problems are on disk: the same command "
            "goes on with the others"
        )

    def request(self, path: str, body: dict | None, timeout: float) -> Any:
        headers = {"Content-Type": "application/json", "User-Agent": "luffy"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)

    def complaint(self, words: str) -> InputError:
        return InputError(f"--url {self.url}: {words}")


def root_of(listed: Any, model: str) -> Any:
    models = listed.get("data") if isinstance(listed, dict) else None
    models = [m for m in models if isinstance(m, dict)] if isinstance(models, list) else []
    return next((m.get("root") for m in models if m.get("id") == model), None)


def describe(error: Exception) -> str:
    """With what the server says of it."""
    if isinstance(error, urllib.error.HTTPError):
        try:
            body = " ".join(error.read().decode(errors="replace").split())
        except (OSError, http.client.HTTPException) as broken:  # the connection, amid its words
            body = describe(broken)
        return f"HTTP {error.code} {error.reason} {body:.500}".rstrip()
    return str(error) or type(error).__name__


def text_of(message: dict) -> str:
    r"""The whole response; servers with a parser for thoughts give those apart.

    >>> text_of({"reasoning_content": "\n1+1=2\n", "content": "\n\n\\boxed{2}"})
    '<think>\n1+1=2\n</think>\n\n\\boxed{2}'
    >>> text_of({"content": "1+1=2\n</think>\n\n\\boxed{2}"})  # the server's prompt opened it
    '<think>\n1+1=2\n</think>\n\n\\boxed{2}'
    """
    content = message.get("content") or ""
    thought = message.get("reasoning_content") or message.get("reasoning") or ""
    if thought:
        end = "\n</think>\n\n" + content.lstrip("\n") if content else ""
        return "<think>\n" + thought.strip("\n") + end
    unopened = "</think>" in content and "<think>" not in content
    return "<think>\n" + content if unopened else content
