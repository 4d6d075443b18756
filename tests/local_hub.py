"""A Hugging Face Hub in memory, for tests of what the real clients send and receive. Standard library only.

It speaks what `huggingface_hub` 2.4, and through it transformers and datasets, need to publish and use models and
datasets with `HF_ENDPOINT` at [`LocalHub.endpoint`] and `HF_HUB_DISABLE_XET=1`. As on the Hub, large files lie on
another host, which refuses requests that carry the user's token. Not here: pull requests, paged listings, spaces.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".arrow", ".bin", ".npz", ".parquet", ".pickle", ".pkl", ".pt", ".pth", ".safetensors", ".wav", ".zip")
API = "/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)"
PAGE = "/((?P<kind>dataset)s/)?(?P<name>[^/]+/[^/]+)"  # outside of the API, models have no prefix
ROUTES = []


class HubError(Exception):
    """What a route refuses; the client chooses its exception by status and code."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "", **content):
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.answer = status, headers, json.dumps({"error": message, **content}).encode()


class File:
    """One version of a file. Git LFS keeps a large one by its sha256, and git a pointer to it."""

    def __init__(self, path: str, content: bytes):
        self.content, self.large, sha256 = content, path.endswith(LARGE), hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
        blob = pointer if self.large else content
        oid = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
        self.etag = sha256 if self.large else oid
        # Listings differ in what they call path and hashes.
        self.listed = {"type": "file", "path": path, "rfilename": path, "oid": oid, "blobId": oid, "size": len(content)}
        if self.large:
            self.listed["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": len(pointer)}


class Repo:
    """`refs` has the commit of each branch and tag, `commits` the files of each commit, by path."""

    def __init__(self, name: str):
        self.name, self.refs, self.commits = name, {}, {}
        rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE)
        self.commit({".gitattributes": rules.encode()})

    def sha(self, revision: str = "main") -> str:
        """The commit that a branch, a tag or its own hash names."""
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def files(self, revision: str = "main") -> dict[str, File]:
        return self.commits[self.sha(revision)]

    def commit(self, changes: dict[str, bytes | None], branch: str = "main") -> str:
        """Write files, and delete those that are None; returns the new commit's hash."""
        files = {**self.commits.get(self.refs.get(branch), {}), **dict.fromkeys(changes)}
        files |= {path: File(path, content) for path, content in changes.items() if content is not None}
        files = {path: files[path] for path in sorted(files) if files[path]}
        tree = json.dumps([len(self.commits), [file.listed for file in files.values()]])
        sha = self.refs[branch] = hashlib.sha1(tree.encode()).hexdigest()
        self.commits[sha] = files
        return sha

    def entries(self, revision: str) -> dict[str, dict]:
        """Files and folders by path, as listings have them."""
        entries = {}
        for path, file in self.files(revision).items():
            for folder in [path[: slash.start()] for slash in re.finditer("/", path)]:
                entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40}
            entries[path] = file.listed
        return entries


