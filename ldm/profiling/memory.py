"""How much memory predictions and images need, found without computing anything, and how much there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ldm.modules.diffusionmodules.features import Features
from ldm.modules.diffusionmodules.meta import meta_unet, on_meta, once_for_a_config

SHARE = 0.8  # of the free memory that is planned for; an estimate knows nothing of workspaces and fragments
MEMINFO = Path("/proc/meminfo")


class _Peak(TorchDispatchMode):
    """Watches the storages that are made inside; `most` is the most bytes of them alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._alive = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _storages((args, kwargs))
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if not any(storage is other for other in given):  # not a view, nor changed in place
                self._alive[storage] = None
        self.most = max(self.most, sum(storage.nbytes() for storage in self._alive))
        return out


class _FusedAttention(TorchFunctionMode):
    """Without a device, attention is taken apart into products that no device holds in full."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, _, v = args
            return q.new_empty(*q.shape[:-1], v.shape[-1])
        return func(*args, **(kwargs or {}))


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that call() holds at one time in tensors it makes, with fused attention."""
    with torch.no_grad(), _FusedAttention(), _Peak() as peak:
        call()
    return peak.most


def sampling_bytes(
    unet: nn.Module,
    first_stage: nn.Module,
    size: Sequence[int],
    images: int,
    predictions: int,
    context_length: int | None = None,
    tome: float = 0.0,
) -> int:
    """What sampling some images needs at least: for one prediction, or for decoding the latents, whichever is more.

    Args:
        unet, first_stage: are left as they are.
        size: channels, height and width of the latents.
        images: at a time.
        predictions: of one node, twice as many as images with guidance.
        context_length, tome: as for `unet_macs`.
    """
    with torch.device("meta"), torch.no_grad():
        unet, x, inputs = meta_unet(unet, size[1:], predictions, context_length, tome)
        latents, first_stage = torch.zeros(images, *size), on_meta(first_stage)
        predicting = peak_bytes(lambda: unet.decode(unet.encode(x, **inputs), **inputs))
        return max(predicting, peak_bytes(lambda: first_stage.decode(latents)))


@once_for_a_config
def decoder_bytes(
    unet: nn.Module | Mapping[str, Any],
    size: Sequence[int],
    batch: int = 1,
    context_length: int | None = None,
    tome: float = 0.0,
) -> int:
    """What one decoder node of a batch of nodes needs, in the precision of the weights: features and activations.

    Args as for `unet_macs`; a network is left as it is. Autocast to half the precision needs less.
    """
    with torch.device("meta"), torch.no_grad():
        unet, x, inputs = meta_unet(unet, size, 2 * batch, context_length, tome)
        one, other = unet.encode(x, **inputs).chunk(2)
        # Features in common are computed once for all nodes: of two nodes, each has half of that.
        calls = (
            lambda: unet.decode(Features.cat([one, other]), **inputs),
            lambda: unet.decode(unet.share(one), **inputs),
        )
        return max(map(peak_bytes, calls)) // 2


def shared_bytes(unet: nn.Module) -> int:
    """What a run needs for all its decoder nodes together: the copies of weights that they share."""
    with torch.device("meta"):
        return peak_bytes(on_meta(unet).part_weights)


def free_bytes(device: torch.device) -> int | None:
    """What new tensors may take; None = not known here."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if not MEMINFO.exists():
        return None
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="ascii").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def decoders_that_fit(free: int | None, each: int, shared: int) -> int | None:
    """How many decoder nodes of `each` bytes, and `shared` for all, go into one batch; None = not known."""
    return None if free is None else max(0, int(SHARE * free) - shared) // each
