"""Reading from the Hugging Face hub, against a server on loopback that speaks its protocol."""

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
import tiny_models as tiny
from fake_hub import COMMIT, OLD_COMMIT, PRIVATE, files_of, serve, use

from titok_jax import inference
from titok_jax.inference import loading
from titok_jax.weights import convert, model_files, pretrained
from titok_jax.weights.hub import DownloadError

PUBLIC = "yucornetto/tokenizer_titok_l32_imagenet"
GENERATOR = "yucornetto/generator_titok_l32_imagenet"
PAIR = "someone/pair"  # a generator with its tokenizer

# Each argument (JSON) is a step: what to load. The program prints the result of each.
CLIENT = """
import hashlib, json, sys
import huggingface_hub.constants
import numpy as np
from titok_jax.weights import convert
from titok_jax import inference
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 4096  # it writes 10 MB at a time, the files here are smaller
for step in sys.argv[1:]:
    step = json.loads(step)
    kind = step.pop("kind", "tokenizer")
    load = {"tokenizer": inference.load_tokenizer, "generator": inference.load_generator, "pair": inference.load_pair}[kind]
    try:
        if kind == "pair":
            print(json.dumps(["loaded", [model.config.__class__.__name__ for model in load(**step)]]))
            continue
        params = convert.flatten(load(**step).params)
        digest = hashlib.sha256(b"".join(np.asarray(params[path]).tobytes() for path in sorted(params))).hexdigest()
        print(json.dumps(["loaded", digest]))
    except (ValueError, OSError) as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("models")
    models = {"tokenizer": tiny.TOKENIZER, "vae": tiny.VAE, "generator": tiny.GENERATOR}
    saved = {name: tiny.save(tmp / name, config, tokenizer=None) for name, config in models.items()}
    return {**saved, "pair": tiny.save(tmp / "pair")}


@pytest.fixture
def hub(folders):
    tokenizer = files_of(folders["tokenizer"])
    repositories = {
        PUBLIC: {"main": (COMMIT, tokenizer), "v0": (OLD_COMMIT, files_of(folders["vae"]))},
        GENERATOR: {"main": (COMMIT, files_of(folders["generator"]))},
        PRIVATE: {"main": (COMMIT, files_of(folders["generator"]))},
        PAIR: {"main": (COMMIT, files_of(folders["pair"])), "v0": (OLD_COMMIT, files_of(folders["generator"]))},
        "someone/empty": {"main": (COMMIT, {"README.md": b"nothing"})},
    }
    with serve(repositories) as hub:
        yield hub


def run(url, home, *steps, **settings):
    """The result of each step, from a separate process, because the hub's address and cache are settings of a process."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "XDG_CACHE_HOME": str(home / "notes"),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    arguments = [sys.executable, "-c", CLIENT, *map(json.dumps, steps)]
    result = subprocess.run(arguments, capture_output=True, text=True, env={**environment, **settings}, timeout=900)
    assert result.returncode == 0, result.stderr
    return [tuple(json.loads(line)) for line in result.stdout.splitlines()]


def digest_of(source, load=inference.load_tokenizer):
    return digest(load(source))


def digest(model):
    params = convert.flatten(model.params)
    return hashlib.sha256(b"".join(np.asarray(params[path]).tobytes() for path in sorted(params))).hexdigest()


def test_download_and_what_the_hub_denies(hub, folders, tmp_path):
    public, private = f"hf://{PUBLIC}", f"hf://{PRIVATE}"
    results = run(
        hub.url,
        tmp_path,
        {"source": "titok_l32"},
        {"source": public, "revision": COMMIT},
        {"source": f"{public}@v0"},
        {"source": public, "revision": "v9"},
        {"source": private, "kind": "generator", "token": "bad"},
        {"source": private, "kind": "generator"},
        {"source": "hf://someone/nothing"},
        {"source": "hf://someone/empty"},
        {"source": f"{public}@v0", "revision": "main"},
        {"source": private, "kind": "generator", "token": "good"},  # last, because a cached file needs no token
    )
    assert [kind for kind, _ in results] == ["loaded"] * 3 + ["DownloadError"] * 5 + ["ValueError", "loaded"]
    tokenizer = digest_of(folders["tokenizer"])
    generator = digest_of(folders["generator"], inference.load_generator)
    loaded = [digest for kind, digest in results if kind == "loaded"]
    assert loaded == [tokenizer, tokenizer, digest_of(folders["vae"]), generator]
    for (_, message), pattern in zip(
        results[3:9],
        (
            rf"cannot download {public}/config.json: there is no revision 'v9' of it; give a branch",
            rf"cannot download {private}/config.json: the hub denies it \(status 401\).*HF_TOKEN",
            rf"cannot download {private}/config.json: the hub denies it \(status 401\).*HF_TOKEN",
            r"cannot download hf://someone/nothing/config.json: the hub denies it \(status 401\): the repository does not",
            r"cannot download hf://someone/empty/config.json: the repository does not hold this file",
            rf"revision 'main' given, but {public}@v0 names another",
        ),
        strict=True,
    ):
        assert re.match(pattern, message), message
    # A commit with two names is downloaded once.
    downloads = [path for method, path, _ in hub.requests if method == "GET" and path.startswith("/large/")]
    assert len(downloads) == len(set(downloads)) == 3


