"""Who may die, who is started again, and what is said: with real processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import standins

from slime_async.cli.launch_local import LocalLauncher
from slime_async.cli.supervise import RunError, RunPlan, Supervisor
from slime_async.protocol import Scalar

EXIT_WHEN_RESTARTED = """
record()
wanted = run / "pids" / "actor-0.1"
import time
while not wanted.exists(): time.sleep(0.02)
"""
"""A learner that is done once the actor was started again"""


def supervise(
    run: Path, plan: RunPlan, wanted_actors: Callable[[], int | None] = lambda: None
) -> list[tuple[str, Mapping[str, Scalar]]]:
    """Run the plan to its end; returns the events, or raises as the supervisor does. Nothing may be left running."""
    events: list[tuple[str, Mapping[str, Scalar]]] = []

    async def work() -> None:
        supervisor = Supervisor(
            LocalLauncher(run / "logs"), plan, lambda name, fields: events.append((name, fields)), wanted_actors
        )
        try:
            async with asyncio.timeout(standins.DEADLINE_S):
                await supervisor.start()
                await supervisor.wait()
        finally:
            await supervisor.stop()

    try:
        asyncio.run(work())
    finally:
        standins.wait_until_dead([int(path.read_text()) for path in (run / "pids").iterdir() if path.suffix != ".tmp"])
    return events


def test_a_run_ends_when_its_learner_is_done_and_the_others_leave(tmp_path: Path) -> None:
    leave = "import time\nwhile not (run / 'pids' / 'learner').exists(): time.sleep(0.02)\n"
    plan = standins.make_plan(tmp_path, hub=standins.HUB + leave, actor="record()\n" + leave, learner="record()")
    assert supervise(tmp_path, plan) == []


def test_a_dead_actor_is_started_again_under_a_new_name(tmp_path: Path) -> None:
    actor = "record()\nif name == 'actor-0': os.kill(os.getpid(), signal.SIGKILL)"
    leave = "import time\nwhile not (run / 'pids' / 'actor-0.1').exists(): time.sleep(0.02)\n"
    plan = standins.make_plan(
        tmp_path, hub=standins.HUB + leave, actor=actor, learner=EXIT_WHEN_RESTARTED, max_restarts=1
    )
    plan_events = supervise(tmp_path, plan)
    assert plan_events == [
        ("role_died", {"role": "actor", "process": "actor-0", "exit_code": -9}),
        ("role_restarted", {"role": "actor", "process": "actor-0.1", "restarts": 1}),
    ]


def test_actors_are_added_and_asked_to_leave_while_the_run_goes_on(tmp_path: Path) -> None:
    actor = "signal.signal(signal.SIGTERM, lambda *_: (record('.left'), sys.exit(143)))\nrecord()\nsignal.pause()"
    learner = "record()\nimport time\nwhile not (run / 'pids' / 'actor-1.left').exists(): time.sleep(0.02)\n"
    leave = "import time\nwhile not (run / 'pids' / 'actor-1.left').exists(): time.sleep(0.02)\n"
    plan = standins.make_plan(tmp_path, hub=standins.HUB + leave, actor=actor, learner=learner)

    def wanted() -> int:
        return 1 if (tmp_path / "pids" / "actor-2").exists() and (tmp_path / "pids" / "actor-1").exists() else 3

    events = supervise(tmp_path, plan, wanted)
    assert events[:4] == [
        ("role_added", {"role": "actor", "process": "actor-1"}),
        ("role_added", {"role": "actor", "process": "actor-2"}),
        ("role_leaving", {"role": "actor", "process": "actor-2"}),
        ("role_leaving", {"role": "actor", "process": "actor-1"}),
    ]
    assert {name for name, _ in events[4:]} <= {"role_left"}


def test_an_actor_that_its_scheduler_preempts_is_replaced_and_not_counted(tmp_path: Path) -> None:
    actor = "record()\nif name == 'actor-0': sys.exit(143)\nsignal.pause()"
    leave = "import time\nwhile not (run / 'pids' / 'actor-0.1').exists(): time.sleep(0.02)\n"
    plan = standins.make_plan(
        tmp_path, hub=standins.HUB + leave, actor=actor, learner=EXIT_WHEN_RESTARTED, max_restarts=0
    )
    assert supervise(tmp_path, plan)[1] == ("role_restarted", {"role": "actor", "process": "actor-0.1", "restarts": 0})


def test_restarts_are_counted_over_all_actors_and_run_out(tmp_path: Path) -> None:
    plan = standins.make_plan(tmp_path, actor="record()\nprint('no luck')\nsys.exit(3)", actors=2, max_restarts=2)
    with pytest.raises(RunError) as failure:
        supervise(tmp_path, plan)
    assert "exited with code 3, and all 2 of actor.max_restarts are used up" in str(failure.value)
    assert "| no luck" in str(failure.value)
    assert failure.value.exit_code == 1


def test_the_death_of_the_hub_ends_the_run_and_shows_the_end_of_its_log(tmp_path: Path) -> None:
    hub = standins.HUB + "print('the last words', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(RunError) as failure:
        supervise(tmp_path, standins.make_plan(tmp_path, hub=hub))
    assert str(failure.value).startswith("hub was killed by SIGKILL")
    assert str(tmp_path / "logs" / "hub.log") in str(failure.value)
    assert "| the last words" in str(failure.value)


def test_a_learner_that_fails_ends_the_run_and_shows_its_exit_code(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^learner exited with code 7; last lines of .*learner\.log"):
        supervise(tmp_path, standins.make_plan(tmp_path, learner="record()\nsys.exit(7)"))


def test_a_killed_hub_and_a_failed_learner_are_started_again_under_new_names(tmp_path: Path) -> None:
    wait = "import time\nwhile not (run / 'pids' / 'learner.1').exists(): time.sleep(0.02)\n"
    hub = standins.HUB + "if name == 'hub':\n    os.kill(os.getpid(), signal.SIGKILL)\n" + wait
    learner = "import time\nwhile not (run / 'pids' / 'hub.1').exists(): time.sleep(0.02)\n"
    learner += "record()\nsys.exit(1 if name == 'learner' else 0)"
    plan = standins.make_plan(
        tmp_path, hub=hub, actor="record()\n" + wait, learner=learner, hub_restarts=1, learner_restarts=1
    )
    assert supervise(tmp_path, plan) == [
        ("role_died", {"role": "hub", "process": "hub", "exit_code": -9}),
        ("role_restarted", {"role": "hub", "process": "hub.1", "restarts": 1}),
        ("role_died", {"role": "learner", "process": "learner", "exit_code": 1}),
        ("role_restarted", {"role": "learner", "process": "learner.1", "restarts": 1}),
    ]


def test_a_hub_that_gives_up_is_not_started_again(tmp_path: Path) -> None:
    hub = standins.HUB + "print('no space left', flush=True)\nsys.exit(1)"
    with pytest.raises(RunError, match=r"(?s)^hub exited with code 1; .*no space left"):
        supervise(tmp_path, standins.make_plan(tmp_path, hub=hub, hub_restarts=3))


def test_restarts_of_the_learner_run_out(tmp_path: Path) -> None:
    plan = standins.make_plan(tmp_path, learner="record()\nsys.exit(7)", learner_restarts=1)
    with pytest.raises(
        RunError, match=r"^learner\.1 exited with code 7, and all 1 of learner\.max_restarts are used up"
    ):
        supervise(tmp_path, plan)


def test_the_address_of_an_earlier_hub_is_not_taken_for_the_present_one(tmp_path: Path) -> None:
    plan = standins.make_plan(tmp_path, hub="record()\nprint('address in use')\nsys.exit(4)")
    plan.ready_file.write_text("tcp://127.0.0.1:9")
    with pytest.raises(RunError, match="hub exited with code 4"):
        supervise(tmp_path, plan)


def test_a_role_that_the_user_must_help_is_not_started_again(tmp_path: Path) -> None:
    actor = "record()\nprint('slime-async: model.path is wrong')\nsys.exit(2)"
    with pytest.raises(RunError) as failure:
        supervise(tmp_path, standins.make_plan(tmp_path, actor=actor))
    assert str(failure.value) == "actor-0 refused to run:\nslime-async: model.path is wrong"
    assert failure.value.exit_code == 2
    assert not (tmp_path / "pids" / "actor-0.1").exists()


def test_a_hub_that_dies_before_it_listens_is_named_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"(?s)^hub exited with code 4; .*address in use"):
        supervise(tmp_path, standins.make_plan(tmp_path, hub="record()\nprint('address in use')\nsys.exit(4)"))


def test_what_a_dead_actor_had_started_goes_with_it(tmp_path: Path) -> None:
    actor = standins.WITH_CHILD.replace("signal.pause()\n", "os.kill(os.getpid(), signal.SIGKILL)\n")
    assert actor != standins.WITH_CHILD
    with pytest.raises(RunError, match="used up"):
        supervise(tmp_path, standins.make_plan(tmp_path, actor=actor, max_restarts=0))
    assert (tmp_path / "pids" / "actor-0.child").exists()


def test_who_fell_with_another_is_not_blamed_and_not_started_again(tmp_path: Path) -> None:
    fall = "import time\nwhile not (run / 'pids' / 'learner').exists(): time.sleep(0.02)\nsys.exit(75)\n"
    learner = "record()\nimport time\ntime.sleep(0.5)\nprint('what really happened')\nsys.exit(1)"
    plan = standins.make_plan(tmp_path, hub=standins.HUB + fall, actor="record()\n" + fall, learner=learner)
    with pytest.raises(RunError) as failure:
        supervise(tmp_path, plan)
    assert "learner exited with code 1" in str(failure.value)
    assert "| what really happened" in str(failure.value)
