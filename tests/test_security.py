"""What others provide is data: nothing of it is run, leaves its folder or takes all memory, and no credential is written down.

Beside it: headers of tars (test_tar), damaged images and bombs (test_decode), code in weights (test_teachers, test_published),
the Inception file (test_networks), archives that lie (test_reference_stats), names in exports and cards (test_artefact), whole
runs (test_security_run).
"""

import ast
import hashlib
import io
import json
import os
import shutil
import struct
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from PIL import EpsImagePlugin, Image
from test_manifest import LOCAL, picture, scan
from test_tar import pack, walked

from d2c_ray import config, tracking, wording
from d2c_ray.config import DataConfig, StorageConfig, TrackingConfig
from d2c_ray.data import at_hand, export, image_sets, manifest, reference_stats, samples, storage, tables, units, verify
from d2c_ray.data.decode import Undecodable, decode, decode_whole
from d2c_ray.errors import UserError
from d2c_ray.models import frozen, hub
from d2c_ray.report import gather, summary

# Calls that run what they read, or hand it to a shell, and where each stands and why it may.
ALLOWED = {
    ("d2c_ray/__init__.py", "importlib.import_module"): "names of its own table",
    ("d2c_ray/pipeline.py", "importlib.import_module"): "stages of its own table",
    ("d2c_ray/models/frozen.py", "importlib.import_module"): "packages of its own table",
    ("d2c_ray/models/networks.py", "torch.jit.load"): "clean-fid's file by its SHA-256, or one named on purpose as evaluate.inception",
    (
        "d2c_ray/models/hub.py",
        "transformers_class(class_name).from_pretrained with arguments of a variable",
    ): "the keywords of our own callers",
    ("d2c_ray/models/published.py", "torch.serialization.safe_globals"): "argparse.Namespace, which holds values and no code",
    ("d2c_ray/data/tables.py", "pyarrow.parquet.ParquetFile"): "opened(), which refuses extension types",
    ("d2c_ray/data/tables.py", "pyarrow.parquet.read_table"): "read(), which refuses extension types",
    (
        "d2c_ray/data/verify.py",
        "pyarrow.parquet.ParquetFile",
    ): "every column is of the type it should be, and of no extension type, or a fault",
    ("d2c_ray/rundir.py", "subprocess.run"): "git of its own checkout, no word of it from outside",
    ("d2c_ray/report/card.py", "autoescape=False"): "Markdown, where text() and code() escape what is not ours",
    ("d2c_ray/data/generated.py", "PIL.Image.open"): "PNGs that this run has just made",
    ("d2c_ray/tracking.py", "PIL.Image.open"): "a preview that this run has just made",
}
OF_BENCHMARKS = {
    "subprocess.run",
    "subprocess.Popen",
    "PIL.Image.open",
    "pyarrow.parquet.read_table",
}  # start themselves and read files of their own
SAFE = {  # of templates: made here by matplotlib, which escapes what it draws
    "histogram", "curves", "plot", "figures.budget", "figures.cost", "figures.strengths",
}  # fmt: skip
PICKLES = ("pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle")
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "importlib.import_module", "os.system", "os.popen", "tempfile.mktemp", "torch.jit.load", "torch.hub.load",
    "torch.package.PackageImporter", "torch.serialization.safe_globals", "torch.serialization.add_safe_globals", "yaml.load", "yaml.full_load",
    "yaml.unsafe_load", "yaml.load_all", "pyarrow.parquet.ParquetFile", "pyarrow.parquet.read_table", "pyarrow.parquet.ParquetDataset",
    "ray.data.read_parquet", "ray.tune.ExperimentAnalysis", "shutil.unpack_archive", "pandas.read_pickle", "ssl._create_unverified_context",
}  # fmt: skip
METHODS = {"extractall", "extract", "restore", "read_pickle"}  # of tarfile, zipfile, Tuner, whatever the object is called
BY_ARGUMENT = {"torch.load", "numpy.load", "PIL.Image.open"}  # what they are given decides
HARMLESS = {"allow_pickle": False, "trust_remote_code": False, "shell": False, "verify": True, "autoescape": True}
MODULES = {
    "os",
    "builtins",
    "importlib",
    "subprocess",
    "torch",
    "numpy",
    "yaml",
    "shutil",
}  # of which nothing is looked up by a name in a variable
USUAL = {"np": "numpy", "pd": "pandas", "pq": "pyarrow.parquet", "Image": "PIL.Image", "tune": "ray.tune"}


def imported(tree: ast.Module) -> dict[str, str]:
    """What the names that a file imports stand for, wherever in it that is."""
    found = dict(USUAL)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {
                alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0] for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def resolved(node: ast.expr, names: dict[str, str]) -> str:
    """The full dotted name of what an expression names; of `x().load`, what stands there."""
    first, dot, rest = ast.unparse(node).partition(".")
    return f"{names.get(first, first)}{dot}{rest}".removeprefix("builtins.")


