"""One set of digits in every representation, shapes and scales, and every bad image."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.tasks.image_classification import ImageClassification
from curate.pipeline.tasks.images import decode
from curate.pipeline.tasks.labels import Labels
from curate.pipeline.tasks.registry import make_task, task_from_description

Write = Callable[..., Corpus]
N = 12


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 8, 8] that use the whole range, and labels 0 to 9."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images[:N] * 255 / 16).astype(np.uint8), found.target[:N].astype(np.int64)


def png(pixels: np.ndarray, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def flat(values: np.ndarray) -> pa.Array:
    width = int(np.prod(values.shape[1:]))
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)


def representations(pixels: np.ndarray, folder: Path) -> dict[str, pa.Array]:
    """Return the same images as columns of every kind that corpora come in."""
    files = [png(p) for p in pixels]
    for i, file in enumerate(files):
        (folder / f"{i}.png").write_bytes(file)
    rows = pa.array(pixels.reshape(-1))
    lines = pa.FixedSizeListArray.from_arrays(rows, 8)
    structs = pa.StructArray.from_arrays(
        [pa.array(files), pa.array([f"{i}.png" for i in range(len(files))])], ["bytes", "path"]
    )
    only_paths = pa.StructArray.from_arrays(
        [pa.nulls(N, pa.binary()), pa.array([str(folder / f"{i}.png") for i in range(N)])],
        ["bytes", "path"],
    )
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(pixels[:, None])
    return {
        "struct of bytes": structs,
        "struct of paths": only_paths,
        "bytes": pa.array(files),
        "paths": pa.array([str(folder / f"{i}.png") for i in range(N)]),
        "flat list": flat(pixels),
        "flat variable list": pa.array(pixels.reshape(N, -1).tolist(), pa.list_(pa.uint8())),
        "nested list": pa.FixedSizeListArray.from_arrays(lines, 8),
        "nested variable list": pa.array(pixels.tolist()),
        "tensor": tensors,
        "floats in [0, 1]": flat(pixels.astype(np.float32) / np.float32(255)),
        "floats to 255": flat(pixels.astype(np.float64)),
    }


def test_every_representation_gives_the_same_batch(
    digits: tuple[np.ndarray, np.ndarray], corpus: Write, read_all: Callable, tmp_path: Path
) -> None:
    pixels, labels = digits
    expected = torch.from_numpy(pixels).float()[:, None] / 255
    (tmp_path / "files").mkdir()
    for name, column in representations(pixels, tmp_path / "files").items():
        opened = corpus(pa.table({"image": column, "label": labels}), shards=2)
        task = make_task("image_classification", opened)
        batch = task.collate(task.encode(read_all(opened)))
        assert batch.inputs["images"].dtype == torch.float32, name
        assert batch.inputs["images"].is_contiguous(), name
        torch.testing.assert_close(
            batch.inputs["images"], expected, rtol=1e-6, atol=0, msg=f"{name} differs"
        )
        assert batch.targets.tolist() == labels.tolist(), name
        assert task.model_args() == {"num_classes": 10, "input_shape": (1, 8, 8)}, name
        assert task_from_description(task.describe()) == task, name


def test_paths_start_at_the_corpus_that_names_them(
    digits: tuple[np.ndarray, np.ndarray], corpus: Write, read_all: Callable
) -> None:
    pixels, labels = digits
    opened = corpus({"file_name": [f"{i}.png" for i in range(N)], "label": labels})
    for i in range(N):
        (Path(opened.root) / f"{i}.png").write_bytes(png(pixels[i]))
    task = make_task("image_classification", opened)
    moved = corpus({"file_name": ["a.png"], "label": [3]})
    (Path(moved.root) / "a.png").write_bytes(png(pixels[7]))
    again = task_from_description(task.describe(), moved)
    image = again.collate(again.encode(read_all(moved))).inputs["images"][0]
    torch.testing.assert_close(image, torch.from_numpy(pixels[7]).float()[None] / 255)
    with pytest.raises(ValueError, match=r"image file .*a\.png cannot be read"):
        task.encode(read_all(moved))


@pytest.mark.parametrize(
    ("column", "options", "shape"),
    [
        (np.zeros((2, 3, 5, 6), np.uint8), {}, (3, 5, 6)),
        (np.zeros((2, 5, 6, 3), np.uint8), {}, (3, 5, 6)),
        (np.zeros((2, 3, 6, 3), np.uint8), {}, (3, 6, 3)),
        (np.zeros((2, 3, 6, 3), np.uint8), {"layout": "hwc"}, (3, 3, 6)),
        (np.zeros((2, 5, 6), np.uint8), {}, (1, 5, 6)),
        (np.zeros((2, 75), np.uint8), {}, (3, 5, 5)),
        (np.zeros((2, 60), np.uint8), {"shape": "5x12"}, (1, 5, 12)),
        (np.zeros((2, 60), np.uint8), {"shape": "3x5x4", "layout": "hwc"}, (3, 5, 4)),
    ],
)
def test_shapes_come_from_dimensions_or_options(
    corpus: Write, column: np.ndarray, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    images = pa.array(column.tolist())
    task = make_task("image_classification", corpus({"img": images, "label": [0, 1]}), **options)
    assert task.shape == shape


def test_channels_last_is_turned(corpus: Write, read_all: Callable) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3), np.uint8)
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    for column in (pa.array(pixels.tolist()), pa.array([png(p) for p in pixels])):
        opened = corpus({"image": column, "label": [0, 1]})
        task = make_task("image_classification", opened)
        torch.testing.assert_close(
            task.collate(task.encode(read_all(opened))).inputs["images"], expected
        )


@pytest.mark.parametrize(
    ("largest", "kind", "scale"),
    [
        (16, np.float32, 16.0),
        (1, np.float64, 1.0),
        (200, np.int64, 255.0),
        (4000, np.int32, 65535.0),
    ],
)
def test_the_scale_is_guessed_said_and_kept(
    corpus: Write,
    read_all: Callable,
    caplog: pytest.LogCaptureFixture,
    largest: int,
    kind: type,
    scale: float,
) -> None:
    caplog.set_level("INFO")
    values = np.linspace(0, largest, 32).reshape(2, 16).astype(kind)
    opened = corpus({"image": flat(values), "label": [0, 1]})
    task = make_task("image_classification", opened)
    assert task.describe()["preprocess"]["scale"] == scale
    assert scale == 1 or "pixels are divided by" in caplog.text
    images = task.collate(task.encode(read_all(opened))).inputs["images"]
    np.testing.assert_allclose(images.reshape(2, 16), values / scale, rtol=1e-6)
    forced = make_task("image_classification", opened, scale="2000000")
    assert forced.scale == 2_000_000


def test_one_outlier_does_not_set_the_scale(corpus: Write, read_all: Callable) -> None:
    values = np.full((40, 16), 0.5)
    values[7, 2] = 9
    opened = corpus({"image": flat(values), "label": [0, 1] * 20})
    task = make_task("image_classification", opened)
    assert task.scale == 1
    with pytest.raises(ValueError, match="a pixel is 9, above the task's scale 1"):
        task.encode(read_all(opened))


def test_negative_pixels_are_left_as_they_are(corpus: Write, read_all: Callable) -> None:
    values = np.linspace(-2, 3, 32).reshape(2, 16)
    opened = corpus({"image": flat(values), "label": [0, 1]})
    task = make_task("image_classification", opened)
    images = task.collate(task.encode(read_all(opened))).inputs["images"]
    np.testing.assert_allclose(images.reshape(2, 16), values, rtol=1e-6)


def test_mean_and_std_come_after_the_scale(corpus: Write, read_all: Callable) -> None:
    opened = corpus(
        {"image": pa.array([png(np.full((4, 4, 3), 51, np.uint8))] * 2), "label": [0, 1]}
    )
    task = make_task("image_classification", opened, mean="0.1,0.2,0.3", std=[1.0, 2.0, 4.0])
    again = task_from_description(task.describe())
    image = again.collate(again.encode(read_all(opened))).inputs["images"][0]
    assert image[:, 0, 0].tolist() == pytest.approx([0.1, 0.0, -0.025])


def test_colour_is_gray_only_where_all_the_sample_is(corpus: Write) -> None:
    gray, colour = np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.uint8)
    columns = {"image": pa.array([png(gray), png(colour)]), "label": [0, 1]}
    assert make_task("image_classification", corpus(columns)).shape == (3, 4, 4)
    assert make_task("image_classification", corpus(columns), mode="L").shape == (1, 4, 4)


def test_sixteen_bit_gray_keeps_its_range() -> None:
    out = io.BytesIO()
    Image.fromarray(np.array([[0, 257 * 7, 65535]], np.uint16)).save(out, "PNG")
    assert decode(out.getvalue(), "L").tolist() == [[[0, 7, 255]]]


def test_images_are_turned_upright() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", exif=exif)
    assert np.array_equal(decode(out.getvalue(), "L")[0], np.rot90(pixels, -1))


def sized(*sizes: tuple[int, int]) -> pa.Array:
    return pa.array([png(np.zeros(size, np.uint8)) for size in sizes])


def test_one_odd_size_is_that_rows_error_and_many_are_the_corpus(
    corpus: Write, read_all: Callable
) -> None:
    sizes = [(4, 4)] * 11 + [(4, 6)]
    opened = corpus({"image": sized(*sizes), "label": [0, 1] * 6})
    task = make_task("image_classification", opened)
    table = read_all(opened)
    task.encode(table.slice(0, 11))
    with pytest.raises(ValueError, match="the image is 4x6, but the task's images are 4x4"):
        task.encode(table)
    mixed = corpus({"image": sized((4, 4), (4, 6), (5, 5), (4, 4)), "label": [0, 1] * 2})
    with pytest.raises(ValueError, match=r"differ in size \(4x4, .*resize=4x4"):
        make_task("image_classification", mixed)
    resized = make_task("image_classification", mixed, resize="3x5")
    batch = resized.collate(resized.encode(read_all(mixed)))
    assert batch.inputs["images"].shape == (4, 1, 3, 5)


def good_and_bad() -> dict[str, tuple[pa.Array, str]]:
    good = np.zeros(16)
    broken = {"nan": (np.nan, "a pixel is NaN"), "inf": (np.inf, "NaN or infinite")}
    broken["too large"] = (9.0, "a pixel is 9, above the task's scale 1")
    found = {}
    for name, (value, complaint) in broken.items():
        bad = good.copy()
        bad[3] = value
        found[name] = (pa.array([good, good, bad], pa.list_(pa.float32(), 16)), complaint)
    lists = [list(good), list(good)]
    variable = pa.list_(pa.float32())
    found["null pixel"] = (pa.array([*lists, [None] * 16], variable), "null")
    found["null image"] = (pa.array([*lists, None], pa.list_(pa.float32(), 16)), "is null")
    found["short"] = (pa.array([*lists, [0.0] * 9], variable), "the image is 9, but")
    nested = [np.zeros((4, 4)).tolist()] * 2
    found["ragged"] = (pa.array([*nested, [[0.0], [0.0, 1.0]]]), "lists of different lengths")
    found["other shape"] = (pa.array([*nested, np.zeros((2, 8)).tolist()]), "the image is 2x8")
    files = [png(np.zeros((4, 4), np.uint8))] * 2
    found["no image"] = (pa.array([*files, b"GIF89a?"]), "no readable image")
    found["truncated"] = (pa.array([*files, files[0][:45]]), "no readable image")
    found["null file"] = (pa.array([*files, None]), "is null")
    return found


@pytest.mark.parametrize("case", good_and_bad())
def test_a_bad_image_is_the_error_of_its_row(case: str, corpus: Write, read_all: Callable) -> None:
    column, complaint = good_and_bad()[case]
    opened = corpus({"image": column, "label": [0, 1, 1]})
    options = {"too large": {"scale": "1"}, "short": {"shape": "4x4"}}.get(case, {})
    task = make_task("image_classification", opened, **options)
    table = read_all(opened)
    assert task.encode(table.slice(0, 2)).num_rows == 2
    with pytest.raises(ValueError, match=complaint):
        task.encode(table.slice(2, 1))
    with pytest.raises(ValueError):
        task.encode(table)


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.just(3), st.just(4), st.just(5))),
    st.data(),
)
def test_any_slice_collates_to_the_same_rows(pixels: np.ndarray, data: st.DataObject) -> None:
    """Offsets and chunks of Arrow arrays must not show."""
    task = ImageClassification(("image",), "label", Labels((0, 1)), shape=(3, 4, 5), stored="uint8")
    labels = np.arange(len(pixels)) % 2
    table = pa.table({"image": flat(pixels), "label": labels})
    start = data.draw(st.integers(0, len(pixels) - 1))
    stop = data.draw(st.integers(start + 1, len(pixels)))
    parts = pa.concat_tables([table.slice(start, 1), table.slice(start, stop - start)])
    order = [start, *range(start, stop)]
    encoded = task.encode(parts)
    batch = task.collate(encoded)
    torch.testing.assert_close(
        batch.inputs["images"], torch.from_numpy(pixels[order].astype(np.float32) / 255)
    )
    assert batch.targets.tolist() == labels[order].tolist()
    later = task.collate(encoded.slice(1))
    picked = batch.select_rows(range(1, len(order)))
    assert torch.equal(later.inputs["images"], picked.inputs["images"])
    assert torch.equal(later.targets, picked.targets)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"shape": "3x7"}, r"shape=3x7 does not fit 16 values in 'image'"),
        ({"shape": "wide"}, "option shape='wide' is no size"),
        ({"layout": "cwh"}, "choose chw or hwc"),
        ({"scale": "0"}, "must be positive"),
        ({"resize": "8x8"}, "holds arrays"),
        ({"colour": "blue"}, "takes no option 'colour'; it takes inputs, label, classes, shape"),
        ({"inputs": "picture"}, "no column 'picture'; the corpus has image, label"),
        ({"label": "kind"}, "no label column 'kind'"),
        ({"inputs": "label"}, "cannot hold images"),
    ],
)
def test_a_wrong_option_is_answered_before_anything_runs(
    corpus: Write, options: dict[str, str], complaint: str
) -> None:
    opened = corpus({"image": flat(np.zeros((2, 16), np.uint8)), "label": [0, 1]})
    with pytest.raises(ValueError, match=complaint):
        make_task("image_classification", opened, **options)
