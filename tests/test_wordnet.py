"""Class names from WordNet ids: by WordNet itself, by a file of names by id, and what is refused."""

from pathlib import Path

import pytest
from test_manifest import LOCAL, parquet, picture, scan

from d2c_ray.config import DataConfig
from d2c_ray.data import manifest, wordnet
from d2c_ray.errors import UserError
from d2c_ray.models import teachers

NOTICE = "".join(f"  {number} This software and database is being provided to you\n" for number in range(1, 4))


def write_nouns(folder: Path, synsets: list[tuple[list[str], int, str]], kind: str = "n") -> list[str]:
    """data.noun of (words, number of the more general synset or -1, gloss), as wndb(5WN) has it; gives the ids."""
    folder.mkdir(parents=True, exist_ok=True)

    def lines(offsets: list[int]) -> list[str]:
        found = []
        for offset, (words, general, gloss) in zip(offsets, synsets, strict=True):
            own = " ".join(f"{word.replace(' ', '_')} 0" for word in words)
            # A part comes first, so that the more general synset is not just the first pointer.
            pointers = f"002 #p {offsets[0]:08d} n 0000 @ {offsets[general]:08d} n 0000" if general >= 0 else "000"
            found.append(f"{offset:08d} 05 {kind} {len(words):02x} {own} {pointers} | {gloss}  \n")
        return found

    offsets, start = [], len(NOTICE)
    for line in lines([0] * len(synsets)):
        offsets.append(start)
        start += len(line)
    (folder / "data.noun").write_bytes((NOTICE + "".join(lines(offsets))).encode())
    return [f"n{offset:08d}" for offset in offsets]


SYNSETS = [
    (["entity"], -1, "that which is perceived"),
    (["wading bird", "wader"], 0, "long-legged birds"),
    (["lifting device"], 0, "a device | for lifting"),
    (["tench", "Tinca tinca"], 0, "freshwater dace-like game fish"),
    (["crane"], 1, "large long-necked wading bird"),
    (["crane"], 2, "lifts and moves heavy objects"),
    ([f"word {number}" for number in range(17)], 0, "more words than a decimal digit pair would say alike"),
]


@pytest.fixture
def nouns(tmp_path: Path) -> tuple[Path, list[str]]:
    """A folder with data.noun of our own, and its ids."""
    return tmp_path / "wordnet", write_nouns(tmp_path / "wordnet", SYNSETS)


@pytest.fixture
def real() -> Path:
    found = Path("/usr/share/wordnet/data.noun")
    if not found.is_file():
        pytest.skip(f"WordNet 3.0 is not at {found}")
    return found


def folders(root: Path, names: list[str]) -> DataConfig:
    for value, name in enumerate(names):
        (root / name).mkdir(parents=True)
        (root / name / "a.png").write_bytes(picture(value))
    return DataConfig(path=str(root), image_size=8)


def named(data: DataConfig, classes: Path | str) -> list[str]:
    return scan(DataConfig(path=data.path, image_size=8, classes=str(classes)))[1]


def of(data: DataConfig, classes: Path | str) -> str:
    data = DataConfig(path=data.path, image_size=8, classes=str(classes))
    return manifest.fingerprint(manifest.find(data, LOCAL), data, LOCAL)


def test_ids_become_the_words_of_the_real_wordnet(real: Path) -> None:
    """As every list of ImageNet's classes has them."""
    ids = ["n01440764", "n01484850", "n02119789", "n03710637", "n03710721", "n15075141"]
    assert wordnet.translate([*ids, "sock", ""], real) == [
        "tench, Tinca tinca", "great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias",
        "kit fox, Vulpes macrotis", "maillot", "maillot, tank suit", "toilet tissue, toilet paper, bathroom tissue", "sock", "",
    ]  # fmt: skip
    assert wordnet.translate(["n02012849"], real) == ["crane"]
    assert wordnet.translate(["n02012849", "n03126707"], real) == ["crane, wading bird, wader", "crane, lifting device"]


