"""The paths of a config: where they lie, and the same config read from another folder."""

from pathlib import Path
from typing import Any

from jlora.config.sections import Config


def places_of(cfg: Config) -> dict[str, str]:
    """The relative paths of a config that lead to something here, as they were typed -> absolute."""
    template = cfg.data.chat_template if Path(cfg.data.chat_template or "").is_file() else None  # not one that is named
    typed = (cfg.model.path, cfg.model.tokenizer, cfg.lora.init_from, template, cfg.data.eval)
    texts = [text for text in (*typed, *(source.path for source in cfg.data.sources)) if isinstance(text, str)]
    return {text: str(Path(text).absolute()) for text in texts if not Path(text).is_absolute() and Path(text).exists()}


def relocated(cfg: Config, places: dict[str, str]) -> Config:
    """A config whose relative paths lead to where they led from the folder that it was trained in.

    What lies where a path leads from here goes first, as where a run and its base were moved together.

    Args:
      places: see `places_of`.
    """

    def there(path: Any) -> Any:
        return path if not isinstance(path, str) or Path(path).exists() else places.get(path, path)

    data, train = cfg.data, cfg.data.train
    sources = train if isinstance(train, str) else [one.model_copy(update={"path": there(one.path)}) for one in train]
    changes = {
        "model": {"path": there(cfg.model.path), "tokenizer": there(cfg.model.tokenizer)},
        "lora": {"init_from": there(cfg.lora.init_from)},
        "data": {"train": there(sources), "eval": there(data.eval), "chat_template": there(data.chat_template)},
    }
    return cfg.model_copy(update={name: getattr(cfg, name).model_copy(update=new) for name, new in changes.items()})
