"""Every odd video is decoded right, compared with what was drawn, or refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from keeplora.data.sets import FileBytes, HeldBytes
from keeplora.data.video import Sampling, VideoError, all_frames, check_video, decode_clip, source
from tests.data.video.video_files import difference, number_of, numbered
from tests.data.video.zoo import BAD, GOOD, LEFT

SAMPLINGS = (Sampling(frames=8), Sampling("segment", frames=5), Sampling("fps", frames=20, fps=12.5))


@pytest.mark.parametrize("name", GOOD)
def test_decoded_right(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    case = GOOD[name]
    path = case.make(tmp_path)
    capfd.readouterr()
    file, starts = FileBytes(path), case.starts()

    header = check_video(file, str(path), full=False)
    facts = check_video(file, str(path), full=True)
    height, width = case.expected(0).shape[:2]
    assert (header.width, header.height) == (facts.width, facts.height) == (width, height)
    assert facts.frames == len(case.numbers)

    every = list(all_frames(file, str(path)))
    assert [time for time, _ in every] == pytest.approx(starts, abs=2e-3)
    for index, (_, picture) in enumerate(every):
        assert difference(picture, case.expected(index)) < case.tolerance, index

    for sampling in SAMPLINGS:
        clip = decode_clip(file, str(path), sampling)
        asked = sampling.times(facts.duration, starts[-1])
        assert len(clip.frames) == len(clip.times) == len(clip.indices) == len(asked)
        for time, found, index, picture in zip(asked, clip.times, clip.indices, clip.frames):
            assert found == pytest.approx(starts[index], abs=2e-3)
            # the last frame that starts by then; times in a file are rounded, to a millisecond at worst
            assert found <= time + 2e-3
            assert index + 1 == len(starts) or starts[index + 1] > time - 2e-3
            assert difference(picture, case.expected(index)) < case.tolerance
            assert picture.mode == "RGB"
        held = decode_clip(HeldBytes(path.read_bytes()), name, sampling)
        assert held.indices == clip.indices
        assert [p.tobytes() for p in held.frames] == [p.tobytes() for p in clip.frames]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", BAD)
def test_refused_by_name(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    case = BAD[name]
    path = case.make(tmp_path)
    capfd.readouterr()

    def refusal(run: object) -> str:
        with pytest.raises(VideoError) as caught:
            run()  # type: ignore[operator]
        told = str(caught.value)
        assert told.startswith(f"{path}: ")
        assert "\n" not in told
        assert "; " in told  # how to mend it
        return told

    file = FileBytes(path)
    assert re.search(case.tells, refusal(lambda: check_video(file, str(path), full=True)))
    if case.quick:
        assert re.search(case.tells, refusal(lambda: check_video(file, str(path), full=False)))
        assert re.search(case.tells, refusal(lambda: decode_clip(file, str(path), Sampling())))
    assert capfd.readouterr() == ("", "")


def test_names_of_the_zoo_tell_one_thing_each() -> None:
    assert not GOOD.keys() & BAD.keys()
    assert len(BAD) >= 12


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_of_a_stream_without_length_is_decoded_right(name: str, tmp_path: Path) -> None:
    path = LEFT[name](tmp_path)
    try:
        count = check_video(FileBytes(path), str(path), full=True).frames
    except VideoError:  # the last frame is torn
        count = None
    sampling = Sampling("fps", frames=30, fps=25) if count else Sampling("fps", frames=4, fps=5)
    clip = decode_clip(FileBytes(path), str(path), sampling)
    assert [number_of(picture) for picture in clip.frames] == list(clip.indices)
    assert 0.3 < clip.duration < 1.1
    assert len(clip.frames) == count or clip.indices == (0, 5, 10, 15)


def test_large_frames_are_refused_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = numbered(tmp_path / "large.mp4", 2, (640, 480))

    def never(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("keeplora.data.video.reader.make_decoder", never)
    monkeypatch.setattr("keeplora.data.video.check.make_decoder", never)
    told = r"large\.mp4: 640 x 480 pixels, more than max_pixels \(300,000\); shrink the video or raise `max_pixels`$"
    with pytest.raises(VideoError, match=told):
        decode_clip(FileBytes(path), str(path), Sampling(), max_pixels=300_000)
    with pytest.raises(VideoError, match=told):
        check_video(FileBytes(path), str(path), full=False, max_pixels=300_000)
    monkeypatch.undo()
    assert check_video(FileBytes(path), str(path), full=False, max_pixels=307_200).width == 640


def test_wide_pixels_count_as_they_are_shown(tmp_path: Path) -> None:
    from fractions import Fraction

    path = numbered(tmp_path / "wide.mp4", 2, aspect=Fraction(2))
    with pytest.raises(VideoError, match="192 x 64 pixels"):
        decode_clip(FileBytes(path), str(path), Sampling(), max_pixels=96 * 64)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = numbered(tmp_path / "secret.mp4", 2)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(source, "open", refuse, raising=False)
    with pytest.raises(VideoError, match=r"secret\.mp4: cannot be read \(Permission denied\); check its permissions$"):
        decode_clip(FileBytes(path), str(path), Sampling())


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "caf\udce9.mp4"
    try:
        numbered(tmp_path / "plain.mp4", 3).rename(path)
    except OSError:
        pytest.skip("this file system takes no such names")
    assert [number_of(p) for p in decode_clip(FileBytes(path), "x", Sampling(frames=3)).frames] == [0, 1, 2]
