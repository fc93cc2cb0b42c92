import json
import signal

import pytest
import torch.distributed as dist
from tiny_checkpoints import IM_END, VOCABULARY, write_tokenizer

from millrace.data.tokenizer import ChatTokenizer
from millrace.observe.console import RunConsole
from millrace.stages.control import ControlGroup
from millrace.stages.domains import Domain
from millrace.stages.episodes import EpisodePlayer

from .turn_worlds import END_OF_TEXT, FORMS, open_tokenizer


@pytest.fixture
def control():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    group = ControlGroup()
    group.stop_on_signals()
    yield group
    for number, handler in before.items():
        signal.signal(number, handler)
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """A tokenizer of each form; turns end with its end of turn or with the end of a text."""
    made = {form: open_tokenizer(tmp_path_factory.mktemp("t"), template) for form, (template, _) in FORMS.items()}
    for tokenizer in made.values():
        tokenizer.stop_token_ids = (END_OF_TEXT, IM_END)
    return made


@pytest.fixture
def rows_file(tmp_path):
    """Writes rows to a file and returns its path."""

    def rows_file(rows, name="rows"):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return rows_file


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    return ChatTokenizer(tmp_path, VOCABULARY)


@pytest.fixture
def player_of(tmp_path, tokenizer, control):
    """A function from a fleet and domains, each named and given as its settings and its environment, to a player and
    the domains."""
    (tmp_path / "logs").mkdir()
    console, players = RunConsole(tmp_path), []

    def player_of(fleet, **settings):
        domains = {name: Domain(name, config, made, tokenizer) for name, (config, made) in settings.items()}
        players.append(EpisodePlayer(control, fleet and fleet.sync, tokenizer, fleet, domains, console))
        return players[-1], domains

    yield player_of
    for player in players:
        player.close()
    console.close()
