"""A Hugging Face Hub on 127.0.0.1: as much of its HTTP interface as `load_dataset` and uploads of models ask for."""

import base64
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from contextlib import contextmanager

Trees = dict[tuple[str, str], dict[str, bytes]]  # (repository, revision) -> path -> content


@contextmanager
def fake_hub(trees: Trees):
    """Serve the repositories; yields the endpoint's address."""

    class Hub(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_GET(self):
            path = urllib.parse.unquote(self.path.partition("?")[0])
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/auth-check/write", path):
                return self.reply_json({}) if (match[1], "main") in trees else self.reply(404, b"{}", {})
            if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)", path):
                path = f"/api/datasets/{match[1]}/revision/main"
            match = re.fullmatch(
                r"(?:/api)?/datasets/([^/]+/[^/]+)/(resolve|revision|tree)/(refs/convert/parquet|[^/]+)/?(.*)", path
            )
            if not match or (match[1], "main") not in trees:
                return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            repository, action, revision, rest = match.groups()
            commits = {commit_of(repository, name): name for owner, name in trees if owner == repository}
            files = trees.get((repository, commits.get(revision, revision)))
            if files is None:
                return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            commit = commit_of(repository, commits.get(revision, revision))
            if action == "revision":
                siblings = [{"rfilename": file} for file in files]
                return self.reply_json({"id": repository, "sha": commit, "siblings": siblings})
            if action == "resolve":
                if rest not in files:
                    return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
                etag = f'"{hashlib.sha1(files[rest]).hexdigest()}"'
                return self.reply(200, files[rest], {"X-Repo-Commit": commit, "ETag": etag})
            inside = [file for file in files if file.startswith(f"{rest}/" if rest else "")]
            if not inside:
                return self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return self.reply_json(list(entries(files, rest, "recursive=true" in self.path.lower())))

        do_HEAD = do_GET

        def do_POST(self):
            """Makes a model's repository and takes commits of it, from whoever has the token hf_right."""
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Authorization"] != "Bearer hf_right":
                return self.reply(401, b"{}", {"X-Error-Message": "Invalid user token."})
            path = self.path.partition("?")[0]
            if path == "/api/validate-yaml":
                return self.reply_json({})
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                trees.setdefault((name, "main"), {})
                return self.reply_json({"url": f"{address}/{name}"})
            name, action = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path).groups()
            if action == "preupload":
                files = [file["path"] for file in json.loads(body)["files"]]
                return self.reply_json(
                    {"files": [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]}
                )
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    trees[name, "main"][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            oid = "0" * 40
            return self.reply_json({"commitUrl": f"{address}/{name}/commit/{oid}", "commitOid": oid})

        def reply(self, status: int, body: bytes, headers: dict[str, str]):
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def reply_json(self, value: object):
            self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def commit_of(repository: str, revision: str) -> str:
    return hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()


def entries(files: dict[str, bytes], folder: str, recursive: bool):
    """What the Hub lists of a folder: its files and folders, of all depths if recursive."""
    prefix = f"{folder}/" if folder else ""
    folders = set()
    for file, content in files.items():
        parts = file.split("/")
        folders |= {"/".join(parts[:depth]) for depth in range(1, len(parts))}
        if file.startswith(prefix) and (recursive or "/" not in file[len(prefix) :]):
            yield {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    for path in sorted(folders):
        if path.startswith(prefix) and (recursive or "/" not in path[len(prefix) :]):
            yield {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
