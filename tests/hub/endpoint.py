"""Where the tests' Hub answers; to be imported before anything of Hugging Face's is.

Libraries read these variables when they are imported. Nothing is asked of the real Hub, whatever
a test does: without a fixture's help there is no repository.
"""

import atexit
import os
import shutil
import tempfile
import threading

from tests.hub.server import Server

SERVER = Server()

_CACHE = tempfile.mkdtemp(prefix="hub-cache-")
_DATASETS = tempfile.mkdtemp(prefix="datasets-cache-")
for _folder in (_CACHE, _DATASETS):
    atexit.register(shutil.rmtree, _folder, ignore_errors=True)

os.environ.update(
    HF_DATASETS_CACHE=_DATASETS,
    HF_ENDPOINT=SERVER.url,
    HF_HUB_CACHE=_CACHE,
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_OFFLINE="0",
    NO_PROXY="127.0.0.1",
)
os.environ.pop("HF_TOKEN", None)

threading.Thread(target=SERVER.serve_forever, daemon=True).start()
