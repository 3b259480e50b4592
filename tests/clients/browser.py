"""Pages of other origins in a real browser against a keyless server on loopback; see README.md in this folder."""

import argparse
import contextlib
import http.server
import json
import os
import queue
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import ClassVar

PAGE = Path(__file__).with_name("page.html").read_bytes()
FLAGS = ("--headless=shell", "--no-sandbox", "--no-zygote", "--in-process-gpu", "--remote-debugging-port=0")
HOSTS = ("evil.test", "rebound.test", "chat.test")
"""Names that the browser resolves to this machine."""

PROMPT = "The prefix of this prompt is in the cache, and a page of another origin may not have it discarded. " * 4
MESSAGES = [{"role": "user", "content": "Hello"}]
BODY = {"prompt": "a page was here", "tokens": [1], "max_tokens": 1, "input": "a", "messages": MESSAGES}
"""A body that has what each route asks for."""

SENT = {
    "fetch", "no-cors", "image", "script", "frame", "events", "websocket",
    "simple", "simple-no-cors", "form", "form-encoded", "beacon",
}  # fmt: skip
"""Attacks whose request a browser sends without asking the server first."""


class Server(http.server.ThreadingHTTPServer):
    """A server on a free port of 127.0.0.1 with a handler of its own class, in a thread."""

    daemon_threads = True

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Quiet(http.server.BaseHTTPRequestHandler):
    """A handler that logs nothing."""

    def log_message(self, *arguments):
        """Log nothing."""

    def reply(self, body, kind, **headers):
        """Send 200 with `body`."""
        self.send_response(200)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


class Pages(Quiet):
    """Serves the page, with the opaque origin of a sandbox under /sandboxed, and takes reports."""

    reports: ClassVar[queue.Queue] = queue.Queue()

    def do_GET(self):
        """Send the page."""
        sandbox = {"Content_Security_Policy": "sandbox allow-scripts allow-forms"} if "sandbox" in self.path else {}
        self.reply(PAGE, "text/html", **sandbox)

    def do_POST(self):
        """Take a report."""
        self.reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.reply(b"", "text/plain")


class Careless(Quiet):
    """The control: a server that checks nothing. An attack that does not reach it shows nothing elsewhere."""

    seen: ClassVar[set] = set()

    def do_GET(self):
        """Record the attack and answer."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.seen.add((self.command, self.path.partition("attack=")[2]))
        self.reply(b'{"secret": 1}', "application/json")

    do_POST = do_OPTIONS = do_GET


def rebinding_front(target):
    """Return a port that serves the page and passes everything else on to the port `target`.

    To a browser it is one host: what a name is that pointed to the page's server first, and to this machine afterwards.
    """
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def serve(connection):
        data = connection.recv(1 << 16)
        if data.startswith(b"GET /page"):
            lines = ["HTTP/1.1 200 OK", "Content-Type: text/html", f"Content-Length: {len(PAGE)}", "Connection: close"]
            connection.sendall("\r\n".join([*lines, "", ""]).encode() + PAGE)
            connection.close()
            return
        behind = socket.create_connection(("127.0.0.1", target))
        behind.sendall(data)
        threading.Thread(target=pump, args=(behind, connection), daemon=True).start()
        pump(connection, behind)

    def accept():
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener.getsockname()[1]


def visit(browser, address, plan, patience=120):
    """Open `address` with `plan` in a browser of its own and return what the page reports that it read."""
    fragment = urllib.parse.quote(json.dumps(plan))
    rules = ",".join(f"MAP {host} 127.0.0.1" for host in HOSTS)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = [*FLAGS, f"--user-data-dir={profile}", f"--host-resolver-rules={rules}"]
        log = Path(profile, "browser.log")
        with log.open("wb") as errors:
            process = subprocess.Popen([*browser, *flags, f"{address}#{fragment}"], stderr=errors)
        try:
            return Pages.reports.get(timeout=patience)
        except queue.Empty:
            raise SystemExit(f"the page {address} reported nothing:\n{log.read_text()[-2000:]}") from None
        finally:
            process.terminate()
            process.wait(20)


@contextlib.contextmanager
def serving(model, log, *arguments):
    """A keyless `kvloom serve` on a free port; yields the port."""
    command = [sys.executable, "-m", "kvloom", "serve", model, "--port", "0", "--max-model-len", "2048", *arguments]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stderr=errors)
    try:
        while not (found := [entry for entry in entries(log) if "addresses" in entry]):
            if process.poll() is not None:
                raise SystemExit(log.read_text()[-2000:])
            time.sleep(0.1)
        yield int(found[0]["addresses"][0].rpartition(":")[2])
    finally:
        process.terminate()
        process.wait(60)


def entries(log):
    """Return the lines of a server's log that are whole."""
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]


