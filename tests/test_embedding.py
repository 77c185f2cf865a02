"""`clip-jax embed`: files in clip-retrieval's layout, continued after an interruption, shared by processes."""

import json

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import clip_jax
from clip_jax import data, embedding, inference
from clip_jax.config import DataConfig
from clip_jax.embedding import Summary, embed
from tests import commands, tiny_models

NAMES = ["a.png", "b.jpg", "below/c.webp", "below/it/d.png", "e.png", "f.bmp"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny_models.write_edgenet(tmp_path_factory.mktemp("weights") / "tiny.msgpack")


@pytest.fixture(scope="module")
def model(weights):
    return clip_jax.load(weights, truncate=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of six images, and one that is damaged."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "below/it").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in NAMES:
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / name)
    (folder / "bad.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "a.txt").write_text("a red car")  # no image
    return folder


@pytest.fixture(scope="module")
def source(images):
    return data.open_images(DataConfig(files=str(images)))


def arrays(folder, kind="img_emb"):
    return {path.name: np.load(path) for path in sorted((folder / kind).iterdir())}


def rows(folder, kind="metadata"):
    return [row for path in sorted((folder / kind).iterdir()) for row in pq.read_table(path).to_pylist()]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_folder_has_the_embeddings_of_its_images(model, images, source, tmp_path, dtype):
    assert embed(model, source, tmp_path, dtype=dtype) == Summary(embedded=6, unreadable=1)
    ((name, found),) = arrays(tmp_path).items()
    listed = [row["image_path"] for row in rows(tmp_path)]
    assert name == "img_emb_0.npy" and sorted(listed) == sorted(NAMES) and found.dtype == dtype
    expected = model.encode_image([images / name for name in listed])
    np.testing.assert_allclose(found, expected, atol=1e-6 if dtype == "float32" else 2**-11)  # half an ulp below 1
    (bad,) = rows(tmp_path, "unreadable")
    assert bad["image_path"] == "bad.png" and "truncated" in bad["reason"]


def test_captions_of_training_data_are_embedded(model, tmp_path):
    config = data.SOURCES["tfrecord"].tiny_config(tmp_path)
    source = data.open_images(config)
    embed(model, source, tmp_path / "out", dtype="float32", part_size=25)
    assert [*arrays(tmp_path / "out", "text_emb")] == [f"text_emb_{part}.npy" for part in range(3)]
    found = np.concatenate([*arrays(tmp_path / "out", "text_emb").values()])
    records = [source.read(example) for example in range(len(source))]
    captions = [next(iter(record.captions.values()))[0] for record in records]
    np.testing.assert_allclose(found, model.encode_text(captions), atol=1e-6)
    assert [row["caption"] for row in rows(tmp_path / "out")] == captions
    assert [row["image_path"] for row in rows(tmp_path / "out")] == [source.key(i) for i in range(len(source))]


def test_images_of_a_folder_need_no_captions(model, images, source, tmp_path):
    embed(model, source, tmp_path)
    assert {row["image_path"]: row["caption"] for row in rows(tmp_path)} == dict.fromkeys(NAMES, "") | {
        "a.png": "a red car"
    }
    assert arrays(tmp_path, "text_emb")["text_emb_0.npy"].shape == (6, 8)


@pytest.mark.parametrize("stopped_after", [0, 1, 2, 3])
def test_interrupted_command_continues_to_the_same_files(model, source, tmp_path, stopped_after):
    embed(model, source, tmp_path / "whole", part_size=2)

    def interrupt(summary):
        if summary.embedded + summary.unreadable > 2 * stopped_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(model, source, tmp_path / "interrupted", part_size=2, progress=interrupt)
    summary = embed(model, source, tmp_path / "interrupted", part_size=2)
    assert summary.earlier == 2 * stopped_after
    assert summary.embedded + summary.unreadable == 7 - 2 * stopped_after
    assert contents(tmp_path / "interrupted") == contents(tmp_path / "whole")


def test_part_without_metadata_is_written_again(model, source, tmp_path):
    embed(model, source, tmp_path, part_size=2)
    before = contents(tmp_path)
    (tmp_path / "metadata/metadata_1.parquet").unlink()
    (tmp_path / "img_emb/img_emb_1.npy").write_bytes(b"damaged")
    assert embed(model, source, tmp_path, part_size=2).earlier == 5
    assert contents(tmp_path) == before


def test_processes_share_the_parts(model, source, tmp_path):
    embed(model, source, tmp_path / "one", part_size=1)
    both = [embed(model, source, tmp_path / "two", part_size=1, process=i, processes=2) for i in range(2)]
    assert [summary.embedded + summary.unreadable for summary in both] == [4, 3]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_numbers_of_files_have_the_digits_of_clip_retrieval(model, tmp_path):
    """The integer part of log10(parts), and one: 10 parts have two digits."""
    source = data.make_source(DataConfig(source="synthetic", options={"examples": 10}))
    embed(model, source, tmp_path, part_size=1)
    assert [*arrays(tmp_path)] == [f"img_emb_{part:02}.npy" for part in range(10)]


def test_embeddings_of_another_command_are_refused(model, source, tmp_path):
    embed(model, source, tmp_path, part_size=4)
    other = inference._clip(model.config, jax.tree.map(lambda x: 2 * x, model.params), truncate=True)
    synthetic = data.make_source(DataConfig(source="synthetic", options={"examples": 7}))
    for arguments, options, message in (
        ((other, source), {"part_size": 4}, "weights: expected '"),
        ((model, synthetic), {"part_size": 4}, "data: expected '"),
        ((model, source), {"part_size": 3}, "part_size: expected 4, got 3; use another --out"),
        ((model, source), {"part_size": 4, "dtype": "float32"}, "dtype: expected 'float16', got 'float32'"),
    ):
        with pytest.raises(ValueError, match=message):
            embed(*arguments, tmp_path, **options)


def test_weights_that_give_no_numbers_are_refused(model, source, tmp_path):
    broken = inference._clip(model.config, jax.tree.map(lambda x: np.nan * x, model.params), truncate=True)
    with pytest.raises(ValueError, match=r"a\.png: its img_emb is not finite; the weights are damaged"):
        embed(broken, source, tmp_path)
    assert not (tmp_path / "metadata").exists()


def test_embeddings_are_read_in_order(model, source, tmp_path):
    embed(model, source, tmp_path, part_size=2)
    manifest, found, names = embedding.read(tmp_path)
    assert manifest == json.loads((tmp_path / "manifest.json").read_text()) and manifest["weights"] == model.fingerprint
    assert names == [row["image_path"] for row in rows(tmp_path)] and found.dtype == np.float32
    np.testing.assert_array_equal(found, np.concatenate([*arrays(tmp_path).values()]))


def test_incomplete_embeddings_are_not_read(model, source, tmp_path):
    with pytest.raises(ValueError, match=r"expected embeddings of clip-jax embed, with manifest\.json, got none"):
        embedding.read(tmp_path)
    embed(model, source, tmp_path, part_size=2)
    (tmp_path / "metadata/metadata_2.parquet").unlink()
    with pytest.raises(ValueError, match=r"1 of 4 parts are missing, first metadata_2\.parquet; run the same"):
        embedding.read(tmp_path)


@pytest.mark.slow  # four commands
def test_search_in_embeddings_prints_the_table_of_the_images(weights, images, tmp_path):
    out = tmp_path / "out"
    done = commands.run(
        ["-m", "clip_jax.embed", f"--weights={weights}", f"--images={images}", f"--out={out}", "--stored_dtype=float32"]
    )
    assert done.stdout == f"{out}: 6 images embedded, 1 unreadable (in {out}/unreadable)\n", done.stderr
    search = ["-m", "clip_jax.search", f"--weights={weights}", "a red car"]
    one, other = (commands.run([*search, flag]) for flag in (f"--images={images}", f"--embeddings={out}"))
    assert one.returncode == other.returncode == 0 and one.stdout == other.stdout, other.stderr
    refused = commands.run([*search, f"--embeddings={out}", "--dtype=bfloat16"])
    assert refused.returncode == 2 and "got other weights or another --dtype: <Clip" in refused.stderr
