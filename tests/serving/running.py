"""A server of a tiny model on a port of this machine, and a gate in front of its forward passes."""

import contextlib
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import openai
import uvicorn

import hf_sparse_pathways as sp
from hf_sparse_pathways.serving.app import make_app
from hf_sparse_pathways.serving.limits import Limits
from hf_sparse_pathways.serving.service import Service
from tests.architectures import build, random_masks
from tests.texts import tiny_tokenizer

CHAT = (
    "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('Begin with a user.') }}"
    "{% endif %}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_model(**arguments):
    dense = build("llama")
    paths = sp.Pathways.from_masks(dense, random_masks(dense))
    return sp.SparsePathwaysForCausalLM.from_dense(dense, paths, **arguments)


@dataclass
class Gate:
    """Counts forward passes, and lets none through while it is closed."""

    passes: int = 0
    opened: threading.Event = field(default_factory=threading.Event)

    def __call__(self, *_):
        self.passes += 1
        assert self.opened.wait(20)


@dataclass(frozen=True)
class Running:
    """A server and what it serves."""

    model: Any
    tokenizer: Any
    service: Service
    app: Any
    url: str

    @property
    def client(self):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    def alone(self, prompt, domain, tokens=12, **given):
        """Return what ``generate`` makes of a prompt, greedily and without a server."""
        inputs = self.tokenizer(prompt, return_tensors="pt")
        options = {"do_sample": False, "max_new_tokens": tokens, **given}
        output = self.model.generate(**inputs, domain=domain, **options)
        return self.tokenizer.decode(
            output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )


@contextlib.contextmanager
def running(model=None, *, template=CHAT, guard=False, **limits):
    """Serve a tiny model within the block."""
    model = model or tiny_model()
    tokenizer = tiny_tokenizer("characters")
    tokenizer.chat_template = template
    service = Service(model, tokenizer, "me/tiny", Limits(**limits), guard=guard)
    app = make_app(service)
    config = uvicorn.Config(app, port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Running(model, tokenizer, service, app, f"http://127.0.0.1:{port}")
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


def wait_until(condition):
    """Wait for something that happens soon on another thread."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.01)
