"""`download` against a server in this process that plays the hub: which files it asks for, how it goes on after a break, and what it says."""

import hashlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from llama_jax import cli
from llama_jax.conversion.convert import locate
from llama_jax.conversion.download import RemoteFile, download, find_files
from llama_jax.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ID = "someone/tiny-llama"
ASSETS = ["config.json", "generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model"]
ASSETS += ["tokenizer_config.json"]
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)] + ["model.safetensors.index.json"]
BINS = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)] + ["pytorch_model.bin.index.json"]
META = ["consolidated.00.pth", "consolidated.01.pth", "params.json"]
UNWANTED = [
    "README.md",
    "model.gguf",
    "original/consolidated.00.pth",
    "sub/config.json",
    "tf_model.h5",
    "USE_POLICY.md",
]


class Hub(ThreadingHTTPServer):
    """Serves one repository; its attributes say how it misbehaves."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.tokens: set[str | None] = set()
        self.cut: dict[str, int] = {}  # how often a file's answer breaks off half-way
        self.refusal: tuple[int, str] | None = None  # status and X-Error-Code of every file
        self.announced: dict[str, int] = {}  # sizes that the listing gets wrong

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> Counter:
        return Counter(
            path.rpartition(f"{COMMIT}/")[2]
            for method, path, _ in self.asked
            if method == "GET" and "/resolve/" in path
        )


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server
        path = self.path.partition("?")[0]
        hub.asked.append((self.command, path, self.headers.get("Range")))
        hub.tokens.add(self.headers.get("Authorization"))
        if path in (f"/api/models/{ID}/revision/main", f"/api/models/{ID}/revision/{COMMIT}", f"/api/models/{ID}"):
            siblings = [{"rfilename": name, **self.facts(name)} for name in hub.files]
            self.answer_json({"id": ID, "sha": COMMIT, "siblings": siblings})
        elif path == f"/api/models/{ID}/tree/{COMMIT}":
            self.answer_json(
                [{"type": "file", "path": name, "oid": "0" * 40, **self.facts(name)} for name in hub.files]
            )
        elif match := re.fullmatch(f"/{ID}/resolve/{COMMIT}/(.+)", path):
            self.answer_file(match[1])
        elif path.startswith(f"/api/models/{ID}/"):
            self.answer(404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
        else:
            self.answer(401, {"X-Error-Code": "RepoNotFound"}, b"{}")

    def facts(self, name: str) -> dict:
        return {"size": self.server.announced.get(name, len(self.server.files[name]))}

    def answer_json(self, value) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def answer_file(self, name: str) -> None:
        hub = self.server
        if hub.refusal:
            status, code = hub.refusal
            self.answer(status, {"X-Error-Code": code} if code else {}, b"")
            return
        body = hub.files[name]
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        break_off = self.command == "GET" and hub.cut.get(name, 0) > 0
        if break_off:
            hub.cut[name] -= 1
        self.answer(206 if start else 200, headers, body[start:], (len(body) - start) // 2 if break_off else None)

    def answer(self, status: int, headers: dict, body: bytes, send: int | None = None) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:send])
        self.close_connection = send is not None


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.chdir(tmp_path)
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fill(hub: Hub, *groups: list[str]) -> None:
    hub.files = {name: f"this is {name}. ".encode() * 2000 for group in groups for name in group}


@pytest.mark.parametrize(
    ("groups", "weights"),
    [
        ([SHARDS, BINS, META[:2]], SHARDS),
        ([["model.safetensors"], BINS], ["model.safetensors"]),
        ([SHARDS, ["model.safetensors"]], SHARDS),
        ([["model.safetensors.index.json"], BINS], BINS),
        ([BINS, META[:2]], BINS),
        ([["pytorch_model.bin"], META[:2]], ["pytorch_model.bin"]),
        ([META], META),
    ],
)
def test_one_form_of_the_weights_and_nothing_unwanted(hub, groups, weights):
    fill(hub, ASSETS, UNWANTED, *groups)
    found = find_files(ID, endpoint=hub.url)
    expected = sorted([*ASSETS, *weights])
    assert found.files == tuple(RemoteFile(name, len(hub.files[name])) for name in expected)
    assert found.commit == COMMIT and hub.fetched() == {}
    assert found.nbytes == sum(len(hub.files[name]) for name in expected)


def test_files_arrive_and_nothing_else_is_asked_for(hub, tmp_path):
    fill(hub, ASSETS, SHARDS, BINS, UNWANTED)
    folder = download(ID, endpoint=hub.url)
    assert folder.resolve() == tmp_path / "tiny-llama"
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == {
        name: hub.files[name] for name in [*ASSETS, *SHARDS]
    }
    assert hub.fetched() == dict.fromkeys([*ASSETS, *SHARDS], 1)
    assert hub.tokens == {"Bearer hf_secret"}
    download(ID, endpoint=hub.url)
    assert hub.fetched() == dict.fromkeys([*ASSETS, *SHARDS], 1)  # what is there is not fetched again


def test_a_broken_answer_goes_on_where_it_broke(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # less than a chunk would not be kept
    fill(hub, ["config.json", "model.safetensors"])
    hub.cut = {"model.safetensors": 1}
    folder = download(ID, tmp_path / "here", endpoint=hub.url)
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    ranges = [range for method, path, range in hub.asked if method == "GET" and path.endswith("model.safetensors")]
    assert ranges == [None, "bytes=27000-"] and len(hub.files["model.safetensors"]) == 54_000


def test_a_second_run_fetches_what_the_first_did_not(hub, tmp_path):
    fill(hub, ASSETS, ["model.safetensors"])
    download(ID, tmp_path / "here", endpoint=hub.url)
    (tmp_path / "here" / "model.safetensors").unlink()
    download(ID, tmp_path / "here", endpoint=hub.url)
    assert hub.fetched() == dict.fromkeys(ASSETS, 1) | {"model.safetensors": 2}


def refused(why: str, hub: Hub, repo_id: str = ID, **options) -> str:
    with pytest.raises(UserError, match=why) as error:
        download(repo_id, endpoint=hub.url, **options)
    return str(error.value)


def test_a_gated_repository_names_its_licence(hub):
    fill(hub, ["config.json", "model.safetensors"])
    hub.refusal = 403, "GatedRepo"
    message = refused("gated", hub)
    assert f"{hub.url}/{ID}" in message and "hf auth login" in message and "HF_TOKEN" in message


@pytest.mark.parametrize("status", [401, 403])
def test_a_bad_token_is_named(hub, status):
    fill(hub, ["config.json", "model.safetensors"])
    hub.refusal = status, ""
    assert "hf auth login" in refused(f"answered {status} for {ID}", hub)


def test_unknown_ids_and_revisions(hub):
    fill(hub, ["config.json", "model.safetensors"])
    assert "check the id" in refused("shows no repository someone/else", hub, "someone/else")
    refused("is no id on the hub", hub, "a/b/c")
    refused("has no revision 'v9'", hub, revision="v9")


def test_no_network(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="cannot reach http://127.0.0.1:9 for someone/tiny-llama.*check the connection"):
        download(ID, tmp_path / "x", endpoint="http://127.0.0.1:9")
    assert not (tmp_path / "x").exists()


def test_no_weights_are_told_apart_from_other_weights(hub):
    fill(hub, ["config.json", "model.gguf"])
    refused("holds no model.*safetensors.*but model.gguf", hub)
    fill(hub, ["config.json"])
    refused("no weights at all", hub)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.bin", "a/../../tokenizer.json", "..\\config.json"]
)
def test_a_name_that_climbs_out_is_refused(hub, tmp_path, name):
    fill(hub, ["config.json", "model.safetensors", name])
    refused("outside of the folder", hub)
    assert not list(tmp_path.iterdir()) and hub.fetched() == {}


def test_a_wrong_size_is_noticed(hub, tmp_path):
    fill(hub, ["config.json", "model.safetensors"])
    hub.announced = {"model.safetensors": 10**6}
    refused("model.safetensors has 54000 bytes, and the hub's has 1000000", hub)


def test_other_weights_in_the_folder_are_not_mixed_in(hub, tmp_path):
    fill(hub, ["config.json", "model.safetensors"])
    (tmp_path / "tiny-llama").mkdir()
    (tmp_path / "tiny-llama" / "pytorch_model.bin").write_bytes(b"of another model")
    assert "--out" in refused("holds other weights, pytorch_model.bin", hub)
    (tmp_path / "file").write_bytes(b"")
    refused("file is a file", hub, out=tmp_path / "file")
    assert hub.fetched() == {}


def test_a_full_disk_stays_what_it_is(hub, monkeypatch):
    """The command line explains it."""
    fill(hub, ["config.json", "model.safetensors"])
    full = OSError(28, "No space left on device")

    def fail(*_, **__):
        raise full

    monkeypatch.setattr("llama_jax.conversion.download.snapshot_download", fail)
    with pytest.raises(OSError) as error:
        download(ID, endpoint=hub.url)
    assert error.value is full


def test_the_verb(hub, tmp_path, capsys, monkeypatch):
    # HF_ENDPOINT is read when the library is imported.
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    fill(hub, ["config.json", "model.safetensors"])
    files = [{"name": name, "bytes": len(hub.files[name])} for name in ("config.json", "model.safetensors")]
    total = sum(file["bytes"] for file in files)
    assert cli.main(["download", ID, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "0.1 MB  model.safetensors" in out and "would fetch: 2 files, 0.1 MB" in out
    assert cli.main(["download", ID, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": None, "commit": COMMIT, "bytes": total, "files": files}
    assert not list(tmp_path.iterdir()) and hub.fetched() == {}
    assert cli.main(["download", ID, "--out", "here", "--revision", COMMIT, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == "here"
    assert (tmp_path / "here" / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert cli.main(["download", "someone/else"]) == 2
    assert "shows no repository someone/else" in capsys.readouterr().err


def test_a_checkpoint_may_be_named_by_its_id(monkeypatch, tmp_path):
    """`hub:ID` stands for the folder that the download gives; a plain path never asks the hub."""
    asked = []
    monkeypatch.setattr("llama_jax.conversion.download.download", lambda repo_id: asked.append(repo_id) or tmp_path)
    assert locate("hub:org/name") == tmp_path and asked == ["org/name"]
    assert locate("org/name") == Path("org/name") and asked == ["org/name"]
