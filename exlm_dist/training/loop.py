"""The training loop, and how a launch ends: done, saved on request, or with a message that reaches the launchers of
all ranks."""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING

from exlm_dist.config import RunConfig
from exlm_dist.launch import heartbeat
from exlm_dist.training.advice import lower_rate
from exlm_dist.training.interruption import Deadline, Interruption
from exlm_dist.training.pace import Pace
from exlm_dist.training.resources import Resources
from exlm_dist.utils.errors import EXIT_DONE, EXIT_SAVED, Diverged, RunStopped, UserError, leave_message
from exlm_dist.utils.logs import get_logger

if TYPE_CHECKING:
    from exlm_dist.training.session import Session

logger = get_logger(__name__)


def train(config: RunConfig, *, allow_changes: bool = False) -> int:
    """Train, or continue, the run `config` as one rank of the job that the environment describes; the exit code.
    `allow_changes`: of settings that do not change what was learned, since the checkpoint that it continues from.

    0: the run is finished; 75: saved because a signal or the end of the job's time asked for it, the same command
    continues. UserError and whatever else went wrong is raised, after the other ranks have been told.
    """
    interruption = Interruption()
    heartbeat.start(config.watchdog, f"{config.runs}/{config.name}")
    interruption.deadline = Deadline.of_job(config.launch)
    # Heavy imports come after the signal handlers, so that no signal is lost to them.
    from exlm_dist.parallel import process as processes

    resources = Resources()
    try:
        code = _launch(config, interruption, resources, allow_changes)
        processes.finish()
    except BaseException as error:
        raise _report_to_peers(error, resources) from None
    finally:
        interruption.restore()
    resources.status = "FINISHED" if code == EXIT_DONE else "KILLED"
    resources.close()
    _stop_heartbeat()
    return code


def _launch(config: RunConfig, interruption: Interruption, resources: Resources, allow_changes: bool) -> int:
    """Join the other ranks, build the session and run the loop."""
    from exlm_dist.parallel import process as processes
    from exlm_dist.training.session import build_session
    from exlm_dist.training.starting_point import find_starting_point

    heartbeat.enter("start/meet")
    process = processes.start(config.launch, config.parallel)
    start = find_starting_point(config, process, resources, allow_changes=allow_changes)
    if start.step >= config.schedule.steps:
        logger.info(
            "%s is finished at step %d: nothing to do (more schedule.steps train on). Results: %s",
            config.name,
            start.step,
            start.path,
        )
        heartbeat.enter("end")
        return EXIT_DONE
    session = build_session(config, process, start, resources)
    code = run(session, interruption)
    session.engine.close()  # while the other ranks are still there
    return code


def run(session: Session, interruption: Interruption) -> int:
    """The outer loop. Where training has diverged, what was good is saved before RunStopped is raised."""
    try:
        return _steps(session, interruption)
    except Diverged as error:
        session.checkpointer.finish()
        raise RunStopped(f"{error}\n{lower_rate(session.config)}") from None


def _steps(session: Session, interruption: Interruption) -> int:
    config, evaluator, checkpointer = session.config, session.evaluator, session.checkpointer
    if (session.step or config.init) and session.evaluation is None and evaluator.is_due(session.step):
        # The signal that ended the last launch left no time for it; or the run begins with weights that are worth it.
        session.evaluate()
    heartbeat.enter("start/first step")
    pace = Pace()
    while session.step < config.schedule.steps:
        with pace.phase("step"):
            session.train_step()
            checkpointer.attend()
        heartbeat.enter("step")
        last = session.step == config.schedule.steps
        evaluation_due, save_due = evaluator.is_due(session.step), checkpointer.is_due(session.step)
        ahead = pace.until_next_edge(evaluation_due) + checkpointer.seconds_to_save(due=save_due)
        stop = interruption.agreed(session.process, ahead) and not last
        if evaluation_due and not stop:
            with pace.phase("evaluation"):
                session.evaluate()
        if save_due or stop:
            with pace.phase("save"):
                checkpointer.save(session.step, session.evaluation, needed=stop or last)
        if stop:
            logger.info("%s is saved at step %d; the same command continues it", config.name, session.step)
            heartbeat.enter("end")
            return EXIT_SAVED
    heartbeat.enter("end")
    return EXIT_DONE


def _report_to_peers(error: BaseException, resources: Resources) -> BaseException:
    """Let the other ranks and the launcher know of `error`; returns what is to be raised here."""
    from exlm_dist.parallel import process as processes

    if not isinstance(error, UserError) and processes.lost_peer(error):
        lost = processes.PeerLost(
            f"another rank ended or did not answer within launch.timeout; its own message says why "
            f"({str(error).splitlines()[0]})"
        )
        error = lost.with_traceback(error.__traceback__)
    leave_message(error)
    heartbeat.enter("failure")
    if processes.must_exit_hard():
        traceback.print_exception(error)
        sys.stderr.flush()
        os._exit(getattr(error, "exit_code", 1))
    processes.leave()
    resources.close()
    _stop_heartbeat()
    return error


def _stop_heartbeat() -> None:
    """A rank of a job ends right after its training, and is watched until its process is gone: freeing a model takes a
    while, and one that hangs meanwhile would keep the job for ever."""
    if "RANK" not in os.environ:
        heartbeat.stop()
