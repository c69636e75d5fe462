"""What every vLLM engine of this project is started with: options, environment and resources from a recipe's settings."""

from typing import Any, Protocol

from selma_ray.cluster.threads import thread_env

__all__ = ["EngineSettings", "engine_bundle", "engine_environment", "engine_options", "in_process_environment"]


class EngineSettings(Protocol):
    """The settings that all models run by vLLM share, whatever they are used for."""

    revision: str | None
    dtype: str
    num_cpus: float
    num_gpus: float
    tensor_parallel_size: int
    max_model_len: int
    kv_cache_gb: int


def engine_options(settings: EngineSettings, *, seeded: bool) -> dict[str, Any]:
    """Return arguments of vLLM's engine by name; `seeded` tells that requests have sampling seeds of their own."""
    options: dict[str, Any] = {
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "disable_log_stats": True,
    }
    if settings.revision:
        options["revision"] = settings.revision
    if not settings.num_gpus:
        options["enforce_eager"] = True  # Compiling costs more time than it saves on the CPU.
        if seeded:
            # vLLM steps a seeded request's generator back after a partial prefill, which a CPU generator cannot do: the engine dies.
            options["enable_chunked_prefill"] = False
    return options


def engine_environment(settings: EngineSettings) -> dict[str, str]:
    """Return the environment variables of an engine on the CPU: its cache, threads and processes; nothing on a GPU."""
    if settings.num_gpus:
        return {}
    environment = {"VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gb), **thread_env(max(1, int(settings.num_cpus)))}
    if settings.tensor_parallel_size == 1:
        # The model then runs in the engine's process, not in one more that imports everything again: threads are set above.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return environment


def in_process_environment(settings: EngineSettings) -> dict[str, str]:
    """Return the environment variables of an engine that runs in the calling process, to be set before vLLM is imported."""
    if settings.num_gpus:
        return {}
    # On the CPU it must not bind its threads to cores that others in this process use.
    in_process = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return engine_environment(settings) | in_process


def engine_bundle(settings: EngineSettings) -> dict[str, float]:
    """Return what Ray reserves for each worker of an engine."""
    return {"CPU": settings.num_cpus} | ({"GPU": settings.num_gpus} if settings.num_gpus else {})
