"""The trained network on many ranks: compiled, settled, copied with averaged statistics."""

from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_adv.data import Dataset
from dist_adv.distributed.collectives import mean_statistics
from dist_adv.distributed.ddp import TrainNet
from dist_adv.errors import UserError
from dist_adv.text import few


def synchronised(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """BatchNorm with the statistics of the global batch, where there are several ranks.

    Raises UserError off GPUs, where torch has no such layer.
    """
    if accelerator.num_processes == 1:
        return model
    if accelerator.device.type == "cpu":
        raise UserError(
            "train.sync_batchnorm: torch's SyncBatchNorm needs GPUs; on CPUs use model.norm=group"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


_MODES = {"default": None, "graphs": "reduce-overhead", "max": "max-autotune"}


def compile_network(
    model: nn.Module, choice: Literal["none", "default", "graphs", "max"], keep_graph: bool
) -> None:
    """Let torch.compile fuse the layers, in place: parameters keep their names.

    Every shape has code of its own, because code for any shape is slower: the short last batch is
    compiled too, and recorded (`graphs`) into the memory that the other recordings have. Run as
    it is, it would take as much again outside of that, at the end of the first epoch. Frozen and
    trained forwards are two graphs; the frozen one's backward computes no weight gradients. DDP
    waits for the whole backward, so that its all-reduce no longer overlaps with it: the price of
    one graph.

    keep_graph: a method differentiates a forward twice. The memory of its activations is not
    reused by the first backward then, which computes weight gradients, too, and drops them.
    """
    if choice != "none":
        # On, it cuts the graph where DDP's buckets end (PreActResNet18: three graphs), compiles
        # each, and lets their all-reduces overlap with the rest.
        torch._dynamo.config.optimize_ddp = False
        torch._functorch.config.donated_buffer = not keep_graph
        # Off, torch 2.11 looks whether parameters want gradients before it takes the code of an
        # earlier call. On, a training pass whose images want gradients (SORA's) was taken for the
        # attack before it, and gave the weights none, without a word.
        torch._dynamo.config.skip_tensor_guards_with_matching_dict_tags = False
        model.compile(dynamic=False, mode=_MODES[choice])


def settle(accelerator: Accelerator, net: TrainNet, data: Dataset) -> None:
    """Let DDP arrange its gradients for good, by a forward and backward that change nothing.

    DDP regroups its buckets after the first backward pass, and with three ranks or more the
    order of summation depends on them: a resumed run would take its first step in another order
    than the uninterrupted run and differ from it in the last bits.

    Raises UserError for weights that no output depends on: DDP would wait for their gradients.
    """
    if not isinstance(net.prepared, DistributedDataParallel):
        return
    before = {name: buffer.clone() for name, buffer in net.bare.named_buffers()}
    blank = torch.zeros(2, *data.images.shape[1:], device=accelerator.device)
    with torch.compiler.set_stance("force_eager"):  # two images are not worth compiling for
        for _ in range(2):  # the second forward is when it happens
            net(blank.to(memory_format=torch.channels_last)).sum().backward()
            idle = [
                name
                for name, parameter in net.bare.named_parameters()
                if parameter.requires_grad and parameter.grad is None
            ]
            if idle:
                raise UserError(
                    f"model.name: on several ranks every weight needs a gradient, and nothing that "
                    f"the network answers depends on {few(idle)}; leave them out, or set "
                    f"requires_grad=False on them"
                )
    for parameter in net.bare.parameters():
        parameter.grad = None
    for name, buffer in net.bare.named_buffers():
        buffer.copy_(before[name])


@torch.no_grad()
def snapshot(accelerator: Accelerator, net: TrainNet, into: nn.Module) -> None:
    """Copy the weights into a plain fp32 model, BatchNorm's running statistics averaged.

    The model in training is left alone, so that evaluating or saving at any moment does not
    change what comes after it; and what is evaluated is what is saved.
    """
    into.load_state_dict(mean_statistics(accelerator, net.state_dict()))
