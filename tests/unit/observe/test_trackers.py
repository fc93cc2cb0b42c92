"""The trackers against the packages themselves: TensorBoard's files, W&B offline, MLflow on SQLite."""

import json
from importlib.util import find_spec

import pytest
from sample_run import write_sample_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from millrace.config.loading import load_recipe
from millrace.config.rules import check_recipe
from millrace.observe.trackers import TrackerError, open_trackers
from millrace.observe.writer import MetricsWriter

needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed; it is the extra `wandb`")
needs_mlflow = pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed; it is an extra")


@pytest.fixture
def run_dir(tmp_path):
    return write_sample_run(tmp_path, steps=4, until="sft", answers=False)


def track(run_dir, first, steps, *overrides):
    (run_dir / "metrics.jsonl").touch()
    recipe = load_recipe(run_dir / "recipe.yaml", overrides)
    writer = MetricsWriter(run_dir, first, open_trackers(recipe, run_dir, first))
    for step in range(first, first + steps):
        writer.write(step, "sft", {"loss": 1.0 / (step + 1)})
    writer.close()


def test_tensorboard_has_each_step_of_a_resumed_run_once(run_dir):
    (run_dir / "metrics.jsonl").unlink()
    track(run_dir, 0, 6)
    track(run_dir, 3, 5)
    board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [(point.step, round(1 / point.value)) for point in board.Scalars("sft/loss")] == [
        (s, s + 1) for s in range(8)
    ]


def test_without_tensorboard_no_file_of_it_is_written(run_dir):
    track(run_dir, 0, 2, "observe.tensorboard=false")
    assert not (run_dir / "tensorboard").exists()


@pytest.mark.parametrize(
    ("package", "settings"),
    [("wandb", "{project: p}"), ("mlflow", "{tracking_uri: 'sqlite:///m.db', experiment: e}")],
)
def test_a_missing_package_is_found_by_check(run_dir, package, settings):
    problems = check_recipe(load_recipe(run_dir / "recipe.yaml", [f"observe.{package}={settings}"]))
    said = [problem for problem in problems if f"observe.{package} is set" in problem]
    assert bool(said) == (find_spec(package) is None)


@needs_wandb
def test_wandb_offline_goes_on_under_one_id(run_dir):
    asked = "observe.wandb={project: cascade, mode: offline}"
    track(run_dir, 10, 3, asked)
    first = json.loads((run_dir / "trackers.json").read_text())
    track(run_dir, 12, 3, asked)
    assert json.loads((run_dir / "trackers.json").read_text()) == first
    parts = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert len(parts) == 2 and {part.stem for part in parts} == {f"run-{first['wandb']['id']}"}
    assert [logged_updates(part) for part in parts] == [[10, 11, 12], [13, 14]]


def logged_updates(file):
    """The values of `update` in a W&B transaction log: 7 bytes of head, then LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, updates = file.read_bytes(), 7, []
    while at + 7 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 6], "little")
        assert data[at + 6] == 1, "these logs are short: every record is whole"
        record = Record()
        record.ParseFromString(data[at + 7 : at + 7 + length])
        at += 7 + length
        for item in record.history.item:
            if (item.key or item.nested_key[0]) == "update":
                updates.append(int(json.loads(item.value_json)))
    return updates


@needs_mlflow
def test_mlflow_on_sqlite_has_each_step_of_a_resumed_run_once(run_dir):
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{run_dir}/mlflow.db"
    asked = f"observe.mlflow={{tracking_uri: '{uri}', experiment: cascade}}"
    track(run_dir, 10, 6, asked)
    track(run_dir, 13, 5, asked)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("cascade")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "cascade-sample" and run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "sft/loss")
    assert [(point.step, round(1 / point.value)) for point in history] == [(s, s + 1) for s in range(10, 18)]
    other = f"observe.mlflow={{tracking_uri: '{uri}', experiment: another}}"
    track(run_dir, 18, 1, other)
    assert len(client.search_runs([client.get_experiment_by_name("another").experiment_id])) == 1


@needs_mlflow
def test_an_mlflow_that_cannot_be_used_is_said_at_the_start(run_dir):
    with pytest.raises(TrackerError, match=r"observe\.mlflow: ftp://nowhere cannot be used"):
        track(run_dir, 0, 1, "observe.mlflow={tracking_uri: 'ftp://nowhere', experiment: e}")
