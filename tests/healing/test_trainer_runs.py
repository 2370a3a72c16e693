"""Where a run of ``Trainer`` goes on."""

from hf_sparse_pathways.healing.trainer_runs import last_checkpoint


def _store(folder, step, *, whole=True):
    place = folder / f"checkpoint-{step}"
    place.mkdir(parents=True)
    if whole:
        (place / "trainer_state.json").write_text("{}")
    return str(place)


def test_it_goes_on_from_the_newest_that_is_whole(tmp_path):
    run = tmp_path / "run"
    assert last_checkpoint(run) is None
    _store(run, 900, whole=False)  # interrupted while it was written
    assert last_checkpoint(run) is None
    _store(run, 9)
    newest = _store(run, 10)
    assert last_checkpoint(run) == newest
