"""The run configuration: YAML file + `dotted.key=value` overrides -> one validated `Config`."""

from jlora.config.reading import describe, load_config, parse_yaml
from jlora.config.reference import reference, yaml_scalar
from jlora.config.sections import (
    ATTENTION_PROJECTIONS,
    MLP_PROJECTIONS,
    PROJECTIONS,
    Config,
    DataSection,
    DistributedSection,
    LoraSection,
    MeshSection,
    ModelSection,
    OptimizerSection,
    Quantization,
    Remat,
    Section,
    TrainingSection,
)

__all__ = [
    "ATTENTION_PROJECTIONS",
    "MLP_PROJECTIONS",
    "PROJECTIONS",
    "Config",
    "DataSection",
    "DistributedSection",
    "LoraSection",
    "MeshSection",
    "ModelSection",
    "OptimizerSection",
    "Quantization",
    "Remat",
    "Section",
    "TrainingSection",
    "describe",
    "load_config",
    "parse_yaml",
    "reference",
    "yaml_scalar",
]
