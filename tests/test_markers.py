"""What a marker tells of a phase, compared with what there is."""

import pytest

from training import command, files, markers, recipe


def test_files_are_compared_with_what_a_marker_says_was_written(tmp_path):
    (tmp_path / "model").write_text("weights")
    marker = tmp_path / "proxy.json"
    files.write_json(marker, {"wrote": markers.written(tmp_path, ["model"])})
    markers.check_written(marker)
    (tmp_path / "model").write_text("weighty")
    with pytest.raises(files.Failed, match=r"model is not what was written.*delete .*proxy\.json"):
        markers.check_written(marker)
    (tmp_path / "model").unlink()
    with pytest.raises(files.Failed, match="model is gone"):
        markers.check_written(marker)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"lr": 2}, "lr: {} was made with 1, now it is 2; choose another"),
        ({"backbone": "c" * 64}, "backbone: {} was made with other weights before it: the phase before was done again"),
        ({"images": {"train": "a" * 64, "test": "c" * 64}}, "images: {} was made with other images: files were added"),
        ({"images": {"train": "a" * 64, "test": "c" * 64}}, "since (test); choose another --run"),
    ],
)
def test_what_a_phase_read_and_what_is_other_now_is_told_in_words(tmp_path, now, said):
    marker = tmp_path / "proxy.json"
    read = {"lr": 1, "backbone": "b" * 64, "images": {"train": "a" * 64, "test": "b" * 64}}
    files.write_json(marker, {"read": read})
    markers.refuse_other(marker, read)
    with pytest.raises(files.Refused) as error:
        markers.refuse_other(marker, {**read, **now})
    assert said.format(tmp_path) in str(error.value)
    assert "cccc" not in str(error.value)


def test_a_field_that_came_later_makes_no_older_run_another(tmp_path):
    marker = tmp_path / "round_1" / "relearn.json"
    marker.parent.mkdir()
    older = recipe.phase_fields(command.parse(["--data.path", "digits"]), "relearn")
    stored = recipe.phase_fields(command.parse(["--data.path", "digits", "--relearn.norm", "stored"]), "relearn")
    assert "relearn.norm" not in older
    for was, now, told in (
        (older, stored, "with batch, now it is stored"),
        (stored, older, "with stored, now it is ba"),
    ):
        files.write_json(marker, {"read": was})
        markers.refuse_other(marker, was)
        with pytest.raises(files.Refused, match=f"relearn.norm: .*{told}"):
            markers.refuse_other(marker, now)
