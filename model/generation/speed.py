"""Owns the speed of answers: what is measured, and the line that tells it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """Tokens generated together, and the time from the prompt to the last of them."""

    num_tokens: int
    seconds: float

    def __str__(self) -> str:
        per_second = self.num_tokens / max(self.seconds, 1e-9)
        return (
            f"speed: {self.num_tokens} tokens in {self.seconds:.2f} s, {per_second:.1f} tokens/s "
            "/ 生成速度"
        )