def route(method: str, pattern: str):
    """Have a method of `_Handler` answer requests whose path fits: with JSON, or with status, headers and bytes. Named
    groups are its arguments, but for `kind` and `name` of a repository, which becomes `self.repo`."""
    return lambda function: ROUTES.append((method, re.compile(pattern), function)) or function


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        return {"errors": [], "warnings": []}

    @route("POST", "/api/repos/create")
    def create_repo(self):
        kind, name = self.json.get("type", "model"), f"{self.json['organization']}/{self.json['name']}"
        content = {"name": name, "url": f"{self.server.endpoint}/{'datasets/' * (kind == 'dataset')}{name}"}
        if (kind, name) in self.server.repos:
            raise HubError(409, f"You already created this {kind} repo", **content)
        self.server.repos[kind, name] = Repo(name)
        return content

    @route("GET", f"{API}(/revision/(?P<revision>[^/]+))?")
    def repo_info(self, revision="main"):
        siblings = [file.listed for file in self.repo.files(revision).values()]
        return {"id": self.repo.name, "sha": self.repo.sha(revision), "private": False, "siblings": siblings}

    @route("GET", f"{API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
    def tree(self, revision, folder=""):
        entries, start = self.repo.entries(revision), f"{folder}/" if folder else ""
        if folder and entries.get(folder, {}).get("type") != "directory":
            raise HubError(404, f"There is no folder {folder}", "EntryNotFound", self.repo.sha(revision))
        deep = self.query.get("recursive") == ["true"]
        inside = {path.removeprefix(start): entry for path, entry in entries.items() if path.startswith(start)}
        return [entry for path, entry in inside.items() if "/" not in path or deep]

    @route("POST", f"{API}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, revision):
        paths = parse_qs(self.body.decode()).get("paths", [])
        return [entry for path, entry in self.repo.entries(revision).items() if path in paths]

    @route("POST", f"{API}/(?P<what>branch|tag)/(?P<path>[^/]+)")
    def create_ref(self, what, path):
        start, name = (self.json.get("startingPoint", "main"), path) if what == "branch" else (path, self.json["tag"])
        if name in self.repo.refs:
            raise HubError(409, f"Reference already exists: {name}")
        self.repo.refs[name] = self.repo.sha(start)

    @route("POST", f"{API}/preupload/(?P<revision>[^/]+)")
    def preupload(self, revision):
        there, answers = self.repo.files(revision), []
        for path in [asked["path"] for asked in self.json["files"]]:
            answer = {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}
            answers.append(answer | ({"oid": there[path].etag} if path in there else {}))
        return {"files": answers}

    @route("POST", rf"{PAGE}\.git/info/lfs/objects/batch")
    def lfs_batch(self):
        verify = {"href": f"{self.server.endpoint}/lfs/verify"}
        for asked in self.json["objects"]:
            if asked["oid"] not in self.server.objects:
                asked["actions"] = {"upload": {"href": f"{self.server.storage}/{asked['oid']}"}, "verify": verify}
        return {"transfer": "basic", "objects": self.json["objects"]}

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content is not what its hash says")
        self.server.objects[oid] = self.body

    @route("POST", "/lfs/verify")
    def lfs_verify(self):
        if len(self.server.objects.get(self.json["oid"], b"")) != self.json["size"]:
            raise HubError(404, "No such large file was uploaded")

    @route("POST", f"{API}/commit/(?P<branch>[^/]+)")
    def commit(self, branch):
        head, changes = self.repo.sha(branch), {}
        for line in map(json.loads, self.body.splitlines()):
            key, value, path = line["key"], line["value"], line["value"].get("path", "").rstrip("/")
            if value.get("parentCommit", head) != head:
                raise HubError(412, "A commit has happened since")
            if key == "file":
                changes[path] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                changes[path] = self.server.objects[value["oid"]]
            elif key in ("deletedFile", "deletedFolder"):
                gone = [name for name in self.repo.files(branch) if name == path or name.startswith(f"{path}/")]
                if not gone:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound", head)
                changes.update(dict.fromkeys(gone))
        sha = self.repo.commit(changes, branch)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.server.endpoint}/{self.repo.name}/commit/{sha}"}

    @route("GET", f"{PAGE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, revision, path):
        commit, file = self.repo.sha(revision), self.repo.files(revision).get(path)
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", commit)
        headers = {"ETag": f'"{file.listed["oid"]}"', "X-Repo-Commit": commit}
        if not file.large:
            return self.part(file.content, headers)
        self.server.objects[file.etag] = file.content
        linked = {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": len(file.content)}
        return 302, {**headers, **linked, "Location": f"{self.server.storage}/{file.etag}"}, b""

    @route("GET", "/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_download(self, oid):
        return self.part(self.server.objects[oid], {"ETag": f'"{oid}"'})

    def part(self, content, headers):
        """The bytes that a `Range` asks for, or all of them."""
        if not (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")):
            return 200, headers, content
        start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        return 206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"}, content[start : end + 1]

    def handle_request(self):
        url = urlsplit(self.path)
        self.query, self.body = parse_qs(url.query), self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.json = json.loads(self.body) if re.search("[/+]json", self.headers["Content-Type"] or "") else None
        try:
            with self.server.lock:
                status, headers, content = self.find_answer(url.path)
        except HubError as error:
            status, headers, content = error.answer
        self.send_response_only(status)  # logs nothing
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else content)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

    def find_answer(self, path):
        self.server.requests.append(f"{self.command} {path}")
        if self.headers["Authorization"] and self.headers["Host"].startswith("localhost"):
            raise HubError(400, "The user's token went to another host")
        for method, pattern, function in ROUTES:
            match = pattern.fullmatch(path)
            if match and method == self.command.replace("HEAD", "GET") and "create_pr" not in self.query:
                groups = {name: unquote(value) for name, value in match.groupdict().items() if value}
                if "name" in groups:
                    self.repo = self.server.repos.get((groups.pop("kind", "model"), groups.pop("name")))
                    if self.repo is None:
                        raise HubError(404, "Repository not found", "RepoNotFound")
                answer = function(self, **groups)
                return answer if isinstance(answer, tuple) else (200, {}, json.dumps(answer).encode())
        self.server.unanswered.append(self.server.requests[-1])
        raise HubError(404, "The local Hub has no such route")


class LocalHub(ThreadingHTTPServer):
    """`with LocalHub() as hub:` serves at `hub.endpoint` until the block ends. `requests` lists what was asked, and
    `unanswered` what no route knew (404), as `"METHOD /path"`. A test may change `repos[kind, name]`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.objects = {}, {}  # by kind and name; large files by sha256
        self.requests, self.unanswered, self.lock = [], [], threading.Lock()
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}/lfs"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def server_close(self):
        self.shutdown()
        super().server_close()
