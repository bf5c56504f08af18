"""What a check finds."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check: `passed` is None when it was left out, and `says` why."""

    part: str
    name: str
    passed: bool | None
    says: str
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)


def on_gpu() -> bool:
    import mlx.core as mx

    return mx.default_device().type == mx.DeviceType.gpu