def test_class_folders_that_are_ids(nouns: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, ids = nouns
    data = folders(tmp_path / "images", [ids[3], ids[4], ids[5], ids[6], "own_class"])
    wanted = [
        "tench, Tinca tinca", "crane, wading bird, wader", "crane, lifting device", ", ".join(f"word {n}" for n in range(17)), "own_class",
    ]  # fmt: skip
    assert named(data, "") == [ids[3], ids[4], ids[5], ids[6], "own_class"]
    assert named(data, where) == wanted
    for name, value in (("WNSEARCHDIR", where), ("WNHOME", where.parent)):
        monkeypatch.setenv(name, str(value))
        if name == "WNHOME":
            where.rename(where.parent / "dict")
        assert named(data, "wordnet") == wanted
        monkeypatch.delenv(name)


def test_names_from_parquet_and_a_file_beside_archives(nouns: tuple[Path, list[str]], tmp_path: Path) -> None:
    where, ids = nouns
    (tmp_path / "data").mkdir()
    hub = {"huggingface": f'{{"info": {{"features": {{"label": {{"names": ["{ids[5]}", "{ids[3]}"]}}}}}}}}'}
    parquet(tmp_path / "data" / "a.parquet", [0, 1], metadata=hub)
    data = DataConfig(path=str(tmp_path / "data"))
    assert named(data, "") == [ids[5], ids[3]]
    assert named(data, where) == ["crane", "tench, Tinca tinca"]
    (tmp_path / "data" / "classes.txt").write_text(f"{ids[3]}\nsock\n")
    assert named(data, where) == ["tench, Tinca tinca", "sock"]
    (tmp_path / "data" / "classes.txt").write_text(f"{ids[3]}\n")
    with pytest.raises(UserError, match=r"classes\.txt' names 1 classes; the labels go up to 1"):
        named(data, where)


def test_a_file_of_names_by_id(tmp_path: Path) -> None:
    data = folders(tmp_path / "images", ["n01440764", "n02012849", "n03126707", "other"])
    path = tmp_path / "mapping.txt"
    lines = ["n03126707\tcrane", "n01440764 tench, Tinca tinca", "n02012849 crane", "n09999999 not in the data", ""]
    path.write_text("\n".join(lines))
    assert named(data, path) == ["tench, Tinca tinca", "crane, n02012849", "crane, n03126707", "other"]
    path.write_text("\n".join(lines[1:]))
    with pytest.raises(UserError, match=r"mapping\.txt' lacks 1 of the data's WordNet ids, the first n03126707"):
        named(data, path)
    path.write_text("\n".join([*lines[:3], lines[1]]))
    with pytest.raises(UserError, match="the id n01440764 comes twice"):
        named(data, path)
    path.write_text("\n".join([*lines[:3], "no id here"]))  # then it is a list by label
    assert named(data, path) == [line.strip() for line in [*lines[:3], "no id here"]]
    # Labels without names of their own: line i is label i, and the id is no part of the name.
    (tmp_path / "numbers").mkdir()
    parquet(tmp_path / "numbers" / "a.parquet", [0, 1, 2])
    path.write_text("n03126707 crane\n\nn01440764\ttench, Tinca tinca\nn02012849 crane\n")
    assert named(DataConfig(path=str(tmp_path / "numbers")), path) == ["crane, n03126707", "", "tench, Tinca tinca"]


def test_the_fingerprint_follows_the_names(nouns: tuple[Path, list[str]], tmp_path: Path) -> None:
    where, ids = nouns
    data = folders(tmp_path / "images", [ids[3], ids[4]])
    plain, translated = of(data, ""), of(data, where)
    assert plain != translated
    moved = where.rename(tmp_path / "moved")
    assert of(data, moved) == translated, "where WordNet lies does not matter"
    write_nouns(moved, [(["carp"], -1, "x"), *SYNSETS[1:]])
    assert of(data, moved) not in (plain, translated)


def test_what_cannot_be_translated_is_refused(nouns: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, ids = nouns
    data = folders(tmp_path / "images", [ids[3]])
    (tmp_path / "empty").mkdir()
    for classes in (tmp_path / "empty", "wordnet"):
        monkeypatch.setattr(wordnet, "USUAL", (str(tmp_path / "empty"),))
        for call in (of, named):
            with pytest.raises(
                UserError, match=r"there is no data\.noun in .*empty\. WordNet 3\.0 is .*wordnet-base.*WNSEARCHDIR would do"
            ):
                call(data, classes)
    nowhere = f"n{int(ids[3][1:]) + 1:08d}"
    for name in (nowhere, "n99999999"):
        with pytest.raises(UserError, match=f"has no synset at {name}, so it is of another version .* WordNet 3.0"):
            wordnet.translate([name], where / "data.noun")
    with pytest.raises(UserError, match="'v00001740' is no noun"):
        wordnet.translate(["v00001740"], where / "data.noun")
    (verb,) = write_nouns(tmp_path / "verbs", [(["breathe"], -1, "draw air")], kind="v")
    with pytest.raises(UserError, match=f"{verb} is no noun in"):
        wordnet.translate([verb], tmp_path / "verbs" / "data.noun")


def test_another_version_of_wordnet_is_refused(real: Path, tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_bytes(b"  0 a line that moves all others\n" + real.read_bytes()[: 2 << 20])
    with pytest.raises(UserError, match="of another version"):
        wordnet.translate(["n01440764"], tmp_path / "data.noun")


def test_a_teacher_knows_translated_names(real: Path) -> None:
    """A pretrained DiT's labels are synonym lists, two of them 'crane'."""
    ids = ["n01440764", "n02012849", "n03126707", "n03710637", "n03710721"]
    theirs = ["tench, Tinca tinca", "crane", "crane", "maillot", "maillot, tank suit"]
    known = teachers.Facts("dit", 4, 8, 5, theirs, "diffusers", {})
    names = wordnet.translate(ids, real)
    assert len(set(names)) == 5
    assert teachers.class_map(names, [1] * 5, known) == [0, 1, 2, 3, 4]
    assert teachers.class_map([names[4], names[0], names[3]], [1] * 3, known) == [4, 0, 3]
    with pytest.raises(UserError, match=r"'crane, wading bird, wader' is several of them \(1, 2\).*teacher\.classes takes a text file"):
        teachers.class_map(names[:2], [1] * 2, known)
