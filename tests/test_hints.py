"""`selftaught hints` against a stand-in server that is slow, overloaded, broken, and talks out of turn."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from own import Said, cli, lines
from selftaught.chat import Chat, Failed
from selftaught.errors import UserError
from selftaught.hints import Counts, leak, write_hints
from selftaught.records import Problem

KEY = "sk-very-secret"
Answer = Callable[[str, int], tuple[int, Any, Mapping[str, str]]]


def wrote(text: str, finish: str = "stop") -> tuple[int, Any, Mapping[str, str]]:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}, {}


def is_check(content: str) -> bool:
    return content.startswith("Below are a problem")


def good(content: str, attempt: int) -> tuple[int, Any, Mapping[str, str]]:
    return wrote("It is fine.\nKEEP" if is_check(content) else "1. Split the sum.\n2. Put the parts together.")


class Stand:
    """A server whose answers a test writes: `answer(content, attempt)`; it keeps what was asked."""

    def __init__(self) -> None:
        self.answer: Answer = good
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.paths: set[str] = set()
        self.at_once = self.most_at_once = 0
        self.attempts: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def handler(self) -> type[BaseHTTPRequestHandler]:
        stand = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                content = body["messages"][0]["content"]
                with stand.lock:
                    stand.asked.append(body)
                    stand.keys.add(self.headers.get("Authorization"))
                    stand.paths.add(self.path)
                    stand.attempts[content] += 1
                    attempt = stand.attempts[content]
                    stand.at_once += 1
                    stand.most_at_once = max(stand.most_at_once, stand.at_once)
                try:
                    code, answer, headers = stand.answer(content, attempt)
                finally:
                    with stand.lock:
                        stand.at_once -= 1
                raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *args: Any) -> None:
                """Silence."""

        return Handler

    def written_for(self, number: int) -> int:
        """How often a hint was asked for problem `number`."""
        return sum(n for text, n in self.attempts.items() if f"problem {number}:" in text and not is_check(text))


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made = Stand()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = [{"problem": f"problem {i}: what is {i} + 40?", "solution": f"{i} + 40 = {i + 40}.", "answer": str(i + 40),
             "tags": ["sum", i], "é": None} for i in range(6)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(stand: Stand, source: Path, **more: Any) -> Counts:
    chat = Chat(stand.url, timeout=more.pop("timeout", 20.0), retries=more.pop("retries", 3), pause=0.01)
    return write_hints(str(source), source.with_name("hints.jsonl"), chat, "writer", say=lambda text: None, **more)


def command(stand: Stand, source: Path, *more: str) -> Said:
    return cli("hints", source, "--out", source.with_name("hints.jsonl"), "--endpoint", stand.url, "--model", "writer",
               *more)


def hinted(source: Path) -> dict[int, dict[str, Any]]:
    return {row["tags"][1]: row for row in lines(source.with_name("hints.jsonl"))}


def test_every_problem_gets_its_columns_and_a_hint_from_what_its_rationale_says(stand: Stand, source: Path) -> None:
    counts = run(stand, source)
    assert (counts.written, counts.before, counts.dropped.total(), counts.failed) == (6, 0, 0, [])
    for row in lines(source):
        found = hinted(source)[row["tags"][1]]
        assert found == {**row, "hint": "1. Split the sum.\n2. Put the parts together."}
    asked = [body["messages"][0]["content"] for body in stand.asked if not is_check(body["messages"][0]["content"])]
    assert len(asked) == 6 and all("Reference solution:\n" in text for text in asked)
    assert any("3 + 40 = 43." in text for text in asked)
    assert stand.paths == {"/v1/chat/completions"} and stand.keys == {f"Bearer {KEY}"}
    assert {body["model"] for body in stand.asked} == {"writer"}


def test_the_second_pass_drops_weak_hints_and_may_be_another_model_or_none(stand: Stand, source: Path) -> None:
    def answer(content: str, attempt: int) -> tuple[int, Any, Mapping[str, str]]:
        if is_check(content):
            return wrote("It is about another problem; I would not KEEP it.\nDROP" if "problem 2:" in content else
                         "<think>DROP?</think>Nothing.\n**KEEP**." if "problem 3:" in content else
                         "No opinion" if "problem 4:" in content else "KEEP")  # fmt: skip
        return good(content, attempt)

    stand.answer = answer
    counts = run(stand, source, judge="judge")
    assert counts.dropped == {"found weak": 2} and set(hinted(source)) == {0, 1, 3, 5}
    assert {b["model"] for b in stand.asked if is_check(b["messages"][0]["content"])} == {"judge"}
    source.with_name("hints.jsonl").unlink()
    source.with_name("hints.jsonl.dropped").unlink()
    stand.asked.clear()
    assert run(stand, source, check=False).written == 6 and len(stand.asked) == 6


def test_a_hint_that_leaks_the_answer_or_is_cut_off_is_dropped_and_not_asked_again(stand: Stand, source: Path) -> None:
    def answer(content: str, attempt: int) -> tuple[int, Any, Mapping[str, str]]:
        if "problem 1:" in content and not is_check(content):
            return wrote("Add them, which gives 41.")
        if "problem 5:" in content and not is_check(content):
            return wrote("1. Split the", "length")
        return good(content, attempt)

    stand.answer = answer
    counts = run(stand, source)
    assert counts.dropped == {"leaks the answer": 1, "cut off": 1} and set(hinted(source)) == {0, 2, 3, 4}
    kept = lines(source.with_name("hints.jsonl.dropped"))
    assert {(row["where"], row["reason"]) for row in kept} == {("line 2", "leaks the answer"), ("line 6", "cut off")}
    before = len(stand.asked)
    again = run(stand, source)
    assert (again.written, again.before) == (0, 6) and len(stand.asked) == before


@pytest.mark.parametrize(
    ("hint", "answer", "leaks"),
    [
        ("Then 41 comes out.", "41", True),
        ("Then 41.5 or 141 or x41 comes out.", "41", False),
        ("Use the 40 that is given.", "40", False),  # the problem says it
        ("1. Split.\n2. Add.\nStep 3: done", "2", False),  # numbers of a list
        ("So $x = 2$.", "2", True),
        (r"The result is \boxed{?}", "7", True),
        ("Look at a, then at (B).", "B", False),
        ("So the answer is (B).", "B", True),
        (r"It ends in $\frac{1}{2}$, so", r"\frac{1}{2}", True),
        ("The capital is PARIS.", "Paris", True),
        ("Anything", None, False),
    ],
)
def test_the_leak_test_finds_the_answer_where_it_stands_alone(hint: str, answer: str | None, leaks: bool) -> None:
    problem = Problem("id", "What is 1 + 40?", answer)
    assert (leak(hint, problem) is not None) is leaks


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {"error": {"message": "slow down"}}, {"Retry-After": "0"}),
        (500, b"<html>oops</html>", {}),
        (200, b"{not json", {}),
        (200, {"choices": []}, {}),
        wrote("  "),
    ],
    ids=["429", "500", "garbage", "no choice", "empty"],
)
def test_trouble_that_passes_is_tried_again(trouble: Any, stand: Stand, source: Path) -> None:
    stand.answer = lambda content, attempt: trouble if attempt <= 2 else good(content, attempt)
    counts = run(stand, source)
    assert counts.written == 6 and not counts.failed
    assert set(stand.attempts.values()) == {3}


def test_an_answer_that_takes_too_long_is_asked_again(stand: Stand, source: Path) -> None:
    def answer(content: str, attempt: int) -> tuple[int, Any, Mapping[str, str]]:
        if "problem 0:" in content and attempt == 1:
            time.sleep(1.0)
        return good(content, attempt)

    stand.answer = answer
    assert run(stand, source, timeout=0.4).written == 6 and stand.written_for(0) == 2


def test_retry_after_is_heeded(stand: Stand) -> None:
    busy = (429, {}, {"Retry-After": "0.5"})
    stand.answer = lambda content, attempt: busy if attempt == 1 else good(content, attempt)
    began = time.monotonic()
    assert Chat(stand.url, pause=0.001).ask("m", [{"role": "user", "content": "x"}]).whole
    assert time.monotonic() - began >= 0.5


def test_a_problem_that_keeps_failing_is_named_left_out_and_tried_by_the_next_call(stand: Stand, source: Path) -> None:
    def answer(content: str, attempt: int) -> tuple[int, Any, Mapping[str, str]]:
        if "problem 4:" in content:
            return 500, {"error": {"message": f"no luck with {KEY}"}}, {}
        if "problem 2:" in content:
            return 400, {"error": {"message": "too long"}}, {}
        return good(content, attempt)

    stand.answer = answer
    said = command(stand, source, "--retries", "1")
    assert said.code == 0 and set(hinted(source)) == {0, 1, 3, 5}
    assert "4 written, 0 were done before, 0 dropped, 2 failed" in said.out
    assert "failed: line 3: 400 Bad Request: too long" in said.out
    assert "failed: line 5: 500" in said.out and "after 2 attempts" in said.out and KEY not in said.out + said.err
    assert (stand.written_for(4), stand.written_for(2)) == (2, 1)  # a refused request is not sent again
    stand.answer = good
    assert run(stand, source).written == 2 and set(hinted(source)) == set(range(6))


@pytest.mark.parametrize("rest", ['{"problem": "problem 5', "{", '{"a": "\xe9'], ids=["half", "brace", "half a letter"])
def test_after_a_kill_done_ones_are_skipped_and_a_half_line_is_mended(rest: str, stand: Stand, source: Path) -> None:
    run(stand, source, limit=3)
    out = source.with_name("hints.jsonl")
    whole = out.read_bytes()
    out.write_bytes(whole + rest.encode("latin-1"))
    stand.asked.clear()
    counts = run(stand, source)
    assert (counts.before, counts.written) == (3, 3) and len(stand.asked) == 6
    assert out.read_bytes().startswith(whole) and set(hinted(source)) == set(range(6))
    out.write_bytes(out.read_bytes().rstrip(b"\n"))  # the last row whole, its line end lost
    assert run(stand, source).before == 6
    assert set(hinted(source)) == set(range(6)) and out.read_bytes().endswith(b"}\n")


def test_no_more_requests_at_once_than_allowed(stand: Stand, source: Path) -> None:
    def answer(content: str, attempt: int) -> tuple[int, Any, Mapping[str, str]]:
        time.sleep(0.03)
        return good(content, attempt)

    stand.answer = answer
    run(stand, source, concurrency=2)
    assert stand.most_at_once == 2


def test_a_row_that_stands_twice_is_asked_for_once(stand: Stand, source: Path) -> None:
    source.write_text(source.read_text() * 2)
    assert run(stand, source).written == 6 and stand.written_for(0) == 1


# Mistakes: one message, exit code 2.


def refused(said: Said, *parts: str) -> None:
    assert said.code == 2 and said.err.startswith("error: ") and "Traceback" not in said.err
    assert said.err.count("\n") == 1 and all(part in said.err for part in parts), said.err


def test_a_file_that_is_not_ours_is_refused_and_left_as_it_is(stand: Stand, source: Path) -> None:
    notes = source.with_name("hints.jsonl")
    notes.write_text("my notes\nand their last line, not ended")
    with pytest.raises(UserError, match=r"--out: line 1 of .*hints.jsonl is no JSON object"):
        run(stand, source)
    assert notes.read_text() == "my notes\nand their last line, not ended"


def test_an_endpoint_that_is_not_there_is_refused_at_once(stand: Stand, source: Path) -> None:
    stand.server.shutdown()
    stand.server.server_close()
    refused(command(stand, source), "--endpoint", "cannot be reached")
    bad = ("--endpoint", "ftp://nowhere")
    refused(cli("hints", source, "--out", "x", "--model", "m", *bad), "--endpoint 'ftp://nowhere'", "https://host/v1")


@pytest.mark.parametrize("code", [401, 403])
def test_a_wrong_key_is_refused_without_showing_it(code: int, stand: Stand, source: Path) -> None:
    stand.answer = lambda content, attempt: (code, {"error": {"message": f"Incorrect API key: {KEY}"}}, {})
    said = command(stand, source)
    refused(said, "refuses the key", "OPENAI_API_KEY", "***")
    assert KEY not in said.err + said.out and set(stand.attempts.values()) == {1}


def test_without_a_key_none_is_sent_and_a_server_that_wants_one_says_so(
    stand: Stand, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert run(stand, source, limit=1).written == 1 and stand.keys == {None}
    stand.answer = lambda content, attempt: (401, {}, {})
    refused(command(stand, source, "--key", "MY_KEY"), "MY_KEY is not set")


def test_a_redirect_is_not_followed_with_the_key(stand: Stand, source: Path) -> None:
    other = Stand()
    stand.answer = lambda content, attempt: (307, {}, {"Location": f"{other.url}/chat/completions"})
    refused(command(stand, source), "307", "check both")
    assert other.asked == []
    other.server.shutdown()
    other.server.server_close()


def test_an_unknown_model_is_refused(stand: Stand, source: Path) -> None:
    stand.answer = lambda content, attempt: (404, {"error": {"message": "model `writer` does not exist"}}, {})
    refused(command(stand, source), "--model", "model `writer` does not exist")


def test_where_nothing_works_out_the_command_gives_up_early(stand: Stand, source: Path) -> None:
    rows = [{"problem": f"problem {i}: ?", "solution": "x"} for i in range(60)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stand.answer = lambda content, attempt: (400, {"error": {"message": "unknown parameter"}}, {})
    refused(command(stand, source), "none worked out", "unknown parameter")
    assert len(stand.asked) < 30


def test_missing_columns_and_files_are_refused_before_anything_is_asked(stand: Stand, source: Path) -> None:
    refused(command(stand, source, "--solution", "solutoin"), "solutoin", "did you mean 'solution'?")
    refused(command(stand, source, "--column", "tags"), "--column 'tags'", "has such a column already")
    refused(cli("hints", "none.jsonl", "--out", "x", "--endpoint", stand.url, "--model", "m"), "none.jsonl")
    source.with_name("hints.jsonl").write_text("not ours\n{}\n")
    refused(command(stand, source), "--out", "line 1")
    source.with_name("hints.jsonl").unlink()
    source.write_text('{"problem": "1 + 1?", "note": "x"}\n')
    refused(command(stand, source), "--solution", "columns: note, problem")
    assert stand.asked == []


def test_a_request_that_is_refused_for_itself_is_no_users_mistake(stand: Stand) -> None:
    stand.answer = lambda content, attempt: (422, {"detail": "no"}, {})
    with pytest.raises(Failed, match="422"):
        Chat(stand.url).ask("m", [{"role": "user", "content": "x"}])
    with pytest.raises(UserError, match="leave user and password out"):
        Chat("http://me:secret@host/v1")
