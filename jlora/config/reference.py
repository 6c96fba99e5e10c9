"""The configuration as documentation: a table a section, made from the models."""

import json
import re
from typing import Any, get_args

from jlora.config.sections import SECTIONS, Config
from jlora.config.yaml_text import yaml_scalar


def reference() -> str:
    """The configuration reference as Markdown, one table a section, made from the models above."""
    lines = [
        "# Configuration reference",
        "",
        "Every key of a run, with its default. Set it in the YAML file, or on the command line as `dotted.key=value`.",
        "Each key has an anchor, such as `config.md#lora.rank`. Configs to copy: [Cookbook](cookbook.md). Which rank,",
        "rate and epochs: [Your own data](your-data.md#rank-rate-epochs). Words: [Glossary](glossary.md).",
        "",
        "`jlora config` prints this page. YAML anchors and merge keys (`&`, `*`, `<<`) are refused; write the value",
        "itself.",
        "",
        "An editor with a YAML language server checks and completes a config whose first line is",
        "",
        "```yaml",
        "# yaml-language-server: $schema=../docs/config.schema.json",
        "```",
        "",
        "with the path of [the JSON schema](config.schema.json), which `jlora config --schema` prints.",
    ]
    top = {name: field for name, field in Config.model_fields.items() if name not in SECTIONS}
    for name, fields in {"Top level": top, **{name: each.model_fields for name, each in SECTIONS.items()}}.items():
        lines += ["", f"## {name}", "", *_table("" if name == "Top level" else f"{name}.", fields)]
    return "\n".join(lines) + "\n"


def _table(prefix: str, fields: Any) -> list[str]:
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for name, field in fields.items():
        default = "required" if field.is_required() else f"`{yaml_scalar(field.default)}`"
        choices = [f"`{choice}`" for choice in get_args(field.annotation) if isinstance(choice, str)]
        meaning = field.description + (f" ({', '.join(choices)})" if choices and len(choices) > 1 else "")
        meaning = re.sub(r"\bdocs/(\w+)\.md", r"[\1.md](\1.md)", meaning)
        anchor = f"{prefix}{name}"
        rows.append(f'| <a id="{anchor}"></a>[`{name}`](#{anchor}) | {default} | {meaning} |')
    return rows


def json_schema() -> str:
    """The configuration as a JSON schema, by which an editor checks and completes a config file."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Config.model_json_schema()
    return json.dumps(schema | {"title": "jlora configuration"}, indent=1, ensure_ascii=False) + "\n"