def arguments(call: ast.Call) -> dict[str | None, object]:
    """Keyword arguments with their values, ... where a value is not written out; None where some are in a variable."""
    found: dict[str | None, object] = {}
    for keyword in call.keywords:
        if keyword.arg is None and isinstance(keyword.value, ast.Dict):
            pairs = zip(keyword.value.keys, keyword.value.values, strict=True)
            found |= {getattr(key, "value", None): getattr(value, "value", ...) for key, value in pairs}
        else:
            found[keyword.arg] = keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
    return found


def dangers(code: str) -> Iterator[str]:
    """The calls and imports of a source text that need a reason."""
    tree = ast.parse(code)
    names = imported(tree)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            modules += [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            yield from (name for name in modules if any(part in PICKLES for part in name.split(".")))
        elif isinstance(node, ast.Call):
            yield from _of_call(node, names)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in called:
            name = resolved(node, names)  # handed on, to be called elsewhere
            if name in (FORBIDDEN | BY_ARGUMENT) - {"compile"}:  # a field of ours is called that, too
                yield name


def _of_call(node: ast.Call, names: dict[str, str]) -> Iterator[str]:
    name, given = resolved(node.func, names), arguments(node)
    if name in FORBIDDEN or name.startswith(("subprocess.", "os.exec", "os.spawn")):
        yield name
    if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
        yield name
    if name == "torch.load" and given.get("weights_only") is not True:
        yield "torch.load without weights_only=True"
    if name == "PIL.Image.open" and "formats" not in given:
        yield name
    if name == "numpy.load" and len(node.args) > 2:
        yield "allow_pickle by its place"
    if None in given and (name in BY_ARGUMENT or name.endswith(".from_pretrained")):
        yield f"{name} with arguments of a variable"
    if name == "getattr" and resolved(node.args[0], names) in MODULES:
        wanted = f"{resolved(node.args[0], names)}.{getattr(node.args[1], 'value', '?')}".removeprefix("builtins.")
        if wanted.endswith("?") or wanted in FORBIDDEN | BY_ARGUMENT or wanted.startswith(("subprocess.", "os.exec", "os.spawn")):
            yield f"getattr of {wanted}"
    for argument, harmless in HARMLESS.items():
        if given.get(argument, harmless) != harmless:
            yield f"{argument}={given[argument]}"


def sources() -> list[Path]:
    return sorted(path for folder in ("d2c_ray", "jobs", "cluster") for path in (ROOT / folder).rglob("*.py"))


def test_nothing_that_is_read_is_run() -> None:
    found = {(path.relative_to(ROOT).as_posix(), danger) for path in sources() for danger in dangers(path.read_text())}
    found = {(path, danger) for path, danger in found if not (path.startswith("jobs/bench/") and danger in OF_BENCHMARKS)}
    assert len(sources()) > 100
    unknown = sorted(found - ALLOWED.keys())
    assert not unknown, f"{unknown}: take another way, or give the reason in ALLOWED"
    assert not sorted(key for key in ALLOWED.keys() - found if (ROOT / key[0]).is_file()), "reasons of what is not there any more"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from ray import cloudpickle", "import joblib", "eval(text)", "exec(text)", "__import__(name)", "importlib.import_module(name)",
        "torch.load(path)", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=safe)", "torch.jit.load(path)",
        "np.load(path, allow_pickle=True)", "yaml.load(text, Loader)", "archive.extractall(out)", "tune.Tuner.restore(path, work)",
        "subprocess.run(line, shell=True)", "os.system(line)", "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "pq.read_table(theirs)", "pq.ParquetFile(theirs)", "requests.get(url, verify=False)", "Image.open(path)", "Environment(autoescape=False)",
        # Under another name
        "from torch import load\nload(path)", "import torch as t\nt.load(path)", "from torch import jit as j\nj.load(path)", "f = eval\nf(text)", "map(exec, lines)",
        "from subprocess import run\nrun(line)", "import subprocess as sp\nsp.Popen(line)", "from os import system as s\ns(line)", "getattr(os, 'system')(line)",
        "from yaml import load\nload(text, Loader)", "from PIL.Image import open as o\no(path)", "from numpy import load\nload(path, allow_pickle=True)",
        "import builtins\nbuiltins.eval(text)", "from importlib import import_module as get\nget(name)", "read = torch.load\nread(path)", "getattr(os, name)(line)",
        "from pyarrow import parquet\nparquet.read_table(theirs)",
        # In another way
        "np.load(path, None, True)", "np.load(path, **more)", "AutoModel.from_pretrained(name, **{'trust_remote_code': True})", "subprocess.run(line, shell=flag)",
        "AutoModel.from_pretrained(name, **more)", "ray.tune.ExperimentAnalysis(path)",
    ],
)  # fmt: skip
def test_the_test_above_sees_it(code: str) -> None:
    assert list(dangers(code))


