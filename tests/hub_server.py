"""A model hub on this machine: as much of its HTTP interface as an upload and a download of one repository use."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "0" * 40


class Handler(BaseHTTPRequestHandler):
    """Weights come as LFS objects, the other files within the commit."""

    files: dict[str, bytes]
    objects: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size + 2)[:size])
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, content: bytes | dict[str, Any], status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self) -> None:
        match = re.search(r"/resolve/[^/]+/(.*)", self.path)
        data = self.files.get(match[1]) if match else None
        if data is None:
            self.answer({}, 404, X_Error_Code="EntryNotFound")
        else:
            self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self) -> None:
        self.objects[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        text, host = self.body().decode(), f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            self.answer({"url": f"{host}/me/small"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            modes = {file["path"]: "regular" for file in json.loads(text)["files"]}
            modes |= {path: "lfs" for path in modes if path.endswith(".safetensors")}
            self.answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(text)["objects"]
            upload = [o | {"actions": {"upload": {"href": f"{host}/object/{o['oid']}"}}} for o in objects]
            self.answer({"transfer": "basic", "objects": upload})
        elif "/commit/" in self.path:
            for line in map(json.loads, text.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.objects[value["oid"]]
            self.answer({"commitUrl": f"{host}/me/small/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer({}, 404)


@contextmanager
def hub(files: dict[str, bytes]) -> Iterator[str]:
    """The address (HF_ENDPOINT) of a hub of one repository, whose files these are and become."""
    own = type("OwnHandler", (Handler,), {"files": files, "objects": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), own) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
