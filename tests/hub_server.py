"""A small Hub over loopback: the routes that huggingface_hub 2 calls to push and load, with faults on demand.

The real, unpatched clients talk to it. What it answers follows what they were seen to need; it is no reference for how
the Hub itself works.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

DATE = "2026-01-01T00:00:00.000Z"


class Xet(bytes):
    """The sha256 of a file that lies in Xet's storage."""


@dataclass
class Repo:
    """A repository: trees of its commits, {path: (bytes, is LFS)}, and what points at them."""

    private: bool = False
    trees: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)

    def commit(self, ref: str, tree: dict[str, tuple[bytes, bool]]) -> str:
        sha = hashlib.sha1(f"{len(self.trees)} {ref}".encode()).hexdigest()
        self.trees[sha], self.refs[ref] = tree, sha
        return sha


@dataclass
class Fault:
    """What goes wrong with requests that match: a status, or "drop" (no answer), "lose" (done, but no answer),
    "gone" (the same, and no answer to anything after it), "short" (half of the body), "flip" (one wrong byte)."""

    match: str
    action: str | int
    times: int = 1


class Hub:
    """The server's state; `url` is its endpoint."""

    def __init__(self) -> None:
        self.tokens = {"write-alice": ("alice", "write"), "read-bob": ("bob", "read")}
        self.orgs = {"org": {"alice"}}
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.xet: str | None = None
        self.xet_files: dict[bytes, tuple[str, int]] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def index_xet(self, path: Path) -> None:
        """Know a file by its sha256: its Xet hash and size, which the Hub reads from what was uploaded."""
        import hf_xet  # which huggingface_hub brings along where there is a wheel of it

        oid = hashlib.sha256(path.read_bytes()).hexdigest().encode()
        known = hf_xet.hash_files([str(path)])[0]
        self.xet_files[oid] = known.hash, known.file_size

    def fault(self, match: str, action: str | int, times: int = 1) -> None:
        self.faults.append(Fault(match, action, times))

    def files(self, repo: str, ref: str = "main") -> dict[str, bytes]:
        found = self.repos[repo]
        return {path: content for path, (content, _) in found.trees[found.refs[ref]].items()}


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    # Answers

    def send(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        if not (headers and "Content-Length" in headers):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X-Error-Code": code} if code else {}
        if message:
            headers["X-Error-Message"] = message
        self.send(status, {"error": message or code}, headers)

    # Requests

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        path = urlsplit(self.path)
        self.query = parse_qs(path.query)
        line = f"{self.command} {unquote(path.path)}"
        self.hub.requests.append(line)
        self.lose = self.flaw = None
        fault = next((f for f in self.hub.faults if f.times > 0 and re.search(f.match, line)), None)
        if fault:
            fault.times -= 1
            if isinstance(fault.action, int):
                return self.refuse(fault.action, message="injected fault")
            if fault.action == "drop":
                return self.hang_up()
            if fault.action in ("lose", "gone"):
                self.lose = True
                if fault.action == "gone":
                    self.hub.faults.insert(0, Fault("", "drop", 1000))
            else:
                self.flaw = fault.action
        if not self.identify():
            return None
        for method, pattern, answer in ROUTES:
            found = re.fullmatch(pattern, path.path) if self.command in method else None
            if found:
                return answer(self, *map(unquote, found.groups()))
        return self.refuse(404, message=f"no route for {line}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def identify(self) -> bool:
        """Who asks; a token that nobody knows is refused everywhere."""
        self.user, self.role = None, None
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if sent and sent not in self.hub.tokens:
            message = "Invalid user token." if "whoami" in self.path else "Invalid credentials in Authorization header"
            self.refuse(401, message=message)
            return False
        if sent:
            self.user, self.role = self.hub.tokens[sent]
        return True

    def owns(self, name: str) -> bool:
        owner = name.split("/")[0]
        return self.user is not None and (owner == self.user or self.user in self.hub.orgs.get(owner, ()))

    def repo(self, name: str) -> Repo | None:
        found = self.hub.repos.get(name)
        if found is None or (found.private and not self.owns(name)):
            self.refuse(404 if self.user else 401, "RepoNotFound", "Repository not found")
            return None
        return found

    def may_write(self, name: str) -> bool:
        if self.user is None:
            self.refuse(401, message="Invalid username or password.")
        elif self.role != "write" or not self.owns(name):
            self.refuse(403, message="You don't have the rights required to perform this request")
        else:
            return True
        return False

    def tree(self, name: str, revision: str) -> tuple[str, dict[str, tuple[bytes, bool]]] | None:
        repo = self.repo(name)
        if repo is None:
            return None
        sha = repo.refs.get(revision, revision)
        if sha not in repo.trees:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return sha, repo.trees[sha]

    # Routes

    def whoami(self) -> None:
        if self.user is None:
            return self.refuse(401, message="Invalid user token.")
        role = {"accessToken": {"role": self.role}}
        return self.send(200, {"name": self.user, "type": "user", "orgs": [], "auth": role})

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        if name in self.hub.repos and (not self.hub.repos[name].private or self.owns(name)):
            return self.send(409, {"url": f"{self.hub.url}/{name}"})
        if not self.may_write(name):
            return None
        private = asked.get("visibility") == "private" or asked.get("private", False)
        made = self.hub.repos[name] = Repo(private)
        made.commit("main", {".gitattributes": (b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)})
        return self.send(200, {"url": f"{self.hub.url}/{name}"})

    def info(self, name: str, revision: str = "main") -> None:
        found = self.tree(name, revision)
        if found:
            sha, tree = found
            siblings = [{"rfilename": path} for path in tree]
            private = self.hub.repos[name].private
            self.send(
                200, {"id": name, "sha": sha, "private": private, "siblings": siblings, "tags": [], "cardData": {}}
            )

    def listing(self, name: str, revision: str) -> None:
        found = self.tree(name, revision)
        if found:
            self.send(200, [describe(path, *item) for path, item in found[1].items()])

    def paths_info(self, name: str, revision: str) -> None:
        found = self.tree(name, revision)
        if found:
            asked = parse_qs(self.body.decode())["paths"]
            self.send(200, [describe(path, *found[1][path]) for path in asked if path in found[1]])

    def refs(self, name: str) -> None:
        repo = self.repo(name)
        if repo:
            branches = [
                {"name": n, "ref": f"refs/heads/{n}", "targetCommit": s} for n, s in repo.refs.items() if "/" not in n
            ]
            self.send(200, {"branches": branches, "tags": [], "converts": [], "pullRequests": []})

    def branch(self, name: str, branch: str) -> None:
        repo = self.repo(name)
        if repo and self.may_write(name):
            repo.refs[branch] = repo.refs["main"]
            self.send(200, {})

    def preupload(self, name: str, revision: str) -> None:
        proposes = "create_pr" in self.query
        found = self.tree(name, revision)
        if not found or not (proposes or self.may_write(name)):
            return
        answer = []
        for file in json.loads(self.body)["files"]:
            lfs = file["path"].endswith(".safetensors")
            item = found[1].get(file["path"])
            oid = describe(file["path"], *item)["lfs" if item[1] else "oid"] if item else None
            oid = oid["oid"] if isinstance(oid, dict) else oid
            mode = "lfs" if lfs else "regular"
            answer.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **({"oid": oid} if oid else {})}
            )
        self.send(200, {"files": answer})

    def lfs_batch(self, name: str) -> None:
        asked = json.loads(self.body)
        if "ref" in asked and not self.may_write(name):
            return
        objects = []
        for one in asked["objects"]:
            href = f"{self.hub.url}/lfs/{one['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            known = one["oid"] in self.hub.objects
            objects.append({**one, **({} if known else {"actions": actions})})
        self.send(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.refuse(400, message="wrong content")
        self.hub.objects[oid] = self.body
        return self.send(200)

    def lfs_verify(self, oid: str) -> None:
        self.send(200 if oid in self.hub.objects else 404)

    def commit(self, name: str, revision: str) -> None:
        repo, proposes = self.repo(name), "create_pr" in self.query
        if repo is None or not (proposes or revision.startswith("refs/pr/") or self.may_write(name)):
            return
        if self.user is None:
            return self.refuse(401, message="Invalid username or password.")
        tree, title = dict(repo.trees[repo.refs[revision]]), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, repo.refs[revision]):
                    return self.refuse(412, message="A commit has happened since. Please refresh and try again.")
            elif kind == "file":
                tree[value["path"]] = base64.b64decode(value["content"]), False
            elif kind == "lfsFile":
                content = self.hub.objects.get(value["oid"])
                if content is None and not self.hub.xet:
                    return self.refuse(400, message="a file of this commit was never uploaded")
                # Of what Xet's storage has, the server keeps the sha256.
                tree[value["path"]] = content if content is not None else Xet(value["oid"].encode()), True
            elif kind == "deletedFile":
                tree.pop(value["path"], None)
        extra = {}
        if proposes:
            repo.titles.append(title)
            revision = f"refs/pr/{len(repo.titles)}"
            extra["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{len(repo.titles)}"
        sha = repo.commit(revision, tree)
        if self.lose:
            return self.hang_up()
        return self.send(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, **extra})

    def discussions(self, name: str) -> None:
        repo = self.repo(name)
        if repo:
            shared = {"status": "open", "createdAt": DATE, "isPullRequest": True, "author": {"name": "alice"}}
            shared |= {"repo": {"name": name, "type": "model"}, "numComments": 0, "pinned": False}
            found = [{**shared, "num": n, "title": title} for n, title in enumerate(repo.titles, start=1)]
            self.send(200, {"discussions": found, "count": len(found), "start": 0, "numClosedDiscussions": 0})

    def validate_yaml(self) -> None:
        if re.search(r"^license: mine$", json.loads(self.body)["content"], re.MULTILINE):
            return self.send(400, {"errors": [{"message": '"license" must be one of [...]'}], "warnings": []})
        return self.send(200, {"errors": [], "warnings": []})

    def xet_token(self, name: str, kind: str, revision: str) -> None:
        if self.hub.xet is None:
            return self.refuse(404)
        url = f"local://{self.hub.xet}"
        headers = {"X-Xet-Access-Token": "t", "X-Xet-Token-Expiration": "9999999999", "X-Xet-Cas-Url": url}
        return self.send(200, {"accessToken": "t", "exp": 9999999999, "casUrl": url}, headers)

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self.tree(name, revision)
        if not found:
            return
        sha, tree = found
        if path not in tree:
            self.send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        content, lfs = tree[path]
        told = describe(path, content, lfs)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{told["lfs"]["oid"] if lfs else told["oid"]}"'}
        if content in self.hub.xet_files:  # its bytes lie in Xet's storage; of ours is only where to ask for them
            file_hash, size = self.hub.xet_files[content]
            link = f'<{self.hub.url}/api/models/{name}/xet-read-token/{sha}>; rel="xet-auth"'
            headers |= {"ETag": f'"{content.decode()}"', "X-Linked-Size": str(size)}
            self.send(200, b"", {**headers, "X-Xet-Hash": file_hash, "Link": link})
        elif self.command == "HEAD":
            self.send(200, b"", {**headers, "Content-Length": str(len(content))})
        elif self.flaw == "flip":
            self.send(200, content[:-1] + bytes([content[-1] ^ 1]), headers)
        elif self.flaw == "short":
            self.send(200, content[: len(content) // 2], headers)
        else:
            self.send(200, content, headers)


def describe(path: str, content: bytes, lfs: bool) -> dict[str, Any]:
    """A file as the tree and paths-info routes tell of it."""
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    told: dict[str, Any] = {"type": "file", "path": path, "oid": oid, "size": len(content)}
    if lfs:
        sha256 = content.decode() if isinstance(content, Xet) else hashlib.sha256(content).hexdigest()
        told["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
    return told


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (("GET",), "/api/whoami-v2", Handler.whoami),
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.validate_yaml),
    (("GET",), f"/api/models/{NAME}", Handler.info),
    (("GET",), f"/api/models/{NAME}/revision/([^/]+)", Handler.info),
    (("GET",), f"/api/models/{NAME}/tree/([^/]+)", Handler.listing),
    (("POST",), f"/api/models/{NAME}/paths-info/([^/]+)", Handler.paths_info),
    (("GET",), f"/api/models/{NAME}/refs", Handler.refs),
    (("POST",), f"/api/models/{NAME}/branch/([^/]+)", Handler.branch),
    (("POST",), f"/api/models/{NAME}/preupload/([^/]+)", Handler.preupload),
    (("POST",), f"/{NAME}.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), "/lfs/([0-9a-f]+)", Handler.lfs_put),
    (("POST",), "/lfs/([0-9a-f]+)/verify", Handler.lfs_verify),
    (("POST",), f"/api/models/{NAME}/commit/([^/]+)", Handler.commit),
    (("GET",), f"/api/models/{NAME}/discussions", Handler.discussions),
    (("GET",), f"/api/models/{NAME}/(xet-(?:read|write)-token)/([^/]+)", Handler.xet_token),
    (("GET", "HEAD"), f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