def ask(port, path, body=None):
    """Return the JSON of a route; not from a page."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def cached_tokens(port):
    """Return how much of the prompt came from the cache; asking puts it there."""
    answer = ask(port, "/v1/completions", {"prompt": PROMPT, "max_tokens": 1, "temperature": 0})
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def routes(port):
    """Return the paths of GET and of POST."""
    paths = {path: methods for path, methods in ask(port, "/openapi.json")["paths"].items() if "{" not in path}
    return ([path for path, methods in paths.items() if kind in methods] for kind in ("get", "post"))


def attacked(browser, target, gets, posts, page_port):
    """Attack the port `target` from pages of every other origin; yields (origin, what was read)."""
    plan = {"mode": "attack", "gets": gets, "posts": posts, "body": json.dumps(BODY)}
    plan |= {"target": f"http://127.0.0.1:{target}", "report": f"http://127.0.0.1:{page_port}/report"}
    for host in ("localhost", "127.0.0.1", "evil.test"):
        yield host, visit(browser, f"http://{host}:{page_port}/page", plan)
    yield "null", visit(browser, f"http://evil.test:{page_port}/sandboxed", plan)
    own = f"http://rebound.test:{rebinding_front(target)}"
    yield "rebound", visit(browser, f"{own}/page", plan | {"target": own})


def check_control(browser, page_port):
    """Attack the careless server; what does not succeed there is a fault of this script or of the browser's rules."""
    target = Server(Careless).server_port
    for origin, read in attacked(browser, target, ["/get"], ["/post"], page_port):
        names = {name for name, *_ in read}
        missing = SENT - {attack for _, attack in Careless.seen}
        assert not missing, f"a page of {origin} sent nothing by {sorted(missing)}"
        if origin == "rebound":
            assert {"fetch", "frame", "simple", "preflighted", "form"} <= names, names
        else:
            assert ("POST", "preflighted") not in Careless.seen and not names & {"fetch", "simple", "form"}, names
        Careless.seen.clear()
        print(f"control, page of {origin}: all attacks arrive, {len(names)} are answered to the page", flush=True)


def leaked(read):
    """Return what a page read but for the refusal of its host name, which a rebound page may read."""
    return [found for found in read if "this server is not asked for as 'rebound.test'" not in found[2]]


def check_refused(browser, model, page_port, folder):
    """Attack a keyless server: no page reads anything, no POST of a page gets further than 403."""
    log = folder / "keyless.log"
    with serving(model, log) as port:
        gets, posts = routes(port)
        cached_tokens(port)
        kept = cached_tokens(port)
        assert kept > 0, "the prompt is not in the cache"
        for origin, read in attacked(browser, port, gets, posts, page_port):
            assert not leaked(read), f"a page of {origin} read {leaked(read)[:5]}"
            print(f"page of {origin}: read nothing of {len(gets)} GET and {len(posts)} POST routes", flush=True)
        assert cached_tokens(port) == kept, "the prefix cache was discarded"
    own = 3
    changed = [entry for entry in entries(log) if entry.get("method") == "POST" and entry["status"] < 400]
    assert len(changed) == own, changed
    refused = [entry for entry in entries(log) if entry.get("method") == "POST" and entry["status"] >= 400]
    wrong = [entry for entry in refused if entry["error"] not in ("origin_not_allowed", "host_not_allowed")]
    assert refused and not wrong, wrong
    print(f"{len(refused)} POSTs of pages were refused with 403; the prefix cache still has its {kept} tokens")


def check_allowed(browser, model, page_port, folder):
    """Name a page with --allowed-origins: it works, with preflights, streams and errors; others still read nothing."""
    named = f"http://chat.test:{page_port}"
    asked = {"messages": MESSAGES, "max_tokens": 4}
    bodies = [asked, {**asked, "stream": True}, {"messages": []}]
    log = folder / "allowed.log"
    with serving(model, log, "--allowed-origins", named) as port:
        plan = {"mode": "use", "posts": [["/v1/chat/completions", body] for body in bodies]}
        plan |= {"target": f"http://127.0.0.1:{port}", "report": f"http://127.0.0.1:{page_port}/report"}
        read = visit(browser, f"{named}/page", plan)
        assert [status for _, status, *_ in read] == [200, 200, 400, 200], read
        assert json.loads(read[0][2])["choices"][0]["message"]["content"] and "[DONE]" in read[1][2], read
        assert all(request_id for *_, request_id in read), read
        gets, posts = routes(port)
        for origin, found in attacked(browser, port, gets, posts, page_port):
            assert not leaked(found), f"a page of {origin} read {leaked(found)[:5]}"
    changed = [entry for entry in entries(log) if entry.get("method") == "POST" and entry["status"] < 400]
    assert len(changed) == 2, changed
    print(f"page of {named}: whole answers, streams and refusals are read; other pages still read nothing")


def main():
    """Run all checks; the status is 1 and the message says what a page could do when one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--log-folder", type=Path, help="where the servers' logs go (default: a temporary folder)")
    arguments = parser.parse_args()
    browser = shlex.split(os.environ.get("CHROMIUM", ""))
    if not browser:
        raise SystemExit("set CHROMIUM to the command of a Chromium or Chrome, such as CHROMIUM=/usr/bin/chromium")
    page_port = Server(Pages).server_port
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.log_folder or Path(name)
        check_control(browser, page_port)
        check_refused(browser, arguments.model, page_port, folder)
        check_allowed(browser, arguments.model, page_port, folder)


if __name__ == "__main__":
    main()
