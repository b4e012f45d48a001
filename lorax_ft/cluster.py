"""Cluster: what Ray's workers compute, and one run by several of them as its processes.

Ray Train's JaxTrainer starts the processes and connects them by `jax.distributed`; when one is
lost, all are started again, and the run goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import pathlib
import shutil
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from lorax_ft import experiment, runs
from lorax_ft.config import ExperimentConfig

RETRIES = 5  # after which work that workers die of is given up
# Of workers. Ray Train's own printing would tell what all but the first process are quiet about.
ENVIRONMENT = {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}


class Preempted(Exception):
    """SIGTERM stopped a worker, which had saved; Ray hands its work on."""


@contextlib.contextmanager
def ray_cluster() -> Iterator[Any]:
    """Gives `ray`, connected to the cluster that RAY_ADDRESS names or to one started here.

    Raises ImportError where Ray is missing, ConnectionError where it cannot be reached.
    """
    ray, address = load_engine("ray"), os.environ.get("RAY_ADDRESS") or "local"
    ours = not ray.is_initialized()
    if ours:
        _check_reachable(address)
        try:
            ray.init(address=address)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConnectionError(f"RAY_ADDRESS={address} cannot be used: {error}") from error
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def train(
    config: ExperimentConfig,
    run_dir: str | pathlib.Path,
    resources: Mapping[str, Any],
    *,
    command: str = "",
) -> dict[str, Any]:
    """`experiment.train` by workers of a Ray cluster; see `ray_cluster` for which.

    `resources` has the names of `ray.train.ScalingConfig`: num_workers, use_gpu, topology and so
    on; without use_gpu and use_tpu they compute on CPUs. Workers need this library, the run
    directory and the folders that the config names, on storage that they share with this machine.

    Raises what `experiment.train` raises in a worker, ValueError for resources that there are not
    and for a config with processes of its own, and ConnectionError where workers were lost more
    than `RETRIES` times.
    """
    if config.processes is not None:
        raise ValueError("config.processes: with --launcher=ray its workers are the processes.")
    directory = pathlib.Path(run_dir).absolute()
    runs.check_run(directory, config)
    scaling = _scaling(resources)
    with ray_cluster():
        work = functools.partial(_work, config, directory, pathlib.Path.cwd(), command)
        for _ in range(RETRIES + 1):
            lost = _fit(work, scaling, directory)
            if lost is None:
                return runs.read_results(directory) or {}
            print(f"Workers are started again, since one was lost: {lost}", flush=True)
    raise ConnectionError(
        f"Workers of Ray were lost {RETRIES + 1} times, at last: {lost}. The same command goes on "
        "from the last checkpoint."
    )


def load_engine(package: str, extra: str | None = None) -> Any:
    """An engine's package. Raises ImportError, naming the extra of this library that has it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        extra = extra or package.partition(".")[0]
        raise ImportError(
            f"--launcher={extra} needs {package}: pip install 'lorax_ft[{extra}]'."
        ) from None


def _scaling(resources: Mapping[str, Any]) -> Any:
    """The `ScalingConfig` of resources. Raises ValueError for what there is not."""
    train = load_engine("ray.train")
    try:
        found = train.ScalingConfig(**resources)
    except (ValueError, TypeError, DeprecationWarning) as error:
        raise ValueError(f"--launcher=ray: resources {dict(resources)}: {error}") from error
    if not isinstance(found.num_workers, int) or found.num_workers < 1:
        raise ValueError(
            f"--launcher=ray: num_workers must be at least 1, got {found.num_workers}."
        )
    return found


def _fit(work: Any, scaling: Any, directory: pathlib.Path) -> str | None:
    """Runs `work` in every worker; answers what was lost, or None where all has been done."""
    import ray.train
    from ray.exceptions import RayError
    from ray.train.v2.jax import JaxConfig, JaxTrainer

    on_cpus = not (scaling.use_tpu or scaling.use_gpu)
    environment = ENVIRONMENT | ({"JAX_PLATFORMS": "cpu"} if on_cpus else {})
    trainer = JaxTrainer(
        work,
        # Ray connects the processes of accelerators alone, and by this name those of CPUs too.
        jax_config=JaxConfig(use_tpu=scaling.use_tpu, use_gpu=not scaling.use_tpu),
        scaling_config=scaling,
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=str(directory),
            worker_runtime_env={"env_vars": environment},
        ),
    )
    try:
        trainer.fit()
        return None
    except ray.train.WorkerGroupError as error:
        causes = [_cause(failure) for failure in error.worker_failures.values()]
        dead = [cause for cause in causes if isinstance(cause, RayError)]
        others = [c for c in causes if not isinstance(c, (ConnectionError, Preempted))]
        if others and not dead:  # of the dead the others' errors may come
            raise others[0] from error
        return " ".join(str([*dead, *causes][0]).split())
    finally:
        shutil.rmtree(directory / "ray", ignore_errors=True)
        with contextlib.suppress(OSError):  # it holds a run
            directory.rmdir()


def _work(
    config: ExperimentConfig, directory: pathlib.Path, folder: pathlib.Path, command: str
) -> None:
    """What a worker does; `folder` is what paths of the config are relative to."""
    import jax
    import ray.train

    if ray.train.get_context().get_world_size() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"Ray did not connect its workers, since JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}: "
            "it does so for cpu, cuda and tpu."
        )
    # Ray Train numbers a worker's GPUs from 0, which on a shared machine are another worker's.
    if given := ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(given)
    logging.getLogger("absl").setLevel(logging.WARNING)  # Ray Train would tell all of orbax's
    os.chdir(folder)
    results = experiment.train(config, directory, command=command)
    if results.get("outcome") == "preempted":
        raise Preempted(f"SIGTERM stopped it after step {results['step']}.")


def _cause(failure: Any) -> Exception:
    """What a worker raised, or what was found wrong with it, without Ray Train's wrapping."""
    for name in ("_base_exc", "health_check_failure"):
        failure = getattr(failure, name, failure)
    return failure


def _check_reachable(address: str) -> None:
    """Raises ConnectionError at once where nothing listens; Ray itself would wait for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:  # "local", "auto", or what Ray will refuse
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"RAY_ADDRESS={address} cannot be reached: {error}. Start that cluster, or unset "
            "RAY_ADDRESS to start one here."
        ) from error
