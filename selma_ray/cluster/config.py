"""How a run reaches Ray and places its roles."""

from typing import Literal

from pydantic import Field

from selma_ray.config import StrictModel

__all__ = ["ClusterConfig", "Role"]

Role = Literal["llm", "render", "train", "serve"]


class ClusterConfig(StrictModel):
    """How a run reaches Ray and places its roles."""

    address: str | None = None
    """Address of a running cluster; default: that of RAY_ADDRESS, or else a local one is started."""
    num_cpus: int | None = Field(default=None, ge=1)
    """Logical CPUs of a local cluster; default: the machine's. With more, processes of several threads each are several times slower."""
    object_store_memory_gb: float = Field(default=1.0, gt=0.1)
    """Shared memory of a local cluster's object store, in GB."""
    use_labels: bool = False
    """Place each role on nodes labelled role=llm, render, train or serve, as cluster.yaml's worker groups are."""
    logical_gpus: bool = False
    """GPUs exist for scheduling alone, as in a rehearsal (RAY_OVERRIDE_RESOURCES): roles that ask for some compute on the CPU."""
    gpu_memory_gb: float | None = Field(default=None, gt=0)
    """Memory of a GPU, which the recipe must fit; default: the nodes with GPUs are asked."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "WARNING"
    """Level of the logs of workers and of selma_ray itself."""
