"""Offers the half of a local hub that takes models: repositories, large files and commits.

It is as strict as huggingface_hub's requests are exact: a field that is not known, a checksum that
is wrong, a large file that was never uploaded or a commit on top of another than the newest fails.
Source: huggingface_hub's hf_api.py, _commit_api.py and lfs.py; git-lfs's docs/api/batch.md.
"""

import base64
import hashlib
import json
import re
from collections import defaultdict

import yaml

LFS_TYPE = "application/vnd.git-lfs+json"
WRITER, READER = "hf_writer", "hf_reader"  # tokens; the first may write below OWNER
OWNER = "someone"
FRONT_MATTER = re.compile(r"\A---\n(.*?\n)---\n", flags=re.DOTALL)


class Uploads:
    """What a hub was sent. `refuses[path]` is the HTTP status that a path answers with."""

    def __init__(self):
        self.large: dict[str, bytes] = {}  # by sha256: uploaded, in no repository yet
        self.commits: dict[str, list[dict]] = defaultdict(list)  # headers, by repository
        self.created: dict[str, dict] = {}  # what each repository was asked for with
        self.refuses: dict[str, int] = {}
        self.calls: list[str] = []
        self.at_call = {}  # path -> called before it is answered

    def head(self, repo: str, otherwise: str) -> str:
        count = len(self.commits[repo])
        return hashlib.sha1(f"{repo} {count}".encode()).hexdigest() if count else otherwise


class Refused(Exception):
    """An HTTP status with the hub's code of the error."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


class UploadRequests:
    """Methods of a request handler; its `owner` has `uploads` and `files`."""

    def do_POST(self) -> None:
        self.answer_upload(self.post)

    def do_PUT(self) -> None:
        self.answer_upload(self.put)

    def answer_upload(self, method) -> None:
        body = self.read_body()
        uploads, path = self.owner.uploads, self.path.partition("?")[0]
        uploads.calls.append(f"{self.command} {path}")
        try:
            uploads.at_call.get(path, lambda: None)()
            if path in uploads.refuses:
                raise Refused(uploads.refuses[path], "refused")
            self.send_json(200, method(path.strip("/").split("/"), body))
        except Refused as refusal:
            self.send_json(refusal.status, {"error": str(refusal)}, code=refusal.code)

    def send_json(self, status: int, answer: dict, *, code: str = "") -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(data)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def check_writer(self, namespace: str) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (WRITER, READER):
            raise Refused(401, "Invalid credentials in Authorization header")
        if token != WRITER or namespace != OWNER:
            raise Refused(403, "You don't have the rights to write there")

    def post(self, words: list[str], body: bytes) -> dict:
        match words:
            case ["api", "repos", "create"]:
                return self.create_repo(json.loads(body))
            case ["api", "validate-yaml"]:
                return self.validate_yaml(json.loads(body))
            case ["api", "models", owner, name, "preupload", "main"]:
                return self.preupload(f"{owner}/{name}", json.loads(body))
            case ["api", "models", owner, name, "commit", "main"]:
                return self.commit(f"{owner}/{name}", body)
            case [owner, name, "info", "lfs", "objects", "batch"]:
                return self.lfs_batch(f"{owner}/{name.removesuffix('.git')}", json.loads(body))
            case ["lfs", "verify"]:
                asked = json.loads(body)
                assert len(self.owner.uploads.large[asked["oid"]]) == asked["size"]
                return {}
        raise Refused(404, "no such address")

    def create_repo(self, asked: dict) -> dict:
        assert asked.keys() <= {"name", "organization", "visibility", "type"}, asked
        repo = f"{asked['organization']}/{asked['name']}"
        self.check_writer(asked["organization"])
        if repo in self.owner.files:
            raise Refused(409, "You already created this model repo")
        self.owner.files[repo] = {".gitattributes": b"*.safetensors filter=lfs\n"}
        self.owner.uploads.created[repo] = asked
        return {"url": f"{self.owner.url}/{repo}"}

    def validate_yaml(self, asked: dict) -> dict:
        assert asked["repoType"] == "model"
        try:
            fields = yaml.safe_load(FRONT_MATTER.match(asked["content"])[1])
            assert isinstance(fields["license"], str) and isinstance(fields["library_name"], str)
        except (yaml.YAMLError, TypeError, KeyError, AssertionError) as error:
            raise Refused(400, f"invalid fields: {error!r}") from None
        return {"errors": [], "warnings": []}

    def existing(self, repo: str) -> dict[str, bytes]:
        if repo not in self.owner.files:
            raise Refused(404, "Repository not found", "RepoNotFound")
        self.check_writer(repo.partition("/")[0])
        return self.owner.files[repo]

    def preupload(self, repo: str, asked: dict) -> dict:
        self.existing(repo)
        answers = []
        for file in asked["files"]:
            assert file.keys() == {"path", "sample", "size"}
            assert len(base64.b64decode(file["sample"])) == min(file["size"], 512)
            mode = "lfs" if self.is_large(file["path"]) else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        return {"files": answers}

    def lfs_batch(self, repo: str, asked: dict) -> dict:
        self.existing(repo)
        assert self.headers["Accept"] == LFS_TYPE
        assert asked["operation"] == "upload" and asked["hash_algo"] == "sha256"
        assert "basic" in asked["transfers"] and asked["ref"] == {"name": "main"}
        href = self.owner.url
        actions = {"verify": {"href": f"{href}/lfs/verify"}}
        return {
            "transfer": "basic",
            "objects": [
                {"oid": one["oid"], "size": one["size"], "authenticated": True}
                | {"actions": actions | {"upload": {"href": f"{href}/lfs/{one['oid']}"}}}
                for one in asked["objects"]
            ],
        }

    def put(self, words: list[str], body: bytes) -> dict:
        _, oid = words
        assert hashlib.sha256(body).hexdigest() == oid
        self.owner.uploads.large[oid] = body
        return {}

    def commit(self, repo: str, body: bytes) -> dict:
        """Everything of it at once, or nothing."""
        files = dict(self.existing(repo))
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines.pop(0)
        assert header["key"] == "header" and header["value"]["summary"]
        uploads = self.owner.uploads
        parent = header["value"].get("parentCommit")
        if parent not in (None, uploads.head(repo, self.owner.first_commit)):
            raise Refused(412, "A commit has happened since")
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64" and not self.is_large(value["path"])
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile" and value["algo"] == "sha256"
                files[value["path"]] = uploads.large[value["oid"]]
                assert len(files[value["path"]]) == value["size"]
        self.owner.files[repo] = files
        uploads.commits[repo].append(header["value"])
        oid = uploads.head(repo, self.owner.first_commit)
        return {"commitOid": oid, "commitUrl": f"{self.owner.url}/{repo}/commit/{oid}"}
