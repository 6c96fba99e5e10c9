"""The run configuration: YAML file + `dotted.key=value` overrides -> one validated `Config`."""

from jlora.config.mixture import Source
from jlora.config.reading import describe, load_config, read_yaml, read_yaml_of
from jlora.config.reference import json_schema, reference, yaml_scalar
from jlora.config.section import Section, nearest
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
    ObjectiveSection,
    OptimizerSection,
    Quantization,
    Remat,
    ResumeSection,
    TrainingSection,
)
from jlora.config.variants import variants

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
    "ObjectiveSection",
    "OptimizerSection",
    "Quantization",
    "Remat",
    "ResumeSection",
    "Section",
    "Source",
    "TrainingSection",
    "describe",
    "json_schema",
    "load_config",
    "nearest",
    "read_yaml",
    "read_yaml_of",
    "reference",
    "variants",
    "yaml_scalar",
]
