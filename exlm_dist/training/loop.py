"""The training loop, and how a run ends: done, saved on request, or with a message that every rank's launcher gets to
see."""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING

from exlm_dist.config import RunConfig
from exlm_dist.launch import heartbeat
from exlm_dist.training.interruption import Deadline, Interruption
from exlm_dist.training.pace import Pace
from exlm_dist.utils.errors import EXIT_DONE, EXIT_SAVED, UserError, leave_message
from exlm_dist.utils.logs import get_logger

if TYPE_CHECKING:
    from exlm_dist.training.session import Session

logger = get_logger(__name__)


def train(config: RunConfig) -> int:
    """Train, or continue, the run `config` as one rank of the job that the environment describes; the exit code.

    0: the run is finished; 75: saved because a signal or the end of the job's time asked for it, the same command
    continues. UserError and whatever else went wrong is raised, after the other ranks have been told.
    """
    interruption = Interruption()
    heartbeat.start(config.watchdog, f"{config.runs}/{config.name}")
    interruption.deadline = Deadline.of_job(config.launch)
    # Heavy imports come after the signal handlers, so that no signal is lost to them.
    from exlm_dist.parallel import process as processes
    from exlm_dist.training.session import Session

    session = None
    try:
        session = Session(config, processes.start(config.launch, config.parallel))
        code = run(session, interruption)
        session.shut_down()
        processes.finish()
    except BaseException as error:
        raise _report_to_peers(error, session) from None
    finally:
        interruption.restore()
    session.close("FINISHED" if code == EXIT_DONE else "KILLED")
    _stop_heartbeat()
    return code


def run(session: Session, interruption: Interruption) -> int:
    """The outer loop."""
    config = session.config
    if not session.open():
        logger.info("%s is finished at step %d: nothing to do. Results: %s", config.name, session.step, session.path)
        return EXIT_DONE
    if session.step and session.evaluation is None and session.evaluation_is_due():
        session.evaluate()  # the signal that ended the last launch left no time for it
    pace = Pace()
    while session.step < config.schedule.steps:
        with pace.phase("step"):
            session.train_step()
            session.attend_save()
        heartbeat.enter("step")
        last = session.step == config.schedule.steps
        evaluate, save = session.evaluation_is_due(), session.save_is_due()
        ahead = pace.until_next_edge(evaluate) + session.seconds_to_save(due=save)
        stop = interruption.agreed(session.process, ahead) and not last
        if evaluate and not stop:
            with pace.phase("evaluation"):
                session.evaluate()
        if save or stop:
            with pace.phase("save"):
                session.save(needed=stop or last)
        if stop:
            logger.info("%s is saved at step %d; the same command continues it", config.name, session.step)
            heartbeat.enter("end")
            return EXIT_SAVED
    heartbeat.enter("end")
    return EXIT_DONE


def _report_to_peers(error: BaseException, session: Session | None) -> BaseException:
    """Let the other ranks and the launcher know of `error`; returns what is to be raised here."""
    from exlm_dist.parallel import process as processes

    if not isinstance(error, UserError) and processes.lost_peer(error):
        lost = processes.PeerLost(
            f"another rank ended or did not answer within launch.timeout; its own message says why "
            f"({str(error).splitlines()[0]})"
        )
        error = lost.with_traceback(error.__traceback__)
    leave_message(error)
    heartbeat.enter("end")
    if processes.must_exit_hard():
        traceback.print_exception(error)
        sys.stderr.flush()
        os._exit(getattr(error, "exit_code", 1))
    processes.leave()
    if session is not None:
        session.close("FAILED")
    _stop_heartbeat()
    return error


def _stop_heartbeat() -> None:
    """A rank of a job ends right after its training, and is watched until it is gone: letting go of a model takes a
    while, and one that is stopped meanwhile would keep the job for ever."""
    if "RANK" not in os.environ:
        heartbeat.stop()
