"""The run configuration: YAML file + `dotted.key=value` overrides -> one validated `Config`."""

from jlora.config.data import Counted, DataSource
from jlora.config.lora import (
    ALL_PROJECTIONS,
    ATTENTION_PROJECTIONS,
    FUSED_PROJECTIONS,
    MLP_PROJECTIONS,
    PROJECTIONS,
    LoraSection,
)
from jlora.config.reading import config_of, describe, load_config, overridden, variants
from jlora.config.section import nearest
from jlora.config.sections import (
    FORMER_REMAT,
    Config,
    DataSection,
    DistributedSection,
    MeshSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    Remat,
    TrainingSection,
)
from jlora.config.yaml_text import read_yaml, read_yaml_of, yaml_scalar
