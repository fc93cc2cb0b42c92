"""What is said while the conversations of a stage are opened."""

import pytest

from millrace.config.schema import SftStage
from millrace.stages import sft


def test_how_far_the_reading_is_is_said_from_time_to_time(
    rows_file, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    stage = SftStage(name="warm", data=(rows_file([{"messages": messages}] * 3),), steps=1)
    said: list[str] = []
    assert len(sft.open_conversations(stage, tokenizer, said.append)) == 3
    assert said == [], "it was quick"
    monkeypatch.setattr(sft, "TELL_SECONDS", 0.0)
    sft.open_conversations(stage, tokenizer, said.append)
    assert said == [f"warm: {done} of 3 conversations read" for done in (1, 2, 3)]
