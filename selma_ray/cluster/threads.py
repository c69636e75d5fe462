"""How many threads numeric libraries take; Ray gives an actor of less than one CPU a single one. Loads no Ray."""

__all__ = ["thread_env"]


def thread_env(num_threads: int) -> dict[str, str]:
    """Return the environment variables that hold numeric libraries to `num_threads`."""
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(num_threads))
