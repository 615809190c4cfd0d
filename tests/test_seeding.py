import pytest

from d2c_ray.seeding import derive


def test_seeds_depend_on_every_part_its_type_and_its_borders() -> None:
    seeds = [derive(1, "a"), derive("1", "a"), derive(1, "b"), derive(1), derive("1a"), derive("a", 1), derive(2, "a")]
    assert len(set(seeds)) == len(seeds)
    assert derive(1, "a") == seeds[0]


def test_a_seed_never_changes_between_versions() -> None:
    """blake2b over each part's type, text and length: scores and resumed runs depend on it staying so."""
    assert derive(0, "score", "train.parquet#000000001") == 3323979754888497115


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError):
        derive(1.5)  # type: ignore[arg-type]
