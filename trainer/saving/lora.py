"""Owns LoRA: low-rank adapters on the language model's matrices, merged into the saved weight and
kept beside it in the format of the library `peft`.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022).
"""

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from model.machine.atomic_file import atomic_write

MATRICES = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
ALPHA_PER_RANK = 2  # the usual strength: adapters are scaled by alpha / rank
PROJECTION = "vision_proj."
BASE = ".base_layer.weight"  # peft's name of an adapted matrix
FACTORS = (".lora_A.default.weight", ".lora_B.default.weight")


@dataclass(frozen=True)
class Lora:
    """Adapters of a rank on matrices of some names.

    Args:
        rank: 1 or more; each matrix W becomes W + alpha / rank * B A.
        targets: names out of `MATRICES`.
    Raises:
        ValueError: a name that is none.
    """

    rank: int
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in self.targets:
            if name not in MATRICES:
                raise ValueError(
                    f"--lora_targets {name!r} is no matrix of a layer; take some of "
                    f"{','.join(MATRICES)}"
                )

    @property
    def alpha(self) -> int:
        return ALPHA_PER_RANK * self.rank

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def attach(self, model: nn.Module) -> None:
        """Put new adapters into a model's decoder layers. They change nothing yet: B is 0.

        Raises:
            ValueError: `peft` is not installed; or no layer has these matrices: experts, which are
                multiplied in stacks, take no adapters.
        """
        try:
            from peft import inject_adapter_in_model
        except ImportError:
            raise ValueError(
                "--lora_rank needs the library peft: pip install 'peft>=0.21,<1'"
            ) from None
        pattern = re.compile(self._pattern)
        found = [name for name, _ in model.named_modules() if pattern.fullmatch(name)]
        if not found:
            raise ValueError(
                f"--lora_targets {','.join(self.targets)}: no layer of this model has these apart "
                "from experts, which take no adapters; take q_proj,k_proj,v_proj,o_proj"
            )
        inject_adapter_in_model(self._config(), model)

    @property
    def _pattern(self) -> str:
        names = "|".join(self.targets)
        return rf"model\.layers\.\d+\.(self_attn|mlp|mlp\.shared_experts\.\d+)\.({names})"

    def _config(self) -> Any:
        from peft import LoraConfig

        return LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=self._pattern)

    def merge(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict with the adapters added to their matrices, under the usual names."""
        merged = {}
        for name, tensor in state.items():
            stem = name.removesuffix(BASE)
            if stem != name:
                down, up = (state[stem + factor].float() for factor in FACTORS)
                merged[f"{stem}.weight"] = tensor.float() + self.scaling * (up @ down)
            elif not name.endswith(FACTORS):
                merged[name] = tensor
        return merged

    def save(self, state: dict[str, Tensor], folder: Path) -> None:
        """Write the adapters of a state dict, and the projection, which trains with them, as `peft`
        reads them: `PeftModel.from_pretrained`."""
        from safetensors.torch import save

        factors = {
            f"base_model.model.{name.replace('.default', '')}": tensor.cpu().contiguous()
            for name, tensor in state.items()
            if name.endswith(FACTORS) or name.startswith(PROJECTION)
        }
        has_projection = any(name.startswith(PROJECTION) for name in state)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (
            ("adapter_model.safetensors", save(factors)),
            ("adapter_config.json", self._config_text(has_projection).encode()),
        ):
            atomic_write(folder / name, partial(_write, content))

    def _config_text(self, has_projection: bool) -> str:
        fields = self._config().to_dict()
        own = {
            "inference_mode": True,
            "modules_to_save": [PROJECTION.rstrip(".")] if has_projection else None,
        }
        kept = {k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}
        return json.dumps(kept | own, indent=1, default=str)


def _write(content: bytes, file: Any) -> None:
    file.write(content)