def test_pages_escape_all_but_figures() -> None:
    import re

    found = {name for path in (ROOT / "d2c_ray").rglob("*.jinja") for name in re.findall(r"\{\{\s*([\w.]+)\s*\|\s*safe", path.read_text())}
    assert found == SAFE


def test_figures_escape_what_they_draw_and_take_no_name_for_a_formula() -> None:
    from matplotlib import pyplot as plt

    from d2c_ray.report import plots

    with plt.rc_context(plots.STYLE):
        figure, axis = plt.subplots()
        axis.set_title(r"<script>alert(1)</script> $\frac{")
        axis.plot([1, 2], label="</svg><img src=x onerror=alert(1)>")
        axis.legend()
        drawn = plots._svg(figure)
    assert "<script" not in drawn
    assert "<img" not in drawn
    assert r"&lt;script&gt;alert(1)&lt;/script&gt; $\frac{" in drawn


# Values that Ray's extension types unpickle.


class Noted:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def pickled(values: list, depth: str) -> tuple[pa.Field, pa.Array]:
    """A column that says of itself that it is Ray's type of pickled objects: 'plain', or inside of a 'struct' as images of hubs are."""
    kind = {b"ARROW:extension:name": b"ray.data.arrow_pickled_object", b"ARROW:extension:metadata": b""}
    array = pa.array([pickle_of(value) for value in values], pa.large_binary())
    if depth == "plain":
        return pa.field("image", pa.large_binary(), metadata=kind), array
    fields = [pa.field("bytes", pa.large_binary(), metadata=kind), pa.field("path", pa.string())]
    return pa.field("image", pa.struct(fields)), pa.StructArray.from_arrays([array, pa.nulls(len(array), pa.string())], fields=fields)


def pickle_of(value: object) -> bytes:
    from pickle import dumps

    return dumps(value)


@pytest.fixture(params=[True, False], ids=["ray.data is imported", "ray.data is not"])
def known_to_arrow(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether Arrow knows Ray's type; where it does not, such a column looks like plain binary."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    if not request.param:
        pa.unregister_extension_type("ray.data.arrow_pickled_object")
    yield request.param
    if not request.param:
        pa.register_extension_type(ArrowPythonObjectType())


@pytest.mark.parametrize("depth", ["plain", "struct"])
def test_no_column_of_a_table_is_unpickled(tmp_path: Path, known_to_arrow: bool, depth: str) -> None:
    """Neither a column that is read nor one that comes after the manifest was made."""
    noted, path = tmp_path / "noted", tmp_path / "x.parquet"
    data = DataConfig(path=str(path), image_size=8)
    pq.write_table(pa.table({"image": [picture(1)], "label": [0]}), path)
    rows, _ = scan(data)
    field, images = pickled([Noted(noted)], depth)
    labels = pa.array([0])
    pq.write_table(pa.table([images, labels], schema=pa.schema([field, pa.field("label", pa.int64())])), path)
    manifest._last_group = None
    words = "column 'image' is of the extension type 'ray.data.arrow_pickled_object'"
    for read in (
        lambda: scan(data),
        lambda: units.decode_rows(rows, data, LOCAL),
        lambda: list(image_sets.find(path).items()),
        lambda: tables.read(path).to_pylist(),
        lambda: tables.opened(path, path).read().to_pylist(),
    ):
        with pytest.raises(UserError, match=f"{words}|no column 'image' of encoded images"):
            read()
    named = [pa.field("label", pa.large_binary(), metadata=field.metadata), pa.field("image.also", field.type, metadata=field.metadata)]
    for other in named if depth == "plain" else ():
        table = pa.table([pa.array([picture(1)]), images], schema=pa.schema([pa.field("image", pa.binary()), other]))
        pq.write_table(table, path)
        with pytest.raises(UserError, match=f"column '{other.name}' is of the extension type"):
            scan(DataConfig(path=str(path), label_column="label" if other.name == "label" else ""))
    assert not noted.exists()


def test_the_files_above_would_have_been_run(tmp_path: Path) -> None:
    import ray.data  # noqa: F401

    field, images = pickled([Noted(tmp_path / "noted")], "plain")
    pq.write_table(pa.table([images], schema=pa.schema([field])), tmp_path / "x.parquet")
    pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert (tmp_path / "noted").exists()


@pytest.mark.parametrize("nest", [pa.list_, lambda field: pa.map_(pa.string(), field), lambda field: pa.struct([field])])
def test_extension_types_are_found_however_deep_they_lie(nest: Callable[[pa.Field], pa.DataType]) -> None:
    inner = pa.field("item", pa.binary(), metadata={"ARROW:extension:name": ""})
    assert tables.extension(pa.field("x", nest(pa.field("y", pa.list_(inner))))) == ""
    assert tables.extension(pa.field("x", nest(pa.field("y", pa.dictionary(pa.int8(), pa.uuid()))))) == "arrow.uuid"
    assert tables.extension(pa.field("x", nest(pa.field("y", pa.list_(pa.binary()))))) is None


# Archives and names.


def header(**changed: bytes) -> bytes:
    """A ustar header of an empty file with fields written over, and its checksum."""
    block = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT))
    for name, (start, stop) in {"size": (124, 136), "kind": (156, 157)}.items():
        if name in changed:
            block[start:stop] = changed[name]
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header(size=b"-0000001000\0"), "gives no size"),
        (header(kind=b"x", size=b"00000000021\0") + padded(b"17 size=-1024000\n") + header(), "has the size '-1024000'"),
        (header(kind=b"x", size=b"77777777777\0") + bytes(1024), "a name takes 8,589,934,591 bytes"),
        (header(kind=b"L", size=b"77777777777\0") + bytes(1024), "a name takes 8,589,934,591 bytes"),
        (header(kind=b"g", size=b"77777777777\0") + bytes(1024), "a name takes 8,589,934,591 bytes"),
    ],
    ids=["octal with a sign", "pax with a sign", "pax", "long name", "global"],
)
def test_a_tar_neither_turns_the_walk_back_nor_says_how_much_is_read(content: bytes, words: str) -> None:
    with pytest.raises(UserError, match=words):
        walked(content + bytes(1024))


