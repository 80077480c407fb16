"""The trials of a sweep under Ray Tune: as many at once as there is room for, and those that fall behind are stopped.

    Tune, in the driver:  Trial ──a thread──▶ a training of its own under Ray Train
                            ▲                  │ at each checkpoint: the metric
                            └──────queue───────┘

Tune only says who goes on. What a trial has done is in its own folder, and is read from there. When the sweep shall
stop, the driver says so on a board, which all trials look at.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.train import UserCallback
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.util.queue import Empty, Queue

from freesolo.config import TrainJob
from freesolo.data.files import write_atomic
from freesolo.errors import DivergedError, JobError, StoppedError, TooLargeError
from freesolo.jobs import train_stage
from freesolo.settings import TuneSettings
from freesolo.sweep import Sweep
from freesolo.termination import on_termination
from freesolo.train.control import TrainingControl
from freesolo.train.steps_shown import StepBoard
from freesolo.train.storage import checkpoint_storage

STOP_SECONDS = 120.0
"""What a trial that is stopped early has for saving and telling MLflow."""

_LOOK_SECONDS = 1.0
_WOULD_AGAIN = (DivergedError, TooLargeError)  # what a trial fails of with the same settings each time
_LOG = logging.getLogger(__name__)


def run_trials(sweep: Sweep, settings: TuneSettings) -> dict[int, str]:
    """Do what is left of the trials.

    Returns:
        Why some failed, by number.

    Raises:
        StoppedError: SIGTERM came; the trainings under way were told to stop, and did.
        KeyboardInterrupt: So did Ctrl-C, with the same.
        JobError: Some ended before their end for what may pass; the others were done first.
    """
    left = [number for number in range(len(sweep.jobs)) if not sweep.over(number)]
    if not left:
        return {}
    # Who is stopped depends on the others: those that are over tell again what they told.
    numbers = left if settings.scheduler == "none" else list(range(len(sweep.jobs)))
    _LOG.info("%d trials, %d of them to be done, %d at once", len(sweep.jobs), len(left), sweep.at_once)
    storage, filesystem = checkpoint_storage(sweep.folder.url)
    board: Any = ray.remote(num_cpus=0)(StepBoard).remote()
    keeper = _Keeper(sweep, board)
    for no_news in ("ray.tune.tune", "ray.tune.analysis.experiment_analysis", "ray.tune.utils.util"):
        logging.getLogger(no_news).setLevel(logging.CRITICAL)
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")  # the keeper does, in a line
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the journals hold it all
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it would cut trainings off, and stay
    tuner = tune.Tuner(
        # They only wait for their trainings, which have resources of their own. Tune wants some, so: a byte.
        tune.with_resources(tune.with_parameters(Trial, sweep=sweep, board=board), {"memory": 1}),
        param_space={"trial": tune.grid_search(numbers)},
        tune_config=tune.TuneConfig(
            metric="metric",
            mode=settings.mode,
            scheduler=_scheduler(settings, sweep.jobs),
            max_concurrent_trials=sweep.at_once,
        ),
        run_config=tune.RunConfig(
            name="ray-tune",
            storage_path=storage,
            storage_filesystem=filesystem,
            callbacks=[keeper],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # trainings have their own
            verbose=0,
        ),
    )
    try:
        # A job's only line on standard output is its result; Tune prints whatever its verbosity.
        with redirect_stdout(io.StringIO()), on_termination(keeper.ask):
            tuner.fit()
        keeper.stop_if_asked()
    except KeyboardInterrupt:
        keeper.ask()
        keeper.end_trainings()
        raise
    finally:
        ray.kill(board)
    lost = [number for number in numbers if not sweep.over(number) and number not in keeper.failed]
    if lost:
        reason = keeper.lost.get(lost[0], "Tune was interrupted").removesuffix("; run the same again to go on")
        raise JobError(
            f"{len(lost)} of {len(sweep.jobs)} trials did not come to their end, {sweep.folder_of(lost[0]).stage} for "
            f"one: {reason}; run the same again to go on"
        )
    return keeper.failed


def _scheduler(settings: TuneSettings, jobs: Sequence[TrainJob]) -> TrialScheduler:
    grace = settings.grace_steps or min(job.train.loop.checkpoint_every for job in jobs)
    longest = max(grace, *(job.train.loop.steps for job in jobs)) + 1  # what is at its end is not stopped any more
    if settings.scheduler == "asha":
        return ASHAScheduler(
            time_attr="step", max_t=longest, grace_period=grace, reduction_factor=settings.reduction_factor
        )
    if settings.scheduler == "median":
        # With any finite time slice it pauses trials at their first report, to wait for others': they cannot be paused.
        never = float("inf")
        return MedianStoppingRule(time_attr="step", grace_period=grace, min_time_slice=never)  # type: ignore[arg-type]
    return FIFOScheduler()


class _Keeper(tune.Callback):
    """In the driver: writes down which trials were stopped early, and remembers why others ended before their end.

    Asked to, it ends all trainings and the sweep.

    Attributes:
        failed: Those that would again.
        lost: Those that may go on.
    """

    def __init__(self, sweep: Sweep, board: Any) -> None:
        self._sweep = sweep
        self._board = board
        self._asked = False
        self._trials: list[TuneTrial] = []
        self.failed: dict[int, str] = {}
        self.lost: dict[int, str] = {}

    def ask(self) -> None:
        """Have all trainings stop, and begin no other."""
        self._asked = True
        self._board.stop.remote()

    def end_trainings(self) -> None:
        """Wait until those that were asked have stopped."""
        _end_trainings(self._trials)

    def stop_if_asked(self) -> None:
        """Stop if it was asked for.

        Raises:
            StoppedError: It was; the trainings have ended.
        """
        if self._asked:
            self.end_trainings()
            trials = range(len(self._sweep.jobs))
            over = sum(map(self._sweep.over, trials))
            raise StoppedError(
                f"stopped with {over} of {len(trials)} trials done, as asked; run the same again to go on"
            )

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        self._trials = trials
        self.stop_if_asked()

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        number = trial.config["trial"]
        if not self._sweep.over(number):
            last = {"step": trial.last_result["step"], "metric": trial.last_result["metric"]}
            write_atomic(self._sweep.stopped_url(number), json.dumps(last).encode())
            # Not when Tune does away with the trial: behind its last one it leaves it 10 s.
            _end_trainings([trial])
        _LOG.info("%s", self._sweep.outcome(number, None))

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        number, kept = trial.config["trial"], Path(trial.error_file or "").read_text()
        reason = _reason(kept)
        last_line = kept.strip().rpartition("\n")[2]
        if any(f".{kind.__name__}: " in last_line for kind in _WOULD_AGAIN):
            self.failed[number] = reason
            _LOG.warning("%s", self._sweep.outcome(number, reason))
        else:
            self.lost[number] = reason
            _LOG.warning("%s did not come to its end: %s", self._sweep.folder_of(number).stage, reason)


def _end_trainings(trials: Sequence[TuneTrial]) -> None:
    """Wait until the trainings of trials have stopped, each as soon as its trial is between two steps."""
    actors = [trial.temporary_state.ray_actor for trial in trials if trial.status == TuneTrial.RUNNING]
    stopped: list[Any] = [actor.stop_training.remote() for actor in actors if actor is not None]
    ray.wait(stopped, num_returns=len(stopped), timeout=STOP_SECONDS)


def _reason(kept: str) -> str:
    """In a line what Tune keeps as text: when it was, and a traceback, or of an actor that died how it did."""
    lines = kept.strip().splitlines()[1:] or ["it is not known why"]
    traced = "ray::" in lines[0] or lines[0].startswith("Traceback")
    return re.sub(r"^[\w.]+: ", "", lines[-1]) if traced else lines[0]


class Trial(tune.Trainable):
    """One training of a sweep, as Tune sees it; a step of it is one from checkpoint to checkpoint.

    Of Tune's class kind and not a function: a function's trial that is stopped early is cut off, and its MLflow run
    never ends. And what Ray's `TuneReportCallback` reports last is lost, or stops the trial for ever, if the function
    returns before Tune has asked for it.
    """

    def setup(  # type: ignore[override]  # with_parameters' way
        self, config: dict[str, Any], *, sweep: Sweep, board: Any
    ) -> None:
        """Begin with what the trial has reported before.

        Args:
            config: `trial`: its number.
            sweep: What it is one of.
            board: Where the driver says that all shall stop.
        """
        self._stop_wanted = board.stop_wanted.remote()
        self._sweep, self._number = sweep, config["trial"]
        self._last_step = sweep.jobs[self._number].train.loop.steps
        self._known = deque(sweep.told(self._number))
        self._told = 0.0
        self._queue = Queue(actor_options={"num_cpus": 0})
        self._thread = threading.Thread(target=self._train, name="training", daemon=True)
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._stopping = False
        self._ask: Callable[[], object] | None = None

    def step(self) -> dict[str, Any]:
        """Wait for the next checkpoint, or for the end.

        Returns:
            `step` and `metric`; with `done` where no more will come.

        Raises:
            StoppedError: The sweep shall stop; its training has.
            UsageError, JobError: As `train_stage`.
        """
        if self._known:
            return self._tell(self._known.popleft())
        if not self._sweep.over(self._number):
            self._stop_if_wanted()
            if not self._thread.ident:
                self._thread.start()
            running = True
            while running:
                running = self._thread.is_alive()  # before the look: what was reported at the end is still seen
                report = self._next_report()
                if report is not None:
                    return self._tell(report)
                self._stop_if_wanted()
            if self._error is not None:
                raise self._error
        return {**(self._sweep.stopped(self._number) or self._sweep.reports(self._number)[-1]), "done": True}

    def stop_training(self) -> None:
        """Stop the training if it is under way, in good order: it saves, tells MLflow, and gives its workers back."""
        with self._lock:
            self._stopping = True
            if self._ask is not None:
                self._ask()
        if self._thread.ident:
            self._thread.join(STOP_SECONDS)

    def cleanup(self) -> None:
        """Tune's, when it does away with the trial."""
        self.stop_training()
        self._queue.shutdown(force=True)

    def _stop_if_wanted(self) -> None:
        """Stop if the driver wants all to.

        Raises:
            StoppedError: It does.
        """
        (told, _) = ray.wait([self._stop_wanted], timeout=0)
        if not told:
            return
        with suppress(RayError):  # a board that was lost with its node tells nothing
            ray.get(self._stop_wanted)
            self.stop_training()
            raise StoppedError("stopped, as asked; run the same again to go on")

    def _tell(self, report: dict[str, Any]) -> dict[str, Any]:
        self._told = report["step"]
        return report

    def _next_report(self) -> dict[str, Any] | None:
        """The next report of a new step that Tune may decide on, if there is one soon."""
        try:
            metrics = self._queue.get(timeout=_LOOK_SECONDS)
        except Empty:
            return None
        if self._sweep.metric not in metrics or not self._told < metrics["step"] < self._last_step:
            return None
        return {"step": metrics["step"], "metric": metrics[self._sweep.metric]}

    def _train(self) -> None:
        control = TrainingControl((_Reports(self._queue),), self._stoppable)
        folder = self._sweep.folder_of(self._number)
        try:
            train_stage(self._sweep.jobs[self._number], folder, self._sweep.folder.url, control=control)
        except BaseException as error:  # noqa: BLE001  raised in the thread that Tune calls
            self._error = error

    @contextmanager
    def _stoppable(self, ask: Callable[[], object]) -> Iterator[None]:
        with self._lock:
            self._ask = ask
            if self._stopping:
                ask()
        try:
            yield
        finally:
            with self._lock:
                self._ask = None


class _Reports(UserCallback):
    """In Ray Train's controller: passes on what worker 0 reports with each checkpoint."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self._queue.put_nowait(metrics[0])
