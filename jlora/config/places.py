"""The sections of a run's configuration that say where it is computed: on which devices, and in which processes."""

from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from jlora.config.section import Section


class MeshSection(Section):
    """How devices share the work."""

    data: int = Field(1, description="devices over which batches are split, weights copied")
    fsdp: int = Field(-1, description="devices over which batches and weights are split; -1: the rest")
    tensor: int = Field(1, description="devices over which heads and mlp are split")

    @model_validator(mode="after")
    def _one_rest(self) -> "MeshSection":
        sizes = (self.data, self.fsdp, self.tensor)
        if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
            raise ValueError("axes are positive device counts, and at most one is -1 (the rest)")
        return self


class DistributedSection(Section):
    """Several processes as one job. Left alone, SLURM, TPU pods, Kubernetes and Open MPI are detected."""

    coordinator: str | None = Field(None, description="host:port of process 0; null: detected, or one process alone")
    num_processes: PositiveInt | None = Field(None, description="processes of the job")
    process_id: Annotated[int, Field(ge=0)] | None = Field(
        None, description="number of this process, from 0; the one key in which the hosts of a job differ"
    )
    start_timeout: PositiveInt = Field(300, description="seconds in which all processes must have started")
    host_timeout: PositiveInt = Field(100, description="seconds after which a silent process ends the job")
    step_timeout: PositiveInt = Field(
        1800, description="seconds without a finished step after which a job of several processes ends"
    )

    @model_validator(mode="after")
    def _all_or_none(self) -> "DistributedSection":
        if len({self.coordinator is None, self.num_processes is None, self.process_id is None}) > 1:
            raise ValueError("set coordinator, num_processes and process_id, or none of them")
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdigit():
            raise ValueError(f"coordinator must be host:port, not '{self.coordinator}'")
        if self.process_id is not None and self.num_processes is not None and self.process_id >= self.num_processes:
            raise ValueError(f"process_id {self.process_id} must be below num_processes {self.num_processes}")
        return self