def test_a_pax_record_of_no_length_ends_the_records() -> None:
    assert walked(header(kind=b"x", size=b"00000000010\0") + padded(b"0 path=x") + header() + bytes(1024)) == [("a.jpg", 1536, 0)]


def test_labels_are_small(tmp_path: Path) -> None:
    """Counts, names and quotas are held for every label up to the largest."""
    for name, content, words in (
        ("a.cls", b"2000000000", "label 2000000000; numbers from 0 to 9,999,999"),
        ("a.json", b'{"label": 2000000000}', "label 2000000000"),
        ("a.json", b'{"label": ' + b"9" * 5000 + b"}", "is no JSON"),
        ("a.json", b"[" * 100_000, "is no JSON"),
        ("a.cls", b"1" * (2 << 20), "2,097,152 bytes; a label takes"),
    ):
        path = pack(tmp_path / "x.tar", [("a.jpg", picture(1)), (name, content)])
        with pytest.raises(UserError, match=words):
            scan(DataConfig(path=str(path)))
    table = pa.table({"image": [picture(1)], "label": pa.array([2**40])})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="label 1099511627776"):
        scan(DataConfig(path=str(tmp_path / "x.parquet")))


@pytest.mark.parametrize(
    "metadata", [{"huggingface": "["}, {"huggingface": "[1]"}, {"d2c": '{"classes": 5}'}, {"d2c": '{"classes": [{"a": 1}]}'}]
)
def test_class_names_of_a_schema_are_names(tmp_path: Path, metadata: dict[str, str]) -> None:
    table = pa.table({"image": [picture(1)], "label": [0]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="the class names in its metadata cannot be read"):
        scan(DataConfig(path=str(tmp_path / "x.parquet")))


HOSTILE = ["../../../escaped.jpg", "/etc/escaped.jpg", "..\\..\\escaped.jpg", "C:\\escaped.jpg", "x" * 5000 + ".jpg", "\x1b[2J.jpg"]


def test_members_of_a_tar_are_keys_and_never_paths(tmp_path: Path) -> None:
    path = pack(tmp_path / "in" / "w.tar", [(name, picture(index)) for index, name in enumerate(HOSTILE)])
    content = padded(picture(9))
    with_nul = header(kind=b"x", size=b"%011o\0" % 16) + padded(b"16 path=a\0b.jpg\n") + header(size=b"%011o\0" % len(picture(9))) + content
    path.write_bytes(with_nul + path.read_bytes())
    data = DataConfig(path=str(tmp_path / "in"), image_size=8)
    table, _ = scan(data)
    kept = [
        "a\0b.jpg",
        *(name for name in HOSTILE if not name.startswith("..\\")),
    ]  # that one starts with a dot: a hidden file, by WebDataset's rule
    assert {key.removeprefix("w.tar#") for key in table.column("key").to_pylist()} == set(kept)
    assert set(table.column("uri").to_pylist()) == {"w.tar"}
    decoded, rejected = units.decode_rows(table, data, LOCAL)
    assert len(decoded) == len(kept)
    assert not rejected
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "w.tar"]


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        archive.addfile(tarfile.TarInfo("tr\xe4umerei.jpg"))
    with pytest.raises(UserError, match="is no UTF-8"):
        scan(DataConfig(path=str(path)))


def test_class_folders_of_an_export_are_single_names() -> None:
    names = [
        "..",
        ".",
        "../..",
        "/etc",
        "..\\..\\x",
        "C:\\Windows",
        "a\0b",
        "x/../../y",
        "\n",
        "~",
        "-rf",
        "x" * 5000,
        "é" * 5000,
        "\u202egpj.exe",
    ]
    for place in export.folder_names(names):
        assert Path(place).name == place
        assert place not in (".", "..", "")
        assert not set(place) & set('<>:"/\\|?*\0\n')
        assert len(place.encode()) < 200


