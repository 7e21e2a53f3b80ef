"""What loading and saving ask of a model: this room may not import `models`, which imports it."""

from collections.abc import Mapping
from typing import Any, Protocol

from configs.sizes import MedConfig
from transform.text import CaptionTokenizer


class HasConfig(Protocol):
    """A text encoder."""

    @property
    def config(self) -> MedConfig: ...


class RetrievalModel(Protocol):
    """Official names in its state dict, a text encoder with its sizes, and momentum twins."""

    vit: str
    tokenizer: CaptionTokenizer

    @property
    def text_encoder(self) -> HasConfig: ...

    def state_dict(self, *, keep_vars: bool = False) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any: ...

    def copy_params(self) -> None: ...