def test_a_broken_download_goes_on_and_the_cache_needs_no_network(hub, folders, tmp_path):
    hub.break_after = 5 * 4096
    step = {"source": "titok_l32"}
    assert run(hub.url, tmp_path, step) == [("loaded", digest_of(folders["tokenizer"]))]
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and path.startswith("/large/")]
    assert ranges == [None, "bytes=20480-"]

    # In another process, for a pair of which one model is in the cache.
    assert run(hub.url, tmp_path, {**step, "kind": "pair"}) == [("loaded", ["TiTokConfig", "GeneratorConfig"])]

    # Offline, and with a hub that cannot be reached.
    asked = len(hub.requests)
    results = run(hub.url, tmp_path, step, {"source": "titok_b64"}, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == asked
    assert results[0] == ("loaded", digest_of(folders["tokenizer"]))
    assert results[1][0] == "DownloadError"
    assert re.match(
        r"cannot download hf://\S+titok_b64\S+config.json: it is not in the cache \S+ and HF_HUB_OFFLINE", results[1][1]
    )
    closed = "http://127.0.0.1:9"
    assert run(closed, tmp_path, step) == results[:1]

    # The hub names a file by its checksum, so a change is noticed even if the changed file is valid.
    (weights,) = tmp_path.glob("hub/*tokenizer_titok_l32*/snapshots/*/model.safetensors")
    (config,) = tmp_path.glob("hub/*generator_titok_l32*/snapshots/*/config.json")
    data = weights.read_bytes()
    weights.resolve().write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert '"num_attention_heads": 2' in config.read_text()
    config.resolve().write_text(config.read_text().replace('"num_attention_heads": 2', '"num_attention_heads": 4'))
    results = run(hub.url, tmp_path, step, {**step, "kind": "generator"})
    for path, (kind, message) in zip((weights, config), results, strict=True):
        assert kind == "WeightsError"
        assert message == f"{path} is damaged: it is not what the hub sent; remove {path.resolve()} to download it again"


def test_a_hub_that_breaks_off_for_good_or_holds_a_damaged_file(hub, tmp_path):
    """A partial file is never taken for a complete one. A damaged file that downloads completely gives the usual error."""
    files = hub.repositories[PUBLIC]["main"][1]
    whole = files["model.safetensors"]
    digest = hashlib.sha256(whole).hexdigest()
    hub.truncated = digest
    ((kind, message),) = run(hub.url, tmp_path, {"source": "titok_l32"})
    assert (kind, message.split(": ")[0]) == ("DownloadError", f"cannot download hf://{PUBLIC}/model.safetensors")
    files["model.safetensors"] = whole[:-1]
    ((kind, message),) = run(hub.url, tmp_path, {"source": "titok_l32"})
    assert kind == "WeightsError"
    assert re.search(r"model.safetensors is not a whole safetensors file: it should have \d+ bytes, it has \d+", message)


@pytest.fixture
def cache(hub, tmp_path, monkeypatch):
    """This process reads from the fake hub into an empty cache, which is returned. No networks are made of what it reads."""
    for name in ("Tokenizer", "Generator"):
        monkeypatch.setattr(loading, name, lambda config, params, **_: types.SimpleNamespace(config=config, params=params))
    return use(hub, tmp_path, monkeypatch)


def fetched(hub):
    """The files of which a body was sent, by name; a large one by the name with which it was asked for."""
    names = {hashlib.sha256(data).hexdigest(): name for name, data in hub.repositories[PAIR]["main"][1].items()}
    paths = [p.removeprefix("/large/") for method, p, _ in hub.requests if method == "GET" and not p.startswith("/api/")]
    hub.requests.clear()
    return [names.get(path, path.partition("/resolve/")[2].partition("/")[2]) for path in paths]


def test_a_repository_of_a_generator_brings_its_tokenizer(hub, cache, folders, monkeypatch):
    source = f"hf://{PAIR}"
    assert inference.load_tokenizer_config(source) == tiny.TOKENIZER
    assert fetched(hub) == ["config.json", "tokenizer/config.json"]
    assert inference.pair_configs(source) == (tiny.TOKENIZER, tiny.GENERATOR)
    assert inference.load_image_config(source) == tiny.TOKENIZER
    assert fetched(hub) == []
    assert digest_of(source) == digest_of(folders["pair"])
    assert fetched(hub) == ["tokenizer/model.safetensors"]
    tokenizer, generator = inference.load_pair(source)
    assert fetched(hub) == ["model.safetensors"]
    expected = [digest(model) for model in inference.load_pair(folders["pair"])]
    assert [digest(tokenizer), digest(generator)] == expected
    names, revisions = model_files.pin_pair(source)
    assert names == (f"{source}@{COMMIT}",) * 2
    sums = pretrained.weights_sha256(*names, **revisions)
    files = hub.repositories[PAIR]["main"][1]
    assert list(sums.values()) == [
        hashlib.sha256(files[name]).hexdigest() for name in ("model.safetensors", "tokenizer/model.safetensors")
    ]

    # A generator alone, and a revision that the tokenizer cannot have.
    for load in (inference.load_pair, inference.load_tokenizer):
        with pytest.raises(FileNotFoundError, match=f"{source}@(v0|{OLD_COMMIT}) holds no sub-folder tokenizer: name the"):
            load(f"{source}@v0")
    assert inference.load_generator(source, revision="v0").config == tiny.GENERATOR
    assert inference.load_pair(source, f"hf://{PUBLIC}", revision="v0")[0].config == tiny.TOKENIZER
    with pytest.raises(ValueError, match="tokenizer revision 'v0' given, but the tokenizer is in the repository of its gen"):
        inference.load_pair(source, tokenizer_revision="v0")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert [digest(model) for model in inference.load_pair(source)] == expected
    assert not hub.requests


def test_the_name_of_a_pair_names_two_repositories(hub, cache):
    tokenizer, generator = inference.load_pair("titok_l32", revision=COMMIT)
    assert (tokenizer.config, generator.config) == (tiny.TOKENIZER, tiny.GENERATOR)
    commits = {"revision": COMMIT, "tokenizer_revision": OLD_COMMIT}
    assert model_files.pin_pair("titok_l32", tokenizer_revision="v0") == (("titok_l32", None), commits)
    assert model_files.pin_pair("titok_l32", **commits) == (("titok_l32", None), commits)
    with pytest.raises(ValueError, match="is a VAE"):  # v0 of the tokenizer is another model
        inference.load_pair("titok_l32", tokenizer_revision="v0")
    message = f"cannot download hf://{GENERATOR}/config.json: there is no revision 'v9' of it"
    with pytest.raises(DownloadError, match=message):
        inference.load_pair("titok_l32", revision="v9")


def test_files_of_a_load_are_of_one_commit(hub, cache, folders, tmp_path):
    """A push at any moment of a load: all files are those from before. The next load has all of the new ones."""
    params = tiny.params(tiny.TOKENIZER, 6), tiny.params(tiny.GENERATOR, 5)
    folder = pretrained.save(tmp_path / "new", tiny.GENERATOR, params[1], tokenizer=(tiny.TOKENIZER, params[0]))
    old, new = hub.repositories[PAIR]["main"][1], files_of(folder)
    before, after = ([digest(model) for model in inference.load_pair(path)] for path in (folders["pair"], folder))
    moments = (
        ("GET", "main", "config.json"),
        ("GET", "{}", "tokenizer/config.json"),
        ("HEAD", "{}", "model.safetensors"),
    )
    for number, (method, revision, file) in enumerate(moments):
        commits = f"{2 * number:040x}", f"{2 * number + 1:040x}"
        hub.repositories[PAIR] = {"main": (commits[0], old)}

        def push(commits=commits):
            hub.repositories[PAIR] = {"before": (commits[0], old), "main": (commits[1], new)}

        hub.pushes = {(method, f"/{PAIR}/resolve/{revision.format(commits[0])}/{file}"): push}
        shutil.rmtree(cache, ignore_errors=True)
        assert [digest(model) for model in inference.load_pair(f"hf://{PAIR}")] == before
        assert not hub.pushes
    assert [digest(model) for model in inference.load_pair(f"hf://{PAIR}")] == after


def hashed(monkeypatch):
    """A list that gets the name of each file that is hashed from now on."""
    files, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: files.append(file.name) or digest(file, name))
    return files