def test_what_a_key_holds_does_not_steer_the_terminal() -> None:
    assert wording.shown("\x1b]0;owned\x07\x9b2J\r\u202ex\nnext\té 🦩") == "\\x1b]0;owned\\x07\\x9b2J\\r\\u202ex\nnext\té 🦩"
    assert wording.shown("\udcff") == "\\udcff"


@pytest.mark.parametrize("name", ["[/b]", "[red]cat[/red]", "[link=http://evil]cat[/link]", "tench [fish]", "\x1b]0;owned\x07\x1b[2J"])
def test_names_of_classes_in_tables_are_text(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "name": name,
        "label": 0,
        "size": 1,
        "quota": 1,
        "shortfall": 0,
        **dict.fromkeys(("nominal_f", "deepest_rank", "score_min", "score_max")),
    }
    monkeypatch.setattr(gather, "selection_classes", lambda node, most: (1, [row]))
    summary.print_selection(None)
    told = capsys.readouterr().out
    assert wording.shown(name) in told
    assert "\x1b" not in told


def test_names_of_classes_in_a_models_card_are_text() -> None:
    from d2c_ray.models import export as models
    from d2c_ray.models.transformer import Transformer, TransformerSpec

    spec = TransformerSpec("sit", 8, 1, 2, 1, 32, 1, 2)
    names = ["<img src=x onerror=alert(1)>\n\n# Injected\n\n[log in](https://evil.example)", "cat"]
    card = models._card(
        SimpleNamespace(spec=spec, network=Transformer(spec), meta={"class_names": names, "labels": None, "images": 1}),
        "ema",
        False,
        False,
        False,
    )
    listed = card[card.index("## Classes") :]
    assert "\n# Injected" not in listed and "<img" not in listed.replace("\\<img", "") and "](" not in listed
    assert "1. cat" in listed


def test_no_cell_of_a_table_is_a_formula() -> None:
    out = io.StringIO()
    write = export._csv(out, "file_name", "sample_id", "name")
    write(("a/1.jpg", -1, "=cmd|'/c calc'!A0"))
    write(("@x", 2, "cat"))
    assert out.getvalue() == "file_name,sample_id,name\na/1.jpg,-1,'=cmd|'/c calc'!A0\n'@x,2,cat\n"


def test_only_the_hubs_own_cache_says_what_a_file_hashes_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    blob = tmp_path / "hub" / "models--a--b" / "blobs" / ("a" * 64)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"weights")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "other"))
    assert frozen.file_hash(link) == hashlib.sha256(b"weights").hexdigest()[:16]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert frozen.file_hash(link) == "a" * 16


def test_shards_of_weights_lie_beside_their_index(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "elsewhere.safetensors").write_bytes(b"x")
    for name in ("../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors")):
        (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(UserError, match="no file beside it"):
            hub._weights("vae.path", tmp_path / "model")


def test_the_folder_of_the_embedded_images_is_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert samples.digits_folder().is_dir()
    (root,) = tmp_path.iterdir()
    assert root.stat().st_mode & 0o777 == 0o700
    root.chmod(0o777)
    with pytest.raises(UserError, match="open to other users"):
        samples.digits_folder()
    root.rename(tmp_path / "moved")
    root.symlink_to(tmp_path / "moved")
    with pytest.raises(UserError, match="is a link"):
        samples.digits_folder()


# Bombs.


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def with_chunk(png: bytes, kind: bytes, content: bytes) -> bytes:
    """A PNG with a chunk behind its header."""
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return png[:33] + chunk + png[33:]


@pytest.mark.parametrize(("kind", "head"), [(b"iCCP", b"x\0\0"), (b"zTXt", b"x\0\0"), (b"iTXt", b"x\0\1\0\0\0")])
def test_chunks_of_a_png_do_not_unpack_without_end(kind: bytes, head: bytes) -> None:
    bomb = with_chunk(picture(7), kind, head + zlib.compress(bytes(64 << 20), 9))
    tracemalloc.start()
    with pytest.raises(Undecodable):
        decode(bomb, 8, 3, 10**6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "PNG"), ("I", "TIFF"), ("F", "TIFF")])
