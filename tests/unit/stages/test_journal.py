from millrace.stages.journal import RolloutJournal

from .answers import group


def test_what_is_read_back_trains_like_what_was_written(tmp_path):
    journal = RolloutJournal(tmp_path, "rl-math")
    groups = [group([0.0, 1.0], name="1", version=4), group([1.0, 1.0], name="2", lengths=[3, 1], version=4)]
    journal.write(3, {"weight_version": 4, "sampler": {"position": 2}}, groups)
    header, read = journal.read(3, weight_version=4)
    assert header["sampler"] == {"position": 2}
    assert [g.rewards for g in read] == [[0.0, 1.0], [1.0, 1.0]]
    for ours, theirs in zip(groups, read, strict=True):
        assert [a.rollout for a in ours.answers] == [a.rollout for a in theirs.answers]


def test_answers_of_other_weights_are_not_used(tmp_path):
    journal = RolloutJournal(tmp_path, "rl")
    journal.write(0, {"weight_version": 4}, [group([1.0])])
    assert journal.read(0, weight_version=5) is None
    assert journal.read(1, weight_version=4) is None


def test_a_journal_that_a_kill_left_half_written_does_not_count(tmp_path):
    journal = RolloutJournal(tmp_path, "rl")
    journal.path(0).with_suffix(".tmp").write_text('{"weight_version": 0}\n{"half')
    assert journal.read(0, weight_version=0) is None