def test_an_intact_file_is_hashed_once(hub, cache, monkeypatch):
    files = hashed(monkeypatch)
    load = functools.partial(inference.load_tokenizer, "titok_l32")
    load()
    (weights,) = cache.glob("*/snapshots/*/model.safetensors")
    blob = weights.resolve()
    assert files == [str(blob)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: load(), range(8)))
    assert pretrained.weights_sha256(None, "titok_l32") == {"tokenizer": blob.name}
    assert len(files) == 1
    os.utime(blob, ns=(0, 1))
    load()
    load()
    assert len(files) == 2

    # Of two threads that hash a file at once, both write the note.
    os.utime(blob, ns=(0, 2))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: load(), range(8)))
    count = len(files)
    load()
    assert len(files) == count

    # A change is noticed, and a note of a file that has come back intact is written again.
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for _ in range(2):
        with pytest.raises(convert.WeightsError, match=f"{weights} is damaged: .*; remove {blob} to download it again"):
            load()
    # The cache may keep the file elsewhere, and have a link in its place.
    shared = cache / "shared"
    blob.rename(shared)
    blob.symlink_to(shared)
    with pytest.raises(convert.WeightsError, match=f"{weights} is damaged: .*; remove {shared} to download it again"):
        load()
    shared.unlink()
    load()
    assert blob.read_bytes() == data

    # Without a place for notes a file is hashed each time.
    (cache / "file").touch()
    for place in (str(cache / "file"), "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        files.clear()
        load()
        load()
        assert len(files) == 2


OUTSIDE = {"ETag": '"../../../outside"', "X-Linked-Etag": '"../../../outside"'}


@pytest.mark.parametrize(
    "forged", [OUTSIDE, {"ETag": "a" * 41, "X-Linked-Etag": "a" * 63}, {"X-Repo-Commit": "../../outside"}, {"ETag": '""'}]
)
def test_an_endpoint_does_not_choose_where_a_file_is_written(forged, hub, cache, tmp_path):
    before = set(tmp_path.rglob("*"))
    hub.headers = forged
    with pytest.raises(DownloadError, match=r"cannot download \S+/config.json: the endpoint names the (file|commit) '"):
        inference.load_tokenizer("titok_l32")
    assert set(tmp_path.rglob("*")) == before
    hub.headers = {}
    inference.load_tokenizer_config("titok_l32")
    if forged != {"ETag": '""'}:  # for a large file the other header counts
        hub.headers = forged
        before = set(tmp_path.rglob("*"))
        with pytest.raises(DownloadError, match=r"cannot download \S+/model.safetensors: the endpoint names the "):
            inference.load_tokenizer("titok_l32", revision=COMMIT)
        assert set(tmp_path.rglob("*")) == before
    hub.headers = {}
    inference.load_tokenizer("titok_l32")


def test_answers_to_a_new_session_are_checked_too(hub, cache, tmp_path, monkeypatch):
    """huggingface_hub opens a new session when a connection failed. What that was answered is not used."""
    download, calls = huggingface_hub.hf_hub_download, []

    def failing(*args, **kwargs):
        calls.append(args)
        if hub.headers or len(calls) % 2:
            huggingface_hub.close_session()
        return download(*args, **kwargs)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", failing)
    inference.load_tokenizer("titok_l32")
    assert len(calls) == 4
    shutil.rmtree(cache)
    hub.headers = OUTSIDE
    with pytest.raises(DownloadError, match=r"config.json: the connection was opened anew during the download; try again"):
        inference.load_tokenizer("titok_l32")
    assert len(calls) == 7
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("revision", ["", "../x", "a/../b", "/x", "x/", "-x", "a b", ".x"])
def test_a_revision_is_checked_however_it_is_given(revision, hub, cache):
    for source, options in ((f"hf://{PAIR}@{revision}", {}), (f"hf://{PAIR}", {"revision": revision})):
        with pytest.raises(ValueError, match=r"revision '\S*.*': expected the name of a branch, a tag or a commit"):
            inference.load_pair(source, **options)
    assert not hub.requests


def test_a_revision_may_be_a_path(hub, cache):
    hub.repositories[PAIR]["refs/pr/1"] = hub.repositories[PAIR]["main"]
    for source, options in ((f"hf://{PAIR}@refs/pr/1", {}), (f"hf://{PAIR}", {"revision": "refs/pr/1"})):
        assert inference.pair_configs(source, **options) == (tiny.TOKENIZER, tiny.GENERATOR)
