"""Owns our model as one folder has it whole, with its tower: `trust_remote_code` loads this class.

A copy of this file, and of those that it imports, stands in the folder: see `remote`.
"""

from model.model_vlm import MiniMindVLM, VLMConfig
from model.vision.kinds import KINDS


class MiniMindVForConditionalGeneration(MiniMindVLM):
    """`MiniMindVLM` with a tower that is built by `config.vision_config` and loaded with the rest.

    Raises:
        ValueError: the config describes no tower.
    """

    _keys_to_ignore_on_save = None  # type: ignore[assignment]
    _keys_to_ignore_on_load_missing = None  # type: ignore[assignment]
    _keys_to_ignore_on_load_unexpected = None  # type: ignore[assignment]

    def __init__(self, config: VLMConfig):
        super().__init__(config)
        fields = dict(getattr(config, "vision_config", None) or {})
        kind = KINDS.get(fields.pop("model_type", ""))
        if kind is None:
            raise ValueError("config.json describes no vision tower in vision_config")
        self.vision_encoder = kind.model_class(kind.config_class(**fields), **kind.options)
        self.vision_encoder.requires_grad_(False)
        self.post_init()