def test_images_of_more_than_8_bits_take_no_many_times_their_size(mode: str, kind: str) -> None:
    values = (np.arange(2000 * 1500).reshape(2000, 1500) % 65_536).astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
    out = io.BytesIO()
    Image.fromarray(values).save(out, kind)
    tracemalloc.start()
    pixels = decode_whole(out.getvalue(), 10**8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    whole = np.asarray(values, np.float64)  # all at once, as the definition says it
    top = 65_535.0 if mode.startswith("I") else float(whole.max())
    assert np.array_equal(pixels[..., 0], (np.clip(whole / top, 0.0, 1.0) * 255.0).round().astype(np.uint8))
    assert peak < 14 * values.size + (24 << 20)


def test_a_frame_larger_than_its_file_says_is_a_bomb() -> None:
    gif = bytearray(encoded(Image.new("P", (8, 8)), "GIF"))
    place = gif.index(b"\x2c")  # the image's own left, top, width, height
    gif[place + 5 : place + 9] = struct.pack("<HH", 60_000, 60_000)
    with pytest.raises(Undecodable, match=r"more than data\.max_pixels"):
        decode(bytes(gif), 8, 3, 10**6)


def test_no_format_is_read_that_runs_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL gives EPS to Ghostscript, here a program that notes that it ran."""
    ran = tmp_path / "ran"
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho ran > {ran}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with pytest.raises(OSError, match=r"."), Image.open(io.BytesIO(program)) as image:
        image.load()
    assert ran.is_file(), "PIL does not do that any more: then the list of formats is not needed for it"
    ran.unlink()
    with pytest.raises(Undecodable, match="no known image format"):
        decode(program, 8, 3, 10**6)
    assert not ran.exists()


def said_often(path: Path, value: bytes, times: int) -> None:
    """A Parquet file of a few bytes with one value in all its rows."""
    image = pa.DictionaryArray.from_arrays(pa.array(np.zeros(times, np.int32)), pa.array([value]))
    pq.write_table(pa.table({"image": image, "label": np.zeros(times, np.int64)}), path, compression="zstd", store_schema=False)


def test_a_table_that_unpacks_to_far_more_than_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_UNPACKED_BYTES", 16 << 20)
    monkeypatch.setattr(tables, "_AT_ONCE_BYTES", 16 << 20)
    path = tmp_path / "bomb.parquet"
    said_often(path, picture(3).ljust(2 << 20, b"\0"), 100_000)
    assert path.stat().st_size < 20_000
    before = pa.total_allocated_bytes()
    data = DataConfig(path=str(path), image_size=8)
    rows, _ = scan(data, 100_000)
    with pytest.raises(UserError, match=r"column 'image' of row group 0 holds .* that unpack to more than 16,777,216"):
        units.decode_rows(rows.slice(0, 4), data, LOCAL)
    found = image_sets.find(path)
    assert next(found.items())[2].startswith(b"\x89PNG")
    with pq.ParquetFile(path) as file:
        assert tables.rows_at_once(file, ["image"], 256) == 7
    assert pa.total_allocated_bytes() - before < 64 << 20
    whole = tmp_path / "pages.parquet"
    pq.write_table(pa.table({"image": [bytes(32 << 20)], "label": [0]}), whole, compression="zstd")
    rows, _ = scan(DataConfig(path=str(whole)))
    with pytest.raises(UserError, match="that unpack to more than"):
        units.decode_rows(rows, DataConfig(path=str(whole)), LOCAL)


def test_labels_that_are_none_are_not_read(tmp_path: Path) -> None:
    """They would unpack to 300 MiB before it is seen that they are text."""
    path = tmp_path / "x.parquet"
    label = pa.DictionaryArray.from_arrays(pa.array(np.zeros(300, np.int32)), pa.array([bytes(1 << 20)]))
    pq.write_table(pa.table({"image": [picture(1)] * 300, "label": label}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 2000
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(UserError, match="column 'label' is binary; integers from 0 would do"):
        scan(DataConfig(path=str(path)))
    assert pa.default_memory_pool().max_memory() - before < 16 << 20
    numbers = pa.DictionaryArray.from_arrays(pa.array([1, 0]), pa.array([7, 3]))
    pq.write_table(pa.table({"image": [picture(1)] * 2, "label": numbers}), path)
    assert scan(DataConfig(path=str(path)))[0].column("label").to_pylist() == [3, 7]


def test_what_is_too_large_for_an_image_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(picture(1))
    with (tmp_path / "cat" / "b.png").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    data = DataConfig(path=str(tmp_path), image_size=8)
    rows, _ = scan(data)
    decoded, rejected = units.decode_rows(rows, data, LOCAL)
    assert decoded.column("key").to_pylist() == ["cat/a.png"]
    assert [(row["key"], row["reason"].partition(":")[0]) for row in rejected] == [
        ("cat/b.png", "1,099,511,627,776 bytes, more than the 268,435,456 of an encoded image")
    ]
    monkeypatch.setattr(manifest, "_IMAGE_BYTES", 50)
    pq.write_table(pa.table({"image": [picture(1)], "label": [0]}), tmp_path / "x.parquet")
    data = DataConfig(path=str(tmp_path / "x.parquet"), image_size=8)
    ((reason,),) = [[row["reason"] for row in units.decode_rows(scan(data)[0], data, LOCAL)[1]]]
    assert "more than the 50 of an encoded image" in reason


def test_a_file_of_class_names_is_read_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_NAMES_BYTES", 4)
    pq.write_table(pa.table({"image": [picture(1)], "label": [0]}), tmp_path / "x.parquet")
    for data in (DataConfig(path=str(tmp_path)), DataConfig(path=str(tmp_path), classes=str(tmp_path / "classes.txt"))):
        (tmp_path / "classes.txt").write_text("cats")
        assert scan(data)[1] == ["cats"]
        (tmp_path / "classes.txt").write_text("horse")
        with pytest.raises(UserError, match="more than 4 bytes, which no class names take"):
            scan(data)


def test_more_rows_than_a_file_can_hold_are_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said_often(tmp_path / "x.parquet", b"x", 50_000)
    monkeypatch.setattr(manifest, "_SURE_ROWS", 10_000)
    with pytest.raises(UserError, match=r"says that it holds 50,000 images in [\d,]+ bytes"):
        scan(DataConfig(path=str(tmp_path / "x.parquet")))


def test_an_archive_that_unpacks_to_more_than_it_should_is_not_unpacked(tmp_path: Path) -> None:
    """Statistics of as many features as the network has, and images below the limit, are all that is read."""
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, shape in (("mu", (1 << 12,)), ("sigma", (1 << 12, 1 << 12)), ("arr_0", (1, 1 << 12, 1 << 13, 3))):
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "|u1" if name == "arr_0" else "<f8", "fortran_order": False, "shape": shape}
                )
                file.write(bytes(int(np.prod(shape)) * (1 if name == "arr_0" else 8)))
    assert (tmp_path / "x.npz").stat().st_size < 1 << 20
    tracemalloc.start()
    with pytest.raises(UserError, match="statistics of 4096 features"):
        reference_stats.read("evaluate.reference", tmp_path / "x.npz", 2048, "inception")
    with pytest.raises(UserError, match="8192 x 4096 pixels are more than --max-pixels"):
        list(image_sets.decoded(image_sets.find(tmp_path / "x.npz"), 0, 10**6, image_sets.Read()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize(
    "template",
    ["{name:>300000000}", "{name!r:>9}", "{first:9}", "{0}", "{name.__class__}", "{name[0]}", "{", "}", "{{name}", "{name}" * 500_000],
)
def test_a_strangers_prompt_takes_no_memory(template: str) -> None:
    tracemalloc.start()
    assert verify._prompt({"template": template}, "cat, tabby") is None
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    if len(template) < 100:
        with pytest.raises(UserError, match=r"the only fields, just so|so every class would get the same text"):
            config.load(None, ["attach.text.encoder=minilm", f"attach.text.template='{{name}} {template}'"])
    assert verify._prompt({"template": "{{a}} {name}: {first}"}, "cat, tabby") == "{a} cat, tabby: cat"


def test_a_strangers_sizes_take_no_memory() -> None:
    stated = {"encoder": "dinov2-b", "image_size": 5000, "storage": "int8", "precision": "fp32", "device_batch": 10**9}
    with pytest.raises(UserError, match="5,000 pixels a side; up to 2,048"):
        at_hand.vision(stated, 16)
    with pytest.raises(UserError, match="5,000 pixels a side; up to 2,048"):
        at_hand.vae({"data": {"image_size": 5000}, "vae": {"path": "x", "subfolder": "", "precision": "fp32", "device_batch": 8}})
    assert at_hand._device_batch(stated, 512) == 256
    assert at_hand._device_batch({"device_batch": 32}, 896) == 32


# Credentials.

MARK = "s3cr3t-m4rk"


@pytest.mark.parametrize(
    "field", ["storage.endpoint", "tracking.mlflow_uri", "data.path", "resources.checkpoint_storage", "teacher.checkpoint"]
)
def test_no_field_takes_a_password(field: str) -> None:
    with pytest.raises(UserError, match=f"{field} holds a user name or a password") as raised:
        config.load(None, [f"{field}=https://user:{MARK}@host:9000/x"])
    assert MARK not in str(raised.value)
    assert raised.value.__cause__ is None


def test_a_folder_may_be_called_as_a_password_would_look() -> None:
    assert config.load(None, ["data.path=/mnt/nas/images:v1@2024/train"]).data.path == "/mnt/nas/images:v1@2024/train"
    for value in (f"//user:{MARK}@host/x", f"/x://user:{MARK}@host", f"user:{MARK}@host/x", f"/x?token={MARK}"):
        with pytest.raises(UserError, match="Words of the form a:b@c count as such"):
            config.load(None, [f"data.path={value}"])


HIDDEN = {
    "http://user:M@127.0.0.1:1: refused": "http://***@127.0.0.1:1: refused", "https://M@host/x": "https://***@host/x", "user:M@host:9000": "***@host:9000",
    "http://user:p@M@host": "http://***@host", "http://user:M/x@host": "http://***@host", "a://b/?x=1&token=M&y=2": "a://b/?x=1&token=***&y=2",
    "x://y?X-Amz-Signature=M": "x://y?X-Amz-Signature=***", "/blob?sv=1&sig=M": "/blob?sv=1&sig=***", "{'Authorization': 'Basic M'}": "{'Authorization': 'Basic ***'}",
    "url: https:/u:M@h (Caused by ProxyError('https://u:M@h'))": "url: ***@h (Caused by ProxyError('https://***@h'))",
}  # fmt: skip


@pytest.mark.parametrize("text", HIDDEN)
def test_what_libraries_say_is_shown_without_credentials(text: str) -> None:
    assert wording.redacted(text.replace("M", MARK)) == HIDDEN[text]


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@2x.jpg",
        "/data/me@home/x",
        "a photo of {name}: 5@6",
        "tokens=16",
        "x@y.org",
        "pad_token='<pad>'",
        "design=3",
        "12:30:45 w.tar#x@2x",
    ],
)
def test_what_is_no_credential_is_shown_as_it_is(text: str) -> None:
    assert wording.redacted(text) == text


def test_hiding_takes_no_time_that_grows_with_the_square() -> None:
    for text in ("a:" * 100_000 + "@", "://" * 100_000 + "@", "token" * 60_000 + "=", "!" * 200_000 + ":@", "?" * 200_000 + "="):
        start = time.process_time()
        wording.redacted(text)
        assert time.process_time() - start < 10


def test_an_endpoint_of_the_environment_is_held_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{MARK}@127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    options = StorageConfig(region="us-east-1", attempts=1, timeout_sec=2.0)
    storage._client.cache_clear()
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL") as raised:
        storage.read_all("s3://pictures/x", options)
    assert MARK not in str(raised.value)
    storage._client.cache_clear()


def test_a_tracker_that_fails_says_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*given: object) -> None:
        raise ConnectionError(f"Max retries exceeded with url: http://user:{MARK}@127.0.0.1:1/api?token={MARK}")

    monkeypatch.setitem(tracking.TRACKERS, "mlflow", (refused, "mlflow"))
    tracking.Trackers(TrackingConfig(mlflow="x"), tmp_path, "name", "id", {})
    told = capsys.readouterr().err
    assert "tracking.mlflow failed" in told and "127.0.0.1:1" in told
    assert MARK not in told


PRIVATE = [
    ".env", ".env.local", "prod.env", ".netrc", ".git-credentials", ".pypirc", ".npmrc", ".ray/auth_token", ".aws/credentials", ".ssh/id_rsa", ".kube/config",
    ".docker/config.json", ".config/gcloud/application_default_credentials.json", ".huggingface/token", ".cache/huggingface/token", "id_rsa", "id_ed25519.pub",
    "deep/er/key.pem", "tls.key", "credentials.json", "secrets.yaml", ".s3cfg", ".boto", ".mlflow/credentials",
]  # fmt: skip


def test_what_is_private_in_a_folder_is_not_uploaded(tmp_path: Path) -> None:
    from d2c_ray.distributed import submit

    for name in (*PRIVATE, "my.yaml", "package/keys.py", "id_map.py", "config.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert sorted(submit.uploaded(tmp_path, [*submit.EXCLUDES])) == ["config.yaml", "id_map.py", "my.yaml", "package/keys.py"]
    shutil.copy(ROOT / ".rayignore", tmp_path)  # which `ray job submit` reads
    assert sorted(submit.uploaded(tmp_path, [])) == [".rayignore", "config.yaml", "id_map.py", "my.yaml", "package/keys.py"]
    assert tuple((ROOT / ".rayignore").read_text().splitlines()[1:]) == submit.EXCLUDES


def test_no_home_folder_is_uploaded_and_no_credential_sent_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from d2c_ray.distributed import submit

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.yaml").write_text(f"run: {{dir: {tmp_path / 'runs'}}}\n")
    for folder in (str(tmp_path), "/", "~"):
        with pytest.raises(UserError, match="what is private in it"):
            submit.prepare(str(tmp_path / "my.yaml"), [], "run", folder, [], [])
    with pytest.raises(UserError, match="--metadata holds") as raised:
        submit.prepare(str(tmp_path / "my.yaml"), [], "run", "/", [], [f"from=https://user:{MARK}@host"])
    assert MARK not in str(raised.value)
    for address, where in ((f"http://user:{MARK}@127.0.0.1:1", "--address holds"), ("", "as the environment gives it, holds")):
        monkeypatch.setenv("RAY_ADDRESS", f"http://user:{MARK}@127.0.0.1:1")
        with pytest.raises(UserError, match=where) as raised, submit._refused(address):
            pass
        assert MARK not in str(raised.value)


def test_a_proxy_that_does_not_answer_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, f"http://user:{MARK}@127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", MARK)
    options = StorageConfig(endpoint="http://bucket.invalid:9", region="us-east-1", attempts=1, timeout_sec=2.0)
    with pytest.raises(storage.StorageError, match="Proxy") as raised:
        storage.read_all("s3://pictures/x", options)
    seen: BaseException | None = raised.value
    while seen is not None:
        assert MARK not in str(seen)
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
