"""A Hugging Face Hub of one repository on localhost: listing, files with byte ranges, and its ways to refuse."""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "a" * 40


class LocalHub:
    """Serves `files` as repository ``org/tiny``. Use as a context manager; `url` is the endpoint."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.cut: dict[str, int] = {}
        """File → bytes after which its next answer breaks off."""
        self.slow: dict[str, float] = {}
        """File → seconds that sending it takes."""
        self.refusal: tuple[int, str] | None = None
        """Status and X-Error-Code of every answer."""
        self.requests: list[tuple[str, str, str | None]] = []
        """Method, path and Range header."""

    def __enter__(self) -> "LocalHub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fetched(self) -> list[str]:
        """Names of the files that were sent, in order."""
        return [path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]


def _handler(hub: LocalHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = urlsplit(self.path).path
            hub.requests.append((self.command, path, self.headers.get("Range")))
            if hub.refusal:
                status, code = hub.refusal
                return self.send(status, b"", {"X-Error-Code": code})
            if not path.removeprefix("/api/models/").startswith(("org/tiny", "/org/tiny")):
                return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
            if "/resolve/" in path:
                name = path.rpartition("/")[2]
                if name not in hub.files:
                    return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                return self.send_file(name, body)
            revision = path.rpartition("/")[2]
            if "/revision/" in path and revision not in ("main", COMMIT):
                return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return self.send(200, json.dumps(self.tree() if "/tree/" in path else self.info()).encode())

        def info(self) -> dict:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in hub.files.items()]
            return {"id": "org/tiny", "sha": COMMIT, "siblings": siblings}

        def tree(self) -> list[dict]:
            return [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in hub.files.items()
            ]

        def send_file(self, name: str, body: bool) -> None:
            data = hub.files[name]
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            status, whole = 200, len(data)
            if asked := self.headers.get("Range"):
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start, stop = int(first), min(int(last) + 1 if last else whole, whole)
                if start >= whole:
                    self.send(416, b"", {"Content-Range": f"bytes */{whole}"})
                    return
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{whole}"
                status, data = 206, data[start:stop]
            if body and name in hub.slow:
                self.send_slowly(data, headers, hub.slow[name])
            else:
                self.send(status, data, headers, body, hub.cut.pop(name, None) if body else None)

        def send_slowly(self, data: bytes, headers: dict[str, str], seconds: float, steps: int = 20) -> None:
            self.send(200, data, headers, cut=0)
            for part in range(0, len(data), len(data) // steps):
                time.sleep(seconds / steps)
                try:
                    self.wfile.write(data[part : part + len(data) // steps])
                except OSError:  # the reader has gone
                    return

        def send(self, status: int, data: bytes, headers=None, body: bool = True, cut: int | None = None) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data[:cut])
                if cut is not None:
                    self.wfile.flush()
                    self.close_connection = True

        def log_message(self, format: str, *args) -> None:
            pass

    return Handler
