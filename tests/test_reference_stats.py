"""Files of reference statistics: what clean-fid and ADM write is read, and anything else is refused by name."""

import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from d2c_ray.data import reference_stats
from d2c_ray.errors import UserError
from d2c_ray.evaluate.frechet import EXACT, frechet_distance, statistics


@pytest.fixture
def features() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(60, 12)) @ rng.normal(size=(12, 12))


def read(path: Path, width: int = 12) -> object:
    return reference_stats.read("evaluate.reference", path, width, "inception")


def test_statistics_come_back_as_they_were(features: np.ndarray, tmp_path: Path) -> None:
    other = statistics(features[:40] * 1.5 + 1)
    for rows in (60, 7):  # also where the covariance has no full rank
        mine = statistics(features[:rows])
        reference_stats.write(tmp_path / "own.npz", mine)
        found = reference_stats.read("", tmp_path / "own.npz", 12, "")
        assert found.count == rows
        assert frechet_distance(other, found) == pytest.approx(frechet_distance(other, mine), rel=EXACT)  # what is promised of any distance
        assert reference_stats.content_hash(found) == reference_stats.content_hash(mine)
        assert frechet_distance(mine, found) == pytest.approx(0, abs=1e-6)


def test_published_layouts_are_read_and_hashed_by_their_statistics(features: np.ndarray, tmp_path: Path) -> None:
    mu, sigma = features.mean(0), np.cov(features, rowvar=False)
    np.savez_compressed(tmp_path / "clean_fid.npz", mu=mu, sigma=sigma)
    images = np.zeros((3, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "adm.npz", arr_0=images, mu=mu, sigma=sigma, mu_s=mu[:4], sigma_s=sigma[:4, :4])
    np.savez(tmp_path / "float32.npz", mu=mu.astype(np.float32), sigma=sigma.astype(np.float32))
    found = {path.stem: reference_stats.read("", path, 12, "") for path in tmp_path.iterdir()}
    assert found["adm"].count is None
    hashes = {name: reference_stats.content_hash(value) for name, value in found.items()}
    assert hashes["adm"] == hashes["clean_fid"] != hashes["float32"]
    assert {name: reference_stats.of_adm(tmp_path / f"{name}.npz") for name in found} == {"adm": True, "clean_fid": False, "float32": False}
    for value in found.values():
        assert frechet_distance(statistics(features), value) == pytest.approx(0, abs=1e-4)


def test_what_is_no_reference_is_refused_with_what_was_found(features: np.ndarray, tmp_path: Path) -> None:
    mu, sigma = features.mean(0), np.cov(features, rowvar=False)
    crooked, negative, broken = sigma.copy(), sigma.copy(), sigma.copy()
    crooked[0, 1] += 1
    negative[0, 0] = -1
    broken[2, 2] = np.nan
    for name, held, words in (
        ("images", {"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, "holds arr_0 and not both of mu and sigma"),
        ("narrow", {"mu": mu[:5], "sigma": sigma[:5, :5]}, "holds statistics of 5 features, and inception has 12"),
        ("shapes", {"mu": mu, "sigma": sigma[:5]}, "do not fit: W and W x W would"),
        ("crooked", {"mu": mu, "sigma": crooked}, "not symmetric"),
        ("negative", {"mu": mu, "sigma": negative}, "no covariance"),
        ("broken", {"mu": mu, "sigma": broken}, "not finite"),
        ("whole", {"mu": mu.astype(int), "sigma": sigma}, "mu is int64"),
        ("pickled", {"mu": np.array([{"a": 1}]), "sigma": sigma}, "mu is object"),
        ("counted", {"mu": mu, "sigma": sigma, "count": np.zeros(10**6)}, "count is float64 of 1000000"),
    ):
        path = tmp_path / f"{name}.npz"
        np.savez(path, **held)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=words) as refusal:
            read(path)
        assert str(refusal.value).startswith("evaluate.reference: ") and str(path) in str(refusal.value)
    with pytest.raises(UserError, match="there is no file"):
        read(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("mu and sigma")
    np.save(tmp_path / "array.npy", mu)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "narrow.npz").read_bytes()[:200])
    for name in ("text.npz", "array.npy", "cut.npz"):
        with pytest.raises(UserError, match="cannot be used as reference statistics"):
            read(tmp_path / name)


def test_damage_and_lies_are_refused_before_anything_is_allocated(features: np.ndarray, tmp_path: Path) -> None:
    def archive(name: str, sigma: bytes) -> Path:
        with zipfile.ZipFile(tmp_path / name, "w") as held:
            out = io.BytesIO()
            np.lib.format.write_array(out, features.mean(0))
            held.writestr("mu.npy", out.getvalue())
            held.writestr("sigma.npy", sigma)
        return tmp_path / name

    def header(shape: tuple[int, ...]) -> bytes:
        text = repr({"descr": "<f8", "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text

    good = tmp_path / "good.npz"
    np.savez(good, mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    content = bytearray(good.read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "crc.npz").write_bytes(content)
    for path, words in (
        (archive("huge.npz", header((12, 12)) + bytes(10)), "sigma says float64 of 12 x 12, 1,152 bytes, and the archive holds 10"),
        (archive("larger.npz", header((10**9, 10**9))), "and the archive holds 0"),
        (archive("negative.npz", header((-12, -12))), "which is none"),
        (tmp_path / "crc.npz", "Bad CRC-32"),
    ):
        with pytest.raises(UserError, match=words) as refusal:
            read(path)
        assert str(path) in str(refusal.value)
    tracemalloc.start()
    try:
        np.savez_compressed(tmp_path / "wide.npz", mu=np.zeros(3000), sigma=np.zeros((3000, 3000)))
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        with pytest.raises(UserError, match="holds statistics of 3000 features, and inception has 12"):
            read(tmp_path / "wide.npz")
        assert tracemalloc.get_traced_memory()[1] - before < 2e6, "its 72 MB stay where they are"
    finally:
        tracemalloc.stop()
