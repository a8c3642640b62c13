"""torch's FSDP2 and DTensor, which it has had under these names since 2.6."""

from typing import Any

try:
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:  # an older torch, or one without torch.distributed: then nothing is an instance of these
    FSDPModule = type("FSDPModule", (), {})  # type: ignore[assignment,misc]
    DTensor = type("DTensor", (), {})  # type: ignore[assignment,misc]
    fully_shard: Any = None  # type: ignore[no-redef]
    distribute_tensor: Any = None  # type: ignore[no-redef]

__all__ = ["DTensor", "FSDPModule", "distribute_tensor", "fully_shard"]
