"""Trains a run in workers of Ray Train, which start again after a fault.

The run's folder alone holds the state: started again, the workers go on from its newest valid checkpoint.
Ray's own checkpoints stay unused.
"""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, VeneerError, option
from veneer.launcher import launched
from veneer.runs.on_ray import cluster
from veneer.runs.on_ray.worker import LOOK, Desk, Plan, rebuilt, work
from veneer.tasks.base.custom import Loss
from veneer.train import group
from veneer.train.folder import layout
from veneer.train.folder.result import Result
from veneer.train.loop import signals
from veneer.train.loop.progress import Voice
from veneer.train.run import Run

ENGINES = ("torch", "ray")
RESTARTS = 2


def chosen(engine: str, workers: int | None, max_restarts: int | None, world: object = None) -> bool:
    """Returns True for Ray. Raises ConfigError for an unknown engine, and settings that it does not have."""
    if engine not in ENGINES:
        raise ConfigError(f"{option('engine')} must be {' or '.join(ENGINES)}, got {engine!r}")
    ray = option("engine", "ray")
    if engine == "ray":
        if world is not None or launched().size > 1:
            raise ConfigError(f"{ray} starts its own processes, got those of a launcher; start it without")
        return True
    for name, value in (("workers", workers), ("max_restarts", max_restarts)):
        if value is not None:
            raise ConfigError(f"{option(name, value)} needs {ray}; torchrun has flags of its own")
    return False


def fit_on_ray(
    run: Run,
    workers: int | None = None,
    max_restarts: int | None = None,
    *,
    progress: bool = True,
    objective: Loss | None = None,
) -> Result:
    """Trains as `fit` in the workers of a TorchTrainer of Ray, and returns the result.

    workers: processes, each with a CPU or GPU; unless given, one for each GPU of the cluster, or one.
    max_restarts: times that all workers start again after one is lost; 2 unless given. The cluster is that of
    ray.init or RAY_ADDRESS; without these, this machine is one during the call. Its machines must share the
    file system. Raises ConfigError, and the errors of `fit`.
    """
    restarts = RESTARTS if max_restarts is None else max_restarts
    if restarts < 0:
        raise ConfigError(f"{option('max_restarts')} must be 0 or more, got {restarts}")
    ray = cluster.module()
    out = Path(run.out).absolute()
    layout.check_free(Path(run.out), run.resume)
    voice, storage = Voice(progress), out.parent / f".{out.name}.ray"
    with cluster.joined(ray):
        n, on_gpu = cluster.places(ray, run, workers)
        plan = Plan(run, ray.remote(num_cpus=0)(Desk).remote(), os.getcwd(), progress, objective)
        voice.tell(f"Ray starts {n} worker{'s' if n > 1 else ''}")
        try:
            failed = _followed(ray, _trainer(plan, n, on_gpu, restarts, storage), plan.desk, voice)
        finally:
            shutil.rmtree(storage, ignore_errors=True)
    if failed is not None:
        many = f"{restarts} restart{'' if restarts == 1 else 's'}"
        resume = option("resume", True)
        raise VeneerError(
            f"the workers ended after {many}: {_reason(failed)}; go on with {resume}"
        ) from failed
    return Result.read(Path(run.out))


def _trainer(plan: Plan, n: int, on_gpu: bool, restarts: int, storage: Path) -> Any:
    """storage: a folder that all machines share, which Ray Train wants."""
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        work,
        train_loop_config={"plan": plan},
        torch_config=TorchConfig("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout_s=int(group.STEP)),
        scaling_config=train.ScalingConfig(num_workers=n, use_gpu=on_gpu),
        run_config=train.RunConfig(
            name="veneer", storage_path=str(storage), failure_config=train.FailureConfig(restarts)
        ),
    )


def _followed(ray: Any, trainer: Any, desk: Any, voice: Voice) -> Exception | None:
    """Trains, says the workers' lines, and returns Ray's error. Raises the error of the training itself.

    Threads call Ray: within a call of Ray a signal would become a SystemError. The first signal has all
    workers save and end.
    """
    failed: list[Exception] = []
    errors: list[Any] = []

    def train() -> None:
        try:
            trainer.fit()
        except Exception as e:  # Ray's own, and all that it passes on
            failed.append(e)

    def listen() -> None:
        ended = told = False
        while not ended:
            training.join(LOOK)
            ended = not training.is_alive()
            if wish.number and not told:
                told = True
                desk.stop.remote(wish.number)
            lines, error = ray.get(desk.news.remote())
            for line in lines:
                voice.tell(line)
        errors.append(error)

    training, listening = (threading.Thread(target=f, daemon=True) for f in (train, listen))
    with signals.listening(alone=False) as wish:
        training.start()
        listening.start()
        while listening.is_alive():
            listening.join(LOOK)
    if errors and errors[0] is not None:
        raise rebuilt(*errors[0])
    return failed[0] if failed else None


def _reason(failed: Exception) -> str:
    """Returns the last line of the first worker's error, or of Ray's own."""
    errors = sorted(getattr(failed, "worker_failures", {}).items()) or [(None, failed)]
    rank, error = errors[0]
    lines = str(error).strip().splitlines() or [type(error).__name__]
    last = lines[-1].strip()
    return last if rank is None else f"process {rank}: {last}"
