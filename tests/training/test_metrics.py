import json

from gradot_jax.training.metrics import MetricsFile


def test_records_are_readable_at_once_and_leave_out_what_is_unknown(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    with MetricsFile(path, start=0) as file:
        file.record(1, loss=0.5, learning_rate=None)
        assert json.loads(path.read_text()) == {"step": 1, "loss": 0.5}


def test_a_resumed_run_drops_what_it_will_record_again_and_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    with MetricsFile(path, start=1) as file:
        file.record(2, loss=3.0)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 3.0}]


def test_a_fresh_run_begins_a_new_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n')
    with MetricsFile(path, start=0):
        assert path.read_text() == ""


def test_without_a_path_nothing_is_written(tmp_path):
    with MetricsFile(None, start=0) as file:
        file.record(1, loss=0.5)
    assert not list(tmp_path.iterdir())
