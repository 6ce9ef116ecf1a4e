from __future__ import annotations

from types import SimpleNamespace

from deploykit.training.progress import Progress


def test_a_progress_line_has_position_and_metrics() -> None:
    said: list[str] = []
    progress = Progress(said.append)
    state = SimpleNamespace(global_step=0, max_steps=1000)
    progress.on_train_begin(None, state, None)
    progress._start = (0, progress._start[1] - 60)
    state.global_step = 250
    progress.on_log(None, state, None, {"loss": 0.70761, "learning_rate": 7.42e-5, "epoch": 0.25})
    progress.on_log(
        None, state, None, {"eval_loss": 0.72, "eval_macro_f1": 0.6912, "eval_selection": 0.6911, "eval_runtime": 8.1}
    )
    state.global_step = 1000
    progress.on_log(None, state, None, {"loss": 0.5, "learning_rate": 0.0})
    progress.on_log(None, state, None, {"train_runtime": 311.5, "train_loss": 0.7})
    assert said == [
        "step 250 of 1,000: loss 0.7076, learning rate 7.4e-05, about 3 min left",
        "step 250 of 1,000: on the validation rows loss 0.7200, macro_f1 0.6912",
        "step 1,000 of 1,000: loss 0.5000, learning rate 0.0e+00",
    ]


def test_a_continued_run_counts_the_time_left_from_where_it_went_on() -> None:
    said: list[str] = []
    progress = Progress(said.append)
    state = SimpleNamespace(global_step=900, max_steps=1000)
    progress.on_train_begin(None, state, None)
    progress._start = (900, progress._start[1] - 50)
    state.global_step = 950
    progress.on_log(None, state, None, {"loss": 0.5, "learning_rate": 1e-5})
    assert said == ["step 950 of 1,000: loss 0.5000, learning rate 1.0e-05, about 50 s left"]
