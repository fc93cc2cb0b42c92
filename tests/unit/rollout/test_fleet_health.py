from millrace.rollout.fleet_health import (
    Action,
    Answered,
    EngineHealth,
    Event,
    Exited,
    Missed,
    Overdue,
    Respawned,
    State,
    Suspected,
    SyncBegan,
    SyncEnded,
    step,
)

SERVING = (Answered(), SyncBegan(), SyncEnded(7))
RESTARTED = (*SERVING, Exited(137), Respawned(), Answered())


def after(*events: Event, max_restarts: int = 3) -> tuple[EngineHealth, list[Action]]:
    health, actions = EngineHealth(), []
    for event in events:
        result = step(health, event, max_restarts=max_restarts)
        health = result.health
        actions += result.actions
    return health, actions


def test_an_engine_serves_after_it_answered_and_a_sync_ended() -> None:
    assert after(Answered())[0].state is State.READY
    assert after(Answered(), SyncBegan())[0].state is State.STALE
    health, actions = after(*SERVING)
    assert (health.state, health.version, actions) == (State.SERVING, 7, [])


def test_an_engine_that_is_starting_may_leave_probes_unanswered() -> None:
    assert after(Missed(), Missed(), Missed(), Missed())[0].state is State.STARTING


def test_one_that_never_answered_is_given_up_at_once() -> None:
    health, actions = after(Exited(1))
    assert health.state is State.GAVE_UP
    assert actions == [Action.REQUEUE, Action.STOP]
    assert "status 1" in health.reason


def test_a_silent_engine_goes_back_to_what_it_was() -> None:
    assert after(*SERVING, Missed())[0].state is State.SILENT
    assert after(*SERVING, Missed(), Missed(), Answered())[0].state is State.SERVING
    assert after(Answered(), Missed(), Answered())[0].state is State.READY


def test_misses_count_only_in_a_row() -> None:
    assert after(*SERVING, Missed(), Missed(), Answered(), Missed(), Missed())[0].state is State.SILENT


def test_requests_that_break_off_silence_an_engine_and_do_not_kill_it() -> None:
    health, actions = after(*SERVING, Suspected(), Suspected(), Suspected(), Suspected())
    assert (health.state, health.missed, actions) == (State.SILENT, 0, [])
    assert after(*SERVING, Suspected(), Answered())[0].state is State.SERVING


def test_three_misses_in_a_row_kill_and_restart_it_and_free_its_prompts() -> None:
    health, actions = after(*SERVING, Missed(), Missed(), Missed())
    assert health.state is State.DEAD
    assert actions == [Action.REQUEUE, Action.RESTART]
    assert health.version is None


def test_a_restarted_engine_comes_back_only_through_a_sync_that_ended() -> None:
    assert after(*RESTARTED)[0].state is State.STALE
    assert after(*RESTARTED, Answered(), Missed(), Answered())[0].state is State.STALE
    assert after(*RESTARTED, SyncBegan())[0].state is State.STALE
    assert after(*RESTARTED, SyncBegan(), SyncEnded(8))[0].state is State.SERVING


def test_the_end_of_a_sync_that_began_before_the_restart_does_not_count() -> None:
    died_within = (*SERVING, SyncBegan(), Exited(137), Respawned(), Answered(), SyncEnded(8))
    assert after(*died_within)[0].state is State.STALE


def test_a_sync_that_finds_an_engine_silent_is_not_forgotten() -> None:
    assert after(*SERVING, Missed(), SyncBegan(), Answered())[0].state is State.STALE
    assert after(*SERVING, SyncBegan(), Missed(), SyncEnded(8), Answered())[0].state is State.SERVING


def test_it_gives_up_after_the_last_restart() -> None:
    again = (Exited(1), Respawned(), Answered())
    health, actions = after(*SERVING, *again, *again, Exited(1), max_restarts=2)
    assert health.state is State.GAVE_UP
    assert actions[-1] is Action.STOP
    assert after(*SERVING, *again, *again, Exited(1), Answered(), max_restarts=2)[0].state is State.GAVE_UP


def test_an_overdue_engine_is_restarted_and_says_why() -> None:
    health, actions = after(*SERVING, Overdue("no request came back within 5 s"))
    assert health.state is State.DEAD
    assert actions[-1] is Action.RESTART
    assert health.reason == "no request came back within 5 s"
