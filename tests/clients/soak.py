"""Many clients of every kind at once against one server, round after round.

Streams, conversations, echoes, slow readers, clients that leave in the middle, garbage, huge bodies, wrong keys and
prompts that are too long, on all routes that answer. After each round nothing may run, no block may be in use, and the
process may not have grown. How long refusals take is measured by the server, by the clients, by one more client in a
process of its own, and at the end while the queue is kept full, the engine is busy and nobody else asks.
Prints a line a round and one line of JSON; the status is 1 when a promise was broken.

    python tests/clients/soak.py MODEL --rounds 10 --seconds 30 --clients 200
"""

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

KEY = "soak-key"
DECLARED = {200, 400, 401, 404, 413, 415, 429, 503}
"""Statuses that a client may see; 503 only with a code that says why."""

MAX_BODY = 1 << 20
MAX_QUEUED = 48
PROBE_PATIENCE = 2.0
"""Seconds after which the probe takes it that it was let in."""

MAX_REFUSAL_MS = 100
"""Most that 99 of 100 refusals may take among all the clients: at the server, and seen from a process of its own."""

GROWTH_BYTES = 8 << 20
"""Most that the process may grow between the second half of the rounds and its end."""


@dataclass
class Tally:
    """What the clients of a round saw: statuses by kind, seconds to each 429, and what must not happen."""

    statuses: collections.Counter = field(default_factory=collections.Counter)
    refusals: list = field(default_factory=list)
    wrong: list = field(default_factory=list)


def head(body_length, key=KEY, path="/v1/completions"):
    """Return the head of a POST."""
    lines = [f"POST {path} HTTP/1.1", "Host: soak", "Content-Type: application/json", f"Authorization: Bearer {key}"]
    return "\r\n".join([*lines, f"Content-Length: {body_length}", "Connection: close", "", ""]).encode()


