"""A tiny random model, and servers around it that answer on a real socket."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

from kvloom.server.listening import bind
from kvloom.server.serve import Server, build_server
from kvloom.server.service import Service
from kvloom.server.settings import ServerConfig

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools> answer with <tool_call>{}</tool_call>\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BLOCK_SIZE = 4
MAX_LEN = 256


def make_model(folder, template=TEMPLATE, seed=0):
    """Write a random Llama with a vocabulary of bytes, an end token and a chat template into `folder`."""
    import tokenizers
    import torch
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<end>", **({"chat_template": template} if template else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=MAX_LEN,
        bos_token_id=None,
        eos_token_id=256,
        initializer_range=0.3,
    )
    LlamaForCausalLM(shape).float().save_pretrained(folder)
    return folder


def make_llm(folder, **options):
    """Return the tiny model in float32 with a small cache."""
    from kvloom import LLM

    settings = {"dtype": "float32", "block_size": BLOCK_SIZE, "kv_cache_memory_bytes": 8 << 20, "max_num_seqs": 8}
    return LLM(str(folder), **{**settings, **options})


@dataclass
class Running:
    """A server that answers at `url`."""

    url: str
    port: int
    server: Server
    service: Service
    thread: threading.Thread

    def stop(self):
        """End it as a signal would, and wait."""
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()

    def wait_idle(self):
        """Wait until nothing runs; fails after a minute."""
        deadline = time.monotonic() + 60
        while self.service.engine.requests or self.service.num_live or self.service.num_open:
            assert time.monotonic() < deadline, "the server does not come to rest"
            time.sleep(0.01)

    def blocks_in_use(self):
        """Bytes that requests hold, after every invariant of the cache has been checked between two steps."""

        def look(engine):
            engine.cache.check_invariants()
            return engine.cache.bytes_in_use

        return self.service.thread.call(look).result(60)


@contextmanager
def running(llm, tracer=None, **options):
    """A server around `llm` on a free port, ended on leaving."""
    options = {"served_model_name": ("tiny",), "disable_log_stats": True, **options}
    sock = bind("127.0.0.1", 0)
    server = build_server(llm, ServerConfig(**options), tracer=tracer)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = sock.getsockname()[1]
    found = Running(f"http://127.0.0.1:{port}", port, server, server.service, thread)
    try:
        yield found
    finally:
        if thread.is_alive():
            found.stop()


@dataclass
class Reply:
    """One HTTP response, read to its end."""

    status: int
    headers: dict
    body: bytes

    def json(self):
        """The body as JSON."""
        return json.loads(self.body)

    def events(self):
        """The JSON values of server-sent events; the end mark must be there."""
        lines = [line for line in self.body.split(b"\n\n") if line.startswith(b"data: ")]
        assert lines[-1] == b"data: [DONE]"
        return [json.loads(line[6:]) for line in lines[:-1]]


def call(server, method, path, body=None, headers=None, raw=None):
    """Make one request and return the reply."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    if body is not None:
        raw = json.dumps(body).encode()
    sent = {**({} if raw is None else {"Content-Type": "application/json"}), **(headers or {})}
    connection.request(method, path, raw, sent)
    response = connection.getresponse()
    reply = Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    connection.close()
    return reply


def complete(server, prompt="hello", **fields):
    """POST /v1/completions."""
    return call(server, "POST", "/v1/completions", {"prompt": prompt, "temperature": 0, **fields})


def converse(server, text="hello", **fields):
    """POST /v1/chat/completions with one message."""
    fields = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8, **fields}
    return call(server, "POST", "/v1/chat/completions", fields)


def open_stream(server, path="/v1/completions", field="prompt", **fields):
    """Begin a streamed answer on a bare socket and return the socket; `field` is what its prompt is called."""
    body = json.dumps({field: "hello", "stream": True, "temperature": 0, "ignore_eos": True, **fields}).encode()
    sock = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
    sock.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    return sock


def in_background(function, *arguments, **fields):
    """Call `function` in a thread and return (thread, list that will hold the reply)."""
    replies = []
    thread = threading.Thread(target=lambda: replies.append(function(*arguments, **fields)))
    thread.start()
    return thread, replies


def until(condition):
    """Wait until `condition()` holds; fails after a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
