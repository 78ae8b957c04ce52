from pathlib import Path

import numpy as np
import pytest

from executor.data import SampleOrder, check_stream, load_stream, sample_numbers
from profiles.errors import InvalidInputError, UnsupportedError
from tests.plans import tiny_layout


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_a_folder_is_one_stream_in_sorted_order(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        {"b.txt": b"two", "a/z.txt": b"one", "c.bin": b"x\0y", ".git/config": b"hidden", "d": b"3"},
    )
    stream = load_stream(folder)
    assert stream.tokens.tobytes() == b"one\0two\x003"
    assert stream.digest() == load_stream(folder).digest()
    (folder / "b.txt").write_bytes(b"TWO")
    assert stream.digest() != load_stream(folder).digest()


def test_the_default_text_is_the_standard_library() -> None:
    stream = load_stream(None)
    assert stream.name == "Python standard library"
    assert 1_000_000 < len(stream.tokens) < 9_000_000
    assert stream.digest() == load_stream(None).digest()


def test_samples_of_a_step_are_the_same_in_every_layout() -> None:
    stream = load_stream(None)
    order = SampleOrder(stream, 32, seed=3)
    for step in (0, 7):
        expected = order.windows(sample_numbers(tiny_layout(), step, 0))
        for layout in (tiny_layout(dp=2), tiny_layout(dp=4, pp=2), tiny_layout(dp=8)):
            numbers = [sample_numbers(layout, step, index) for index in range(layout.dp)]
            assert len({number for part in numbers for number in part}) == layout.global_batch
            parts = [SampleOrder(stream, 32, seed=3).windows(part) for part in numbers]
            assert np.array_equal(np.concatenate(parts), expected)


def test_a_pass_takes_every_window_once_and_targets_are_the_next_bytes(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(bytes(range(1, 102)))
    stream = load_stream(path)
    order = SampleOrder(stream, 10, seed=0)
    first, second = order.windows(range(10)), order.windows(range(10, 20))
    assert sorted(first[:, 0]) == list(range(1, 101, 10))
    assert np.array_equal(first[:, 1:], first[:, :-1] + 1)
    assert not np.array_equal(first, second)
    assert np.array_equal(np.sort(first, axis=0), np.sort(second, axis=0))
    across = SampleOrder(stream, 10, seed=0).windows(range(8, 12))
    assert np.array_equal(across, np.concatenate((first, second))[8:12])
    assert not np.array_equal(first, SampleOrder(stream, 10, seed=1).windows(range(10)))


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ({}, "nowhere", "is not there; name a text file or a folder"),
        ({"a": b""}, "a", "is empty; name a text file"),
        ({"a": b"\0\1"}, "a", "a binary file; name a text file"),
        ({"a/b": b"\0"}, "a", "holds no text; name a folder"),
    ],
)
def test_errors_name_the_way_out(
    tmp_path: Path, files: dict[str, bytes], name: str, message: str
) -> None:
    write(tmp_path, files)
    with pytest.raises(InvalidInputError, match=message):
        load_stream(tmp_path / name)


def test_text_that_a_model_cannot_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x" * 32)
    stream = load_stream(tmp_path / "short")
    with pytest.raises(InvalidInputError, match=r"32 bytes.*needs 33; name a longer text"):
        check_stream(stream, 256, 32)
    with pytest.raises(UnsupportedError, match="vocab is 255"):
        check_stream(stream, 255, 8)