def request(rng, kind):
    """Return the bytes that a client of `kind` sends."""
    fields = {"prompt": [rng.randrange(200) for _ in range(rng.randint(1, 60))], "max_tokens": rng.randint(1, 120)}
    fields |= {"temperature": rng.choice([0, 1.0]), "n": rng.choice([1, 1, 1, 2]), "ignore_eos": True}
    path = "/v1/completions"
    if kind in ("stream", "slow", "leaver"):
        fields |= {"stream": True, "logprobs": rng.choice([None, 3])}
    elif kind == "chat":
        text = "".join(rng.choice("abc def") for _ in range(rng.randint(1, 80)))
        fields = {"messages": [{"role": "user", "content": text}], "max_tokens": rng.randint(1, 60)}
        path = "/v1/chat/completions"
    elif kind == "responses":
        fields = {"input": rng.choice(["a", "hello"]) * rng.randint(1, 40), "max_output_tokens": rng.randint(1, 60)}
        fields["stream"] = rng.random() < 0.7
        path = "/v1/responses"
    elif kind == "messages":
        content = [{"type": "text", "text": "say " * rng.randint(1, 20)}]
        fields = {"messages": [{"role": "user", "content": content}], "max_tokens": rng.randint(1, 60)}
        fields["stream"] = rng.random() < 0.7
        path = "/v1/messages"
    elif kind == "echo":
        fields |= {"echo": True, "logprobs": 1, "max_tokens": 1, "n": 1}
    elif kind == "long":
        fields["prompt"] = [1] * 100_000
    body = json.dumps(fields).encode()
    if kind == "garbage":
        body = rng.choice([b"{", b"\xff\xfe\x00", body[: len(body) // 2], b"[" * 5000, b"null", b'{"prompt": 1e999}'])
    elif kind == "huge":
        body = b'{"prompt": "' + b"x" * (2 * MAX_BODY) + b'"}'
    return head(len(body), "wrong" if kind == "stranger" else KEY, path) + body


KINDS = ("stream",) * 4 + ("responses", "messages") * 2 + (
    "slow", "leaver", "leaver", "quitter", "chat", "chat", "echo", "garbage", "huge", "stranger", "long", "half",
)  # fmt: skip
ENDS = {
    "stream": (b"[DONE]",),
    "slow": (b"[DONE]",),
    "responses": (b"event: response.completed", b"event: response.incomplete", b'\r\n\r\n{"id":"resp_'),
    "messages": (b"event: message_stop", b'\r\n\r\n{"id":"msg_'),
}
"""What an answer that is whole has in it, one of them, by kind of client."""

EXPECTED = {"garbage": {400, 429}, "huge": {413, 429}, "stranger": {401}, "long": {400, 413, 429}}


async def client(port, rng, kind, tally):
    """Be one client of `kind`, once."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = request(rng, kind)
        if kind == "half":
            writer.write(data[: rng.randrange(len(data))])
            await writer.drain()
            return
        writer.write(data)
        await writer.drain()
        sent = time.perf_counter()
        if kind == "quitter":
            await asyncio.sleep(rng.random() * 0.2)
            return
        status = int((await reader.readline()).split()[1])
        tally.statuses[kind, status] += 1
        if status == 429:
            tally.refusals.append(time.perf_counter() - sent)
            header = (await reader.readuntil(b"\r\n\r\n")).lower()
            await asyncio.sleep(int(header.partition(b"retry-after:")[2].split()[0]))  # as a polite client does
        if kind == "leaver":
            await reader.read(rng.randrange(1, 4000))
            return
        rest = b""
        while chunk := await reader.read(256 if kind == "slow" else 1 << 16):
            rest += chunk
            if kind == "slow" and len(rest) < 20_000:
                await asyncio.sleep(0.02)
        expected = EXPECTED.get(kind, {200, 429, 503}) | ({503} if kind != "stranger" else {401, 503})
        if status not in expected or (status == 503 and b'"code":"too_many_requests"' not in rest):
            tally.wrong.append((kind, status, rest[-300:].decode("utf-8", "replace")))
        if status == 200 and kind in ENDS and not any(end in rest for end in ENDS[kind]):
            tally.wrong.append((kind, "cut off", rest[-200:].decode("utf-8", "replace")))
        if b'"code":"internal_error"' in rest or b'"code":"step_failed"' in rest:
            tally.wrong.append((kind, "error event", rest[-300:].decode("utf-8", "replace")))
    except (ConnectionError, IndexError) as error:
        if kind not in ("half", "quitter", "leaver", "huge"):
            tally.wrong.append((kind, type(error).__name__, str(error)))
    finally:
        writer.close()


async def round_of(port, num_clients, seconds, seed):
    """Run `num_clients` clients for `seconds`, each beginning anew when it is done; returns the tally."""
    tally = Tally()
    until = time.perf_counter() + seconds

    async def again(number):
        rng = random.Random(seed * 1000 + number)
        while time.perf_counter() < until:
            await client(port, rng, rng.choice(KINDS), tally)

    await asyncio.gather(*(again(number) for number in range(num_clients)))
    return tally


async def time_refusals(port, count):
    """Fill the queue, keep it full, and return the sorted seconds of `count` refusals, asked for one after another."""
    body = json.dumps({"prompt": [1] * 20, "max_tokens": 200, "ignore_eos": True}).encode()

    async def once(patience):
        """Return the seconds to a refusal, None when there was none within `patience`."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began = time.perf_counter()
        writer.write(head(len(body)) + body)
        try:
            status = int((await asyncio.wait_for(reader.readline(), patience)).split()[1])
            return time.perf_counter() - began if status == 429 else None
        except TimeoutError:
            return None  # it was let in; leaving aborts it
        finally:
            writer.close()

    async def fill():
        while True:
            if await once(600) is not None:
                await asyncio.sleep(1)

    fillers = [asyncio.create_task(fill()) for _ in range(120)]
    await asyncio.sleep(3)
    found = []
    while len(found) < count:
        took = await once(2)
        if took is not None:
            found.append(took)
        await asyncio.sleep(0.02)
    for task in fillers:
        task.cancel()
    await asyncio.gather(*fillers, return_exceptions=True)
    return sorted(found)


def probe(port, seconds):
    """Ask for `seconds` on blocking sockets, one request after another in each thread; return the seconds to refusals.

    The other clients share one event loop, so that each of their figures holds the work of all of them. These are alone
    in a process and measure what a client sees: from connecting to the first bytes of the answer. One asks for more
    prompts at once than the queue holds and is always refused; the others ask as everybody does, and leave when they
    have been let in.
    """
    until, found = time.perf_counter() + seconds, []

    def ask_often(fields, pause):
        body = json.dumps(fields).encode()
        while time.perf_counter() < until:
            began = time.perf_counter()
            with (
                socket.create_connection(("127.0.0.1", port), PROBE_PATIENCE) as sock,
                contextlib.suppress(TimeoutError),
            ):
                sock.sendall(head(len(body)) + body)
                if sock.recv(4096).startswith(b"HTTP/1.1 429 "):
                    found.append(time.perf_counter() - began)
            time.sleep(pause)

    prompt = [1] * 20
    asked = [({"prompt": [prompt] * (MAX_QUEUED + 1)}, 0.04), *[({"prompt": prompt, "max_tokens": 200}, 0.2)] * 3]
    threads = [threading.Thread(target=ask_often, args=each) for each in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def percentiles(seconds):
    """Return percentiles of a sorted list in milliseconds, None for an empty one."""
    return {f"p{p}": round(seconds[len(seconds) * p // 100] * 1000, 1) for p in (50, 95, 99)} if seconds else None


async def ask(port, method, path):
    """Return the JSON of a route, None for an empty body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [f"{method} {path} HTTP/1.1", "Host: soak", f"Authorization: Bearer {KEY}", "Connection: close", "", ""]
    writer.write("\r\n".join(lines).encode())
    answer = await reader.read()
    writer.close()
    body = answer.partition(b"\r\n\r\n")[2]
    return json.loads(body) if body else None


async def at_rest(port):
    """Wait until nothing runs, drop cached prefixes, and return the engine's figures."""
    for _ in range(600):
        load = await ask(port, "GET", "/load")
        if load["server_load"] == 0 and load["http_requests"] <= 1:
            break
        await asyncio.sleep(0.1)
    await ask(port, "POST", "/reset_prefix_cache")
    await asyncio.sleep(0.6)
    return (await ask(port, "GET", "/server_info"))["engine"]


def resident_bytes(pid):
    """Return the memory that the process holds now."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def start(model, log, *arguments):
    """Start a server and return (process, port)."""
    command = [sys.executable, "-m", "kvloom", "serve", model, "--port", "0", "--api-key", KEY, *arguments]
    limits = ["--max-num-queued-reqs", str(MAX_QUEUED), "--max-body-bytes", str(MAX_BODY), "--client-timeout", "20"]
    process = subprocess.Popen([*command, *limits], stderr=log.open("w"))
    while True:
        for line in log.read_text().splitlines():
            if '"listening"' in line:
                return process, int(json.loads(line)["addresses"][0].rpartition(":")[2])
        assert process.poll() is None, log.read_text()[-2000:]
        time.sleep(0.1)


def soak(model, log, *, rounds, seconds, clients, arguments=()):
    """Run everything and return the report; `broken` in it lists the promises that were not kept."""
    process, port = start(model, log, *arguments)
    report = {"rounds": [], "broken": []}
    probed = []
    try:
        for number in range(rounds):
            command = [sys.executable, __file__, model, "--probe", str(port), "--seconds", str(seconds)]
            prober = subprocess.Popen(command, stdout=subprocess.PIPE)
            tally = asyncio.run(round_of(port, clients, seconds, number))
            seen = sorted(json.loads(prober.communicate(timeout=60)[0]))
            probed += seen
            engine = asyncio.run(at_rest(port))
            refusals = sorted(tally.refusals)
            line = {
                "round": number,
                "answers": sum(tally.statuses.values()),
                "statuses": dict(collections.Counter(s for (_, s), n in tally.statuses.items() for _ in range(n))),
                "refused_429": len(refusals),
                "median_429_ms": round(refusals[len(refusals) // 2] * 1000, 1) if refusals else None,
                "p95_429_ms": round(refusals[int(len(refusals) * 0.95)] * 1000, 1) if refusals else None,
                "p99_429_ms": round(refusals[int(len(refusals) * 0.99)] * 1000, 1) if refusals else None,
                "max_429_ms": round(refusals[-1] * 1000, 1) if refusals else None,
                "probe_429_ms": percentiles(seen),
                "kv_bytes_in_use": engine["kv_bytes_in_use"],
                "running": engine["running"] + engine["waiting"],
                "resident_mib": round(resident_bytes(process.pid) / (1 << 20), 1),
                "threads": len(list(Path(f"/proc/{process.pid}/task").iterdir())),
                "files": len(list(Path(f"/proc/{process.pid}/fd").iterdir())),
            }
            report["rounds"].append(line)
            print(json.dumps(line), flush=True)
            report["broken"] += [f"round {number}: {wrong}" for wrong in tally.wrong[:5]]
            if engine["kv_bytes_in_use"] or line["running"]:
                report["broken"].append(f"round {number}: something still runs or holds blocks")
        quiet = asyncio.run(time_refusals(port, 200))
        report["full_queue_429_ms"] = percentiles(quiet)
        report["probe_429_ms"] = percentiles(sorted(probed))
        memory = [line["resident_mib"] for line in report["rounds"]]
        if len(memory) >= 4 and (memory[-1] - memory[len(memory) // 2]) * (1 << 20) > GROWTH_BYTES:
            report["broken"].append(f"the process grew: {memory} MiB")
    finally:
        process.terminate()
        report["exit"] = process.wait(60)
    entries = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    took = sorted(entry["seconds"] for entry in entries if entry.get("status") == 429)
    report["server_429_ms"] = percentiles(took)
    for name in ("server_429_ms", "probe_429_ms"):
        if report[name] and report[name]["p99"] >= MAX_REFUSAL_MS:
            report["broken"].append(f"{name} is {report[name]}")
    report["errors_in_log"] = [entry["message"] for entry in entries if entry["level"] in ("error", "critical")][:5]
    if report["errors_in_log"]:
        report["broken"].append("errors in the log")
    return report


def main():
    """Soak a server from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--log", type=Path, default=Path("soak.log"))
    parser.add_argument("--probe", type=int, metavar="PORT", help="only measure refusals of a server that runs")
    arguments, others = parser.parse_known_args()
    if arguments.probe:
        print(json.dumps(probe(arguments.probe, arguments.seconds)))
        return
    options = {"rounds": arguments.rounds, "seconds": arguments.seconds, "clients": arguments.clients}
    report = soak(arguments.model, arguments.log, **options, arguments=others)
    print(json.dumps({name: value for name, value in report.items() if name != "rounds"}))
    sys.exit(bool(report["broken"]))


if __name__ == "__main__":
    main()
