"""The teacher's journal and asker, against a server that fails on purpose and against a real one, both on this machine."""
import asyncio
import contextlib
import errno
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from catto import data, teacher
from catto.data import SPLITS, make_teacher, parse_answer, parse_reasoning, prepare_data, teacher_plan
from catto.settings import load
from catto.teacher import Ask, Asker, Endpoint, Journal, Ledger, TeacherError, journal_rows, read_response

KEY = "catto-test-key-4711-0815-and-more"
REPO = Path(__file__).resolve().parents[1]
PAID = ("ok", "cut", "empty", "length", "double", "html", "bytes")  # bodies that arrive whole with code 200: they were paid for
KINDS = (*PAID, "429", "500", "drop", "error200")


# ---------------------------------------------------------------- a server that fails on purpose


def completion(text, tokens=20, finish="stop", **message):
    return {"id": "c", "model": "m-1", "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}],
            "usage": {"prompt_tokens": 10, "completion_tokens": tokens}}


class Server:
    "Answers chat completions on loopback; `kind(prompt, n)` says how the n-th attempt of a prompt goes. `attempts` is what it saw and did."

    def __init__(self, kind=lambda prompt, n: "ok", text=lambda body: "<answer> A </answer>", delay=0.0, wait="0.05"):
        self.kind, self.text, self.delay, self.wait = kind, text, delay, wait
        self.attempts, self.seen, self.running, self.most = [], Counter(), 0, 0
        self.loop, started = asyncio.new_event_loop(), threading.Event()

        async def main():
            self.server = await asyncio.start_server(self.connection, "127.0.0.1", 0, limit=2**24)
            self.port = self.server.sockets[0].getsockname()[1]
            started.set()
            await asyncio.Event().wait()

        def target():
            with contextlib.suppress(asyncio.CancelledError):
                self.loop.run_until_complete(self.task)
            self.server.close()
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.run_until_complete(asyncio.sleep(0))

        self.task = self.loop.create_task(main())
        self.thread = threading.Thread(target=target, daemon=True)
        self.thread.start()
        started.wait()

    def close(self):
        self.loop.call_soon_threadsafe(self.task.cancel)
        self.thread.join(5)

    def finished(self):
        "Attempts whose paid response was sent to its last byte."
        return [a for a in self.attempts if a.finished and a.kind in PAID]

    async def connection(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:-2])
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                prompt = body["messages"][0]["content"]
                attempt = SimpleNamespace(number=len(self.attempts), prompt=prompt, kind=self.kind(prompt, self.seen[prompt]), body=body,
                                          headers=headers, time=time.monotonic(), replied=None, finished=False)
                self.seen[prompt] += 1
                self.attempts.append(attempt)
                self.running += 1
                self.most = max(self.most, self.running)
                try:
                    goes_on = await self.reply(attempt, reader, writer)
                finally:
                    self.running -= 1
                if not goes_on:
                    break
        writer.close()

    async def reply(self, attempt, reader, writer):
        kind, text, limit = attempt.kind, self.text(attempt.body), attempt.body["max_tokens"]
        await asyncio.sleep(self.delay)
        if kind == "timeout":
            await reader.read()  # until the client hangs up
            return False
        code, extra = int(kind) if kind.isdigit() else 200, {"x-request-id": str(attempt.number)}
        echo = {"error": {"message": f"no, {attempt.headers.get('authorization')}"}}
        if kind == "429":
            extra["retry-after"] = self.wait
        if kind == "307":
            extra["location"] = f"http://127.0.0.1:{self.port}/v1/elsewhere"
        say = {"ok": completion(text), "empty": completion("", reasoning_content="all thought"), "length": completion(text, limit, "length"),
               "double": completion(text, 2 * limit), "cut": completion(text), "drop": completion(text * 50)}.get(kind, echo)
        raw = json.dumps(say).encode()
        raw = {"cut": raw[: len(raw) // 2], "html": b"<html>bad gateway</html>", "bytes": b'{"choices": "\xff\xfe\x00"}'}.get(kind, raw)
        lines = [f"HTTP/1.1 {code} x", f"content-length: {len(raw)}", "content-type: application/json", *(f"{k}: {v}" for k, v in extra.items())]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        if kind == "dribble":  # alive for ever, and never an answer
            while not writer.is_closing():
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.02)
        writer.write(raw[: len(raw) // 2] if kind == "drop" else raw)
        await writer.drain()
        attempt.replied = time.monotonic()
        attempt.finished = kind != "drop" and writer.transport.get_write_buffer_size() == 0
        return kind != "drop"


@pytest.fixture
def serve():
    servers = []

    def start(*args, **words):
        servers.append(Server(*args, **words))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    for name in [n for n in os.environ if n.startswith("OPENAI_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CATTO_TEST_KEY", KEY)


def asker(server, folder, every=None, **words):
    fields = dict(key_variable="CATTO_TEST_KEY", max_tokens=100, in_flight=4, timeout=5.0, attempts=4, backoff=0.001, price_in=1.0, price_out=1.0, budget=1.0)
    return Asker(Endpoint(f"http://127.0.0.1:{server.port}/v1", "m", **fields | words), Path(folder) / "responses.jsonl", every=every)


def asks(n, start=0, **words):
    return [Ask(f"question {i}", **words) for i in range(start, start + n)]


def rows(folder):
    return list(journal_rows(Path(folder) / "responses.jsonl"))


def index(prompt):
    return int(re.search(r"\d+", prompt)[0])


def files_with_key(folder):
    return [str(path) for path in Path(folder).rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


# ---------------------------------------------------------------- faults, kill -9, resume


CHILD = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that started the tests in the background ignores it
import json, sys
from catto.teacher import Ask, Asker, Endpoint
port, folder, n, words = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
fields = dict(key_variable="CATTO_TEST_KEY", max_tokens=100, in_flight=16, timeout=3.0, attempts=6, backoff=0.001, price_in=1.0, price_out=1.0, budget=1.0)
asker = Asker(Endpoint(f"http://127.0.0.1:{port}/v1", "m", **fields | words), folder + "/responses.jsonl", every=0.2)
responses = asker.ask([Ask(f"question {i}") for i in range(n)])
json.dump([[r.status, r.text] for r in responses], open(folder + "/statuses.json", "w"))
"""


@contextlib.contextmanager
def child(server, folder, n, **words):
    "A process that asks, with its output in a file."
    with open(Path(folder) / "output.txt", "a") as output:
        process = subprocess.Popen([sys.executable, "-c", CHILD, str(server.port), str(folder), str(n), json.dumps(words)], stdout=output,
                                   stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": str(REPO)}, start_new_session=True)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def until(condition, process=None, seconds=40):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        assert process is None or process.poll() is None, "the process ended"
        time.sleep(0.002)


def first_fault(prompt, n):
    i = index(prompt)
    if i % 250 == 13:
        return "timeout" if n == 0 else "ok"
    if i % 50 == 49:
        return "500" if n < 3 else "ok"
    return KINDS[i % 25] if n == 0 and i % 25 < len(KINDS) else "ok"


STATUS = {"ok": "ok", "cut": "malformed", "html": "malformed", "bytes": "malformed", "empty": "empty", "length": "length", "double": "ok"}


def test_a_thousand_requests_under_faults_and_two_kills(serve, tmp_path):
    server, n, in_flight, lost = serve(first_fault, delay=0.01), 1000, 16, []
    for finished in (350, 700):
        with child(server, tmp_path, n, in_flight=in_flight) as process:
            until(lambda: len(server.finished()) >= finished, process)
            process.send_signal(signal.SIGKILL)
            process.wait()
        until(lambda: server.running == 0)  # what it was still sending has met a closed socket, or arrived nowhere
        returned = {row["got"] for row in rows(tmp_path) if "got" in row}
        lost.append({row["sent"] for row in rows(tmp_path) if "sent" in row and row["sent"] not in returned})
        assert 0 < len(lost[0]) <= in_flight and len(lost[-1]) <= in_flight * len(lost)
    with child(server, tmp_path, n, in_flight=in_flight) as process:
        assert process.wait(60) == 0, (tmp_path / "output.txt").read_text()

    journal = rows(tmp_path)
    sent, got = {r["sent"]: r for r in journal if "sent" in r}, {r["got"]: r for r in journal if "got" in r}
    assert len(sent) + len(got) == len(journal) and got.keys() <= sent.keys()
    without_return = [sent[i] for i in sent.keys() - got.keys()]
    assert {r["sent"] for r in without_return} == lost[-1]  # the kills alone leave attempts without a return

    # Every response that was sent to its end is in the journal, but for those in flight at a kill, which the journal names.
    journaled = {int(r["headers"]["x-request-id"]) for r in got.values() if "headers" in r}
    missing = [a for a in server.finished() if a.number not in journaled]
    assert not Counter(a.prompt for a in missing) - Counter(r["request"]["messages"][0]["content"] for r in without_return)
    assert len(missing) <= 2 * in_flight

    # No request is asked again once its response is in the journal: it is the server's last attempt of that prompt, and the only one of them.
    last = {a.prompt: a.number for a in server.attempts}
    answers = [r for r in got.values() if r.get("code") == 200 and teacher.outcome(200, r["body"]) == "answer"]
    assert len(answers) == n == len({r["key"] for r in answers})
    assert {int(r["headers"]["x-request-id"]) for r in answers} == set(last.values())

    # No attempt is unseen: the server saw what the journal says was sent, less what a kill may have stopped on its way.
    unseen = Counter(r["request"]["messages"][0]["content"] for r in sent.values()) - server.seen
    assert not server.seen - Counter(r["request"]["messages"][0]["content"] for r in sent.values())
    assert not unseen - Counter(r["request"]["messages"][0]["content"] for r in without_return)
    assert server.most <= in_flight

    # Each fault was met, and each response has the status of what was sent in the end.
    assert all(n >= 4 for kind, n in Counter(a.kind for a in server.attempts).items()) and {*KINDS, "timeout"} <= {a.kind for a in server.attempts}
    assert [s for s, _ in json.loads((tmp_path / "statuses.json").read_text())] == [STATUS[server.attempts[last[f"question {i}"]].kind] for i in range(n)]

    # The key is in no file, although error bodies repeat it; progress was told.
    assert {a.headers["authorization"] for a in server.attempts} == {f"bearer {KEY}"} and not files_with_key(tmp_path)
    assert any("[key]" in r.get("body", "") for r in got.values())
    assert re.search(r"teacher: \d+ of \d+, .*/s, \d+ attempts besides, cost at most [\d.]+ of 1, about \d+ min left", (tmp_path / "output.txt").read_text())


def test_interrupt_waits_for_what_is_in_flight(serve, tmp_path):
    server = serve(delay=1.2)
    with child(server, tmp_path, 100, in_flight=8, timeout=20) as process:
        until(lambda: len(server.finished()) >= 8 and server.running == 8, process)
        process.send_signal(signal.SIGINT)
        asked = len(server.attempts)
        assert process.wait(10) != 0
    assert len(server.attempts) == asked == 16  # nothing more was sent
    assert {r["got"] for r in rows(tmp_path) if "got" in r} == set(range(16))  # and all of it is kept
    text = (tmp_path / "output.txt").read_text()
    assert "stopping: 8 requests are in flight" in text and "KeyboardInterrupt" in text


def test_second_interrupt_gives_up(serve, tmp_path):
    server = serve(delay=30)
    with child(server, tmp_path, 20, in_flight=2, timeout=60) as process:
        until(lambda: server.running == 2, process)
        process.send_signal(signal.SIGINT)
        until(lambda: "stopping" in (tmp_path / "output.txt").read_text(), process)
        process.send_signal(signal.SIGINT)
        process.wait(5)
    assert len(server.attempts) == 2
    ledger = Ledger()
    for row in rows(tmp_path):
        ledger.add(row)
    assert len(ledger.open) == 2 and ledger.spent > 0  # they may be billed, so they count


# ---------------------------------------------------------------- the journal


def test_raw_body_is_on_the_disk_before_it_is_read(serve, tmp_path, monkeypatch):
    server, events = serve(), []
    real = os.fsync

    def fsync(file):
        real(file)
        events.extend(["flushed"] * stat.S_ISREG(os.fstat(file).st_mode))  # not the folder, whose new name is flushed once

    def read(body):
        whole = [row for row in rows_of_disk() if "got" in row]
        assert len(whole) == events.count("flushed") > events.count("read") and body in [row["body"] for row in whole]
        events.append("read")
        raise RuntimeError("the reader is broken")

    def rows_of_disk():
        return [json.loads(line) for line in open(tmp_path / "responses.jsonl")]

    monkeypatch.setattr(teacher.os, "fsync", fsync)
    with monkeypatch.context() as patched:
        patched.setattr(teacher, "read_response", read)
        with pytest.raises(RuntimeError, match="the reader is broken"):
            asker(server, tmp_path).ask(asks(20))
    paid = len(server.finished())
    assert 1 <= paid <= 4 == events.count("flushed")  # each worker brought its response home
    assert [r.status for r in asker(server, tmp_path).ask(asks(20))] == ["ok"] * 20
    assert server.seen.most_common(1)[0][1] == 1 and events.count("flushed") == 20


def test_torn_line_costs_itself_alone(tmp_path):
    path, first = tmp_path / "responses.jsonl", [{"sent": 0, "é": "line\nbreak"}, {"got": 0, "body": '{"x": "\\u2028"}'}]
    with Journal(path) as journal:
        for row in first:
            journal.append(row)
    whole, start = path.read_bytes(), path.read_bytes().index(b'{"got"')
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        with Journal(path) as journal:
            assert list(journal_rows(path))[:1] == first[:1]
            journal.append({"got": 7})
        kept = first if cut == len(whole) - 1 else first[:1]  # without its line feed alone, the row is whole
        damaged = Counter()
        assert list(journal_rows(path, damaged)) == [*kept, {"got": 7}]
        assert damaged["lines"] == (start < cut < len(whole) - 1)


def test_full_disk_stops_the_run_and_loses_only_what_it_could_not_write(serve, tmp_path, monkeypatch):
    server, write, full = serve(delay=0.005), os.write, []

    def limited(file, content):
        if len(full) == 1:  # the rest of that line does not fit, and then there is space again
            full.append(2)
            raise OSError(errno.ENOSPC, "No space left on device")
        if not full and len(server.finished()) >= 30 and b'"got"' in content:
            full.append(1)
            return write(file, content[:20])
        return write(file, content)

    with monkeypatch.context() as patched:
        patched.setattr(teacher.os, "write", limited)
        with pytest.raises(TeacherError, match="responses.jsonl cannot be written .*No space left"):
            asker(server, tmp_path).ask(asks(100))
    before, kept = len(server.attempts), sum("got" in row for row in rows(tmp_path))
    assert before - kept == 1  # what the others had in flight is kept, on lines of their own
    assert len(asker(server, tmp_path).ask(asks(100))) == 100
    assert len(server.attempts) - before == 100 - kept


def test_two_askers_share_one_journal_and_ask_once(serve, tmp_path, capsys):
    server, found = serve(delay=0.01), []
    threads = [threading.Thread(target=lambda: found.append(asker(server, tmp_path).ask(asks(40)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 3 and found[0] == found[1] == found[2]
    assert set(server.seen.values()) == {1} and len(server.attempts) == 40
    assert "waiting: another process" in capsys.readouterr().out


def test_raw_bytes_come_back_from_the_journal(serve, tmp_path):
    server = serve(lambda prompt, n: "bytes")
    asker(server, tmp_path).ask(asks(1))
    assert rows(tmp_path)[1]["body"].encode("utf-8", "surrogateescape") == b'{"choices": "\xff\xfe\x00"}'


def test_old_responses_are_found_under_every_change_of_settings(serve, tmp_path):
    server = serve(text=lambda body: f"<answer> {body['max_tokens']} {body['temperature']} </answer>")
    first = asker(server, tmp_path).ask(asks(20) + asks(20))  # twice the same: asked once
    assert len(server.attempts) == 20 and first[:20] == first[20:]
    changes = [(dict(), asks(20, sample=1), 20), (dict(), asks(20, temperature=0.5), 20), (dict(max_tokens=50), asks(20), 20), (dict(), asks(30), 10),
               (dict(extra='{"top_p": 0.9}'), asks(20), 20), (dict(in_flight=1, timeout=9.0, budget=5.0, price_in=2.0, key_variable=""), asks(30), 0)]
    for words, requests, new in changes:
        before = len(server.attempts)
        asker(server, tmp_path, **words).ask(requests)
        assert len(server.attempts) - before == new
    assert server.attempts[-1].body["top_p"] == 0.9
    other = serve()
    assert asker(other, tmp_path).ask(asks(20)) == first[:20] and not other.attempts  # the address may change


# ---------------------------------------------------------------- attempts


@pytest.mark.parametrize("kind, error", [("500", "HTTP 500"), ("drop", "RemoteProtocolError"), ("timeout", "Timeout"), ("dribble", "Timeout")])
def test_each_attempt_is_ours_and_is_counted(serve, tmp_path, kind, error):
    server = serve(lambda prompt, n: kind if index(prompt) == 3 else "ok")
    with pytest.raises(TeacherError, match=f"1 requests had no answer in 3 attempts each, the last: .*{error}; 5 of 6 requests were answered"):
        asker(server, tmp_path, attempts=3, timeout=0.3).ask(asks(6))
    assert server.seen["question 3"] == 3 and len(server.attempts) == 8 == sum("sent" in r for r in rows(tmp_path))
    ledger = Ledger()
    for row in rows(tmp_path):
        ledger.add(row)
    worst = len('[{"role": "user", "content": "question 3"}]') + 100
    assert ledger.spent * 1e6 == pytest.approx(5 * 30 + (0 if kind == "500" else 3 * worst))  # what has no return may have been billed


def test_a_connection_never_made_is_free(serve, tmp_path):
    server = serve()
    server.close()
    with pytest.raises(TeacherError, match="the last: ConnectError"):
        asker(server, tmp_path, attempts=2).ask(asks(3))
    assert sum("sent" in r for r in rows(tmp_path)) == 6 and asker(server, tmp_path).plan(asks(3)).spent == 0
    assert len(asker(serve(), tmp_path).ask(asks(3))) == 3


def test_retry_after_holds_all_workers(serve, tmp_path):
    server = serve(lambda prompt, n: "429" if prompt == "question 0" and n == 0 else "ok", delay=0.02, wait="0.9")
    asker(server, tmp_path).ask(asks(30))
    told = next(a.replied for a in server.attempts if a.kind == "429")
    later = [a.time - told for a in server.attempts if a.time > told + 0.4]
    assert sum(told < a.time <= told + 0.4 for a in server.attempts) <= 4  # what had been sent when the word arrived
    assert len(later) >= 22 and 0.88 < min(later) < 3


def test_too_long_a_wait_ends_the_run(serve, tmp_path):
    server = serve(lambda prompt, n: "429" if prompt == "question 5" else "ok", wait="3600")
    with pytest.raises(TeacherError, match="the server asks to wait 3600 s; .* of 50 requests were answered"):
        asker(server, tmp_path).ask(asks(50))
    assert len(server.attempts) < 20


def test_redirect_is_not_followed(serve, tmp_path):
    server = serve(lambda prompt, n: "307")
    with pytest.raises(TeacherError, match="HTTP 307"):
        asker(server, tmp_path, in_flight=1).ask(asks(5))
    assert len(server.attempts) == 1


def test_works_where_an_event_loop_runs(serve, tmp_path):
    server = serve()

    async def notebook():
        return asker(server, tmp_path).ask(asks(5))

    assert [r.status for r in asyncio.run(notebook())] == ["ok"] * 5


def test_refused_requests_are_counted_and_many_end_the_run(serve, tmp_path, capsys):
    server = serve(lambda prompt, n: "400" if index(prompt) in (1, 7) or index(prompt) >= 100 else "ok")
    found = asker(server, tmp_path).ask(asks(20))
    assert [i for i, r in enumerate(found) if r.status == "refused"] == [1, 7] and found[1].text == ""
    assert "2 requests were refused" in capsys.readouterr().out and server.seen["question 1"] == 1
    with pytest.raises(TeacherError, match=r"the first 10 requests were refused, the last with HTTP 400: .*no, bearer \[key\]") as error:
        asker(server, tmp_path).ask(asks(50, start=100))
    assert KEY not in str(error.value)
    assert len(server.attempts) <= 20 + 10 + 4
    assert not files_with_key(tmp_path)


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("budget", [0.0, 0.001, 0.003])
def test_budget_is_never_exceeded_and_is_used(serve, tmp_path, budget):
    server = serve(lambda prompt, n: "500" if index(prompt) % 3 == 0 and n == 0 else "ok", delay=0.003)
    with pytest.raises(TeacherError, match="the budget is spent: .*; raise teacher_budget; .* of 200 requests were answered"):
        asker(server, tmp_path, budget=budget, in_flight=8).ask(asks(200))
    spent = 30e-6 * len(server.finished())
    assert spent <= budget < spent + 150e-6  # 10 + 20 tokens each; one more may cost 45 bytes and 100 tokens
    asker(server, tmp_path, budget=1.0).ask(asks(200))
    assert {a.prompt for a in server.finished()} == {a.prompt for a in asks(200)} and len(server.finished()) == 200


def test_server_that_writes_too_much_is_learned(serve, tmp_path):
    server = serve(lambda prompt, n: "double")
    with pytest.raises(TeacherError, match="the budget is spent"):
        asker(server, tmp_path, budget=0.00226, in_flight=1).ask(asks(200))
    assert len(server.finished()) == 10  # 210 tokens each; after the first, the next one counts as 45 + 200 and not as 45 + 100
    found = asker(server, tmp_path, budget=1.0)
    found.ask(asks(60))
    assert found.facts()["responses"] == {"ok": 60, "over the limit": 60}


def test_limit_on_attempts_counts_every_run(serve, tmp_path):
    server = serve(lambda prompt, n: "500" if n == 0 else "ok")
    for limit in (15, 20):
        with pytest.raises(TeacherError, match=f"{limit} attempts were sent; raise teacher_max_requests"):
            asker(server, tmp_path, max_requests=limit).ask(asks(30))
        assert len(server.attempts) == limit


def test_free_server_needs_no_budget(serve, tmp_path):
    server = serve()
    assert len(asker(server, tmp_path, budget=0.0, price_in=0.0, price_out=0.0).ask(asks(5))) == 5


def test_plan_sends_nothing_and_needs_no_key(serve, tmp_path, monkeypatch):
    server = serve()
    asker(server, tmp_path).ask(asks(10))
    monkeypatch.delenv("CATTO_TEST_KEY")
    plan = asker(server, tmp_path).plan(asks(40) + asks(40))
    assert (plan.requests, plan.answered, plan.left, len(server.attempts)) == (40, 10, 30, 10)
    assert plan.expected * 1e6 == pytest.approx(30 * 30) and plan.largest * 1e6 == pytest.approx(30 * (44 + 100)) and plan.spent * 1e6 == pytest.approx(300)


# ---------------------------------------------------------------- the key


def test_missing_key_sends_nothing(serve, tmp_path, monkeypatch):
    server = serve()
    monkeypatch.delenv("CATTO_TEST_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)  # of another service
    with pytest.raises(TeacherError, match="set the environment variable CATTO_TEST_KEY"):
        asker(server, tmp_path).ask(asks(5))
    assert not server.attempts and not files_with_key(tmp_path)


@pytest.mark.parametrize("code, words", [("401", "the key was refused"), ("403", "the key may not"), ("402", "no credit"), ("404", "no such model or address")])
def test_refused_key_ends_the_run_at_once_without_its_value(serve, tmp_path, capsys, code, words):
    server = serve(lambda prompt, n: code)
    with pytest.raises(TeacherError, match=words) as error:
        asker(server, tmp_path).ask(asks(50))
    assert "CATTO_TEST_KEY" in str(error.value) and KEY not in str(error.value) + capsys.readouterr().out
    assert len(server.attempts) <= 4
    text = (tmp_path / "responses.jsonl").read_text()
    assert KEY not in text and "[key]" in text  # the server had repeated it


def test_a_key_in_place_of_its_variables_name_is_not_repeated():
    for value in (KEY, "sk-0123456789", "hf_abcdef"):
        with pytest.raises(ValueError, match="never the key itself") as error:
            Endpoint("http://host/v1", "m", key_variable=value)
        assert value not in str(error.value)


def test_nothing_else_of_the_environment_is_sent(serve, tmp_path, monkeypatch):
    server = serve()
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "of-another-service")
    asker(server, tmp_path).ask(asks(1))
    assert "of-another-service" not in json.dumps([server.attempts[0].headers, server.attempts[0].body])
    asker(server, tmp_path, key_variable="").ask(asks(2))
    assert server.attempts[1].headers["authorization"] == "bearer none"


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("message, source", [
    (dict(content="<answer> B </answer>", reasoning_content="it <think>swims"), "reasoning_content"),
    (dict(content="\n\n<answer> B </answer>", reasoning="it swims", reasoning_details=[{"text": "it swims"}]), "reasoning"),
    (dict(content="<think>\nit swims\n</think>\n\n<answer> B </answer>"), "inline"),
    (dict(content="it swims</think><answer> B </answer>"), "inline"),
    (dict(content="<think> it swims </think> <answer> B </answer>", reasoning_content="The user wants"), "inline"),
    (dict(content="<think></think> <answer> B </answer>", reasoning_content="it swims"), "reasoning_content"),
], ids=["DeepSeek", "OpenRouter", "inline", "no opening tag", "both", "empty block"])
def test_every_form_of_reasoning_becomes_one_block(message, source):
    response = read_response(json.dumps(completion(**{"text": message["content"]}, **{k: v for k, v in message.items() if k != "content"})))
    assert (response.status, response.source, response.model, response.tokens_out) == ("ok", source, "m-1", 20)
    assert response.text.count("<think>") == response.text.count("</think>") == 1
    assert (" ".join(parse_reasoning(response.text).split()), parse_answer(response.text, list("ABC"))) == ("it swims", "B")
    assert response.reasoning == parse_reasoning(response.text)


# ---------------------------------------------------------------- temperature


def test_a_server_that_ignores_the_temperature_is_named(serve, tmp_path, capsys):
    requests = [Ask(f"question {i}", s, 0.5 + s / 4) for i in range(60) for s in range(4)]
    server = serve()
    found = asker(server, tmp_path, in_flight=16)
    found.ask(requests)
    assert "warning: the server seems to ignore the temperature: all samples are the same text in 100% of 60 questions" in capsys.readouterr().out
    assert "same text" in found.facts()["temperature_warning"]
    assert {a.body["temperature"] for a in server.attempts} == {0.5, 0.75, 1.0, 1.25}


def test_documented_server_is_named_before_anything_is_sent(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(teacher, "_in_thread", lambda line, work: work.close())  # nothing leaves this machine
    for extra, warned in (("{}", True), ('{"thinking": {"type": "disabled"}}', False)):
        with pytest.raises(TeacherError):
            Asker(Endpoint("https://api.deepseek.com", "m", extra=extra), tmp_path / "r.jsonl").ask([Ask("a"), Ask("a", 1, 0.5)])
        assert ("thinking mode ignores the temperature" in capsys.readouterr().out) == warned


# ---------------------------------------------------------------- the pipeline


def letter(body):
    "Some letter, with its reasoning; it depends on prompt and temperature alone."
    n = sum(map(ord, body["messages"][0]["content"])) + int(body["temperature"] * 1e6)
    return f"<think> number {n} </think>\n<answer> {'ABCDE'[n % 5]} </answer>"


@pytest.fixture
def ini(tmp_path):
    "The settings file, with the smoke profile small and its teacher at a server."
    def write(server):
        small = dict(teacher="endpoint", teacher_base_url=f"http://127.0.0.1:{server.port}/v1", teacher_model="m", teacher_key_variable="CATTO_TEST_KEY",
                     teacher_price_in=1, teacher_price_out=1, teacher_budget=1, train_questions=60, preference_questions=25, preference_samples=8,
                     validation_questions=10, test_questions=10)
        text = (REPO / "settings.ini").read_text()
        head, smoke = text.split("[smoke]\n")
        smoke = "\n".join(line for line in smoke.split("\n[mini]")[0].split("\n") if line.split(" = ")[0] not in small)
        path = tmp_path / "settings.ini"
        path.write_text(head + "[smoke]\n" + smoke + "\n" + "".join(f"{k} = {v}\n" for k, v in small.items()))
        return path
    return write


def test_the_notebook_run_keeps_responses_and_no_key(serve, ini, tmp_path):
    server = serve(lambda prompt, n: {5: "length", 9: "429"}.get(sum(map(ord, prompt)) % 13, "ok") if n == 0 else "ok", text=letter)
    path, executed = ini(server), tmp_path / "02.ipynb"
    settings, unit = load("smoke", file=path), tmp_path / "data" / "runs" / "smoke" / "commonsense_qa" / "seed0" / "data"
    left = teacher_plan(settings, tmp_path)["left"]  # the task trained on for the out-of-distribution tables is asked too
    assert left.to_dict() == {"commonsense_qa": 60 + 25 * 8, "mmlu": 60 + 25 * 8, "all": 2 * (60 + 25 * 8)}
    environment = os.environ | {"PYTHONPATH": str(REPO), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "papermill", "--cwd", REPO / "nbs", REPO / "nbs" / "02_data_gen.ipynb", executed, "-p", "profile", "smoke",
               "-r", "tasks", "commonsense_qa", "-r", "root", tmp_path, "-r", "settings_file", path]
    ran = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    manifest = json.loads((unit / "manifest.json").read_text())
    statuses = manifest["teacher"]["responses"]
    assert statuses["ok"] + statuses["length"] == 260 == manifest["rows"]["responses"] and statuses["length"] > 5
    assert manifest["teacher"]["attempts"] == len(server.attempts) == 260 + sum(a.kind == "429" for a in server.attempts) > 265
    assert manifest["sft"]["unparsed"] + manifest["preferences"]["unparsed_responses"] == statuses["length"]
    assert executed.exists() and not files_with_key(tmp_path) and KEY not in ran.stdout + ran.stderr

    # The runs may be deleted; the responses were bought once. The same tables come back without a server or a key.
    tables = {p.name: p.read_bytes() for p in unit.glob("*.parquet")}
    shutil.rmtree(tmp_path / "data" / "runs")
    server.close()
    os.environ.pop("CATTO_TEST_KEY")
    assert prepare_data(settings, "commonsense_qa", 0, tmp_path)["sft"] == manifest["sft"]
    assert {p.name: p.read_bytes() for p in unit.glob("*.parquet")} == tables and len(tables) == len(SPLITS) + 3
    assert teacher_plan(settings, tmp_path).loc["commonsense_qa", "left"] == 0


def test_a_notebook_that_fails_for_its_key_does_not_show_it(serve, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    server = serve(lambda prompt, n: "401")
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    source = (f"from catto.teacher import Ask, Asker, Endpoint\nendpoint = Endpoint('http://127.0.0.1:{server.port}/v1', 'm', 'CATTO_TEST_KEY')\n"
              f"Asker(endpoint, {str(tmp_path / 'responses.jsonl')!r}).ask([Ask('why?')])")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, allow_errors=True, kernel_name="python3").execute()
    nbformat.write(notebook, tmp_path / "failed.ipynb")
    assert "the key was refused" in (tmp_path / "failed.ipynb").read_text() and not files_with_key(tmp_path)


def test_endpoint_teacher_has_the_interface_of_the_others(serve, ini, tmp_path):
    server = serve(text=letter)
    settings = load("smoke", file=ini(server))
    ours, theirs = make_teacher(settings, 0, tmp_path), data.SamplingTeacher()
    question = data.load_questions("commonsense_qa", n=1)[0]
    for one in (ours, theirs):
        text = one.respond(question, 1, temperature=0.7)
        assert isinstance(text, str) and one.respond(question, 1, 0.7) == text
        assert one.respond_many([(question, 1, 0.7), (question, 2, 0.7)])[0] == text
    assert isinstance(ours, data.Teacher) and len(server.attempts) == 2 and theirs.facts() == {}
    assert server.attempts[0].prompt == data.format_prompt(question)


# ---------------------------------------------------------------- a real server


def missing_for_serve():
    return [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="module")
def real_server(tmp_path_factory):
    "`transformers serve` on loopback, and two tiny models of the project: one decodes greedily, one samples."
    if missing_for_serve():
        pytest.skip(f"{', '.join(missing_for_serve())} not installed: pip install 'transformers[serving]'")
    from catto.train import build_model, build_tokenizer

    folder = tmp_path_factory.mktemp("models")
    settings = load("smoke", vocab_size=300, hidden_size=32, hidden_layers=1, attention_heads=2, key_value_heads=1, mlp_size=32)
    tokenizer = build_tokenizer(["a fish swims in the sea"], settings.vocab_size)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # the prompt as it stands
    model = build_model(settings, tokenizer, seed=0)
    for name in ("greedy", "samples"):
        model.generation_config.do_sample = name == "samples"
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(list(map(str, command)), cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        def up():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
                return True
            time.sleep(0.1)
        until(up, process, seconds=60)
        yield SimpleNamespace(port=port, folder=folder)
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
        pass  # it has ended with the test


@pytest.mark.parametrize("name", ["greedy", "samples"])
def test_a_real_server_answers_and_shows_whether_it_uses_the_temperature(real_server, tmp_path, capsys, name):
    requests = [Ask(f"a fish {i}", s, t) for i in range(50) for s, t in enumerate((0.01, 0.02, 1.4, 1.5))]
    endpoint = Endpoint(f"http://127.0.0.1:{real_server.port}/v1", str(real_server.folder / name), max_tokens=6, in_flight=4, timeout=60)
    one = Asker(endpoint, tmp_path / "responses.jsonl", every=None)
    responses = one.ask(requests)
    assert all(r.status in ("length", "ok", "empty") and r.tokens_in > 0 and 0 < r.tokens_out <= 6 for r in responses)
    assert sum(r.status == "length" for r in responses) > 150 and all(str(real_server.folder / name) in r.model for r in responses)
    warning = "the same text" in capsys.readouterr().out
    assert warning == (name == "greedy")  # this server ignores the temperature unless the model's own configuration samples
    assert (one.facts()["temperature_warning"] == "") == (name == "samples")
    assert one.ask(requests) == responses and one.facts()["attempts"] == 200


def test_a_real_servers_error_is_ours(real_server, tmp_path):
    endpoint = Endpoint(f"http://127.0.0.1:{real_server.port}/v1", str(real_server.folder / "nowhere"), attempts=2, backoff=0.01, in_flight=1)
    with pytest.raises(TeacherError, match="run again for the rest"):
        Asker(endpoint, tmp_path / "responses.jsonl", every=None).ask([Ask("a fish")])
