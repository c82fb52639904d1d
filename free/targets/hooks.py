"""What others have put around a model's modules: caches, offloading, compilations, code of their own."""

from __future__ import annotations

from typing import Any

import torch


def stateful_hook(module: torch.nn.Module) -> str | None:
    """Name of a diffusers hook that keeps state between calls, as every cache does; None if there is none."""
    if getattr(module, "is_cache_enabled", False):
        return "enable_cache"
    for child in module.modules():
        for name, hook in _diffusers_hooks(child).items():
            if getattr(hook, "_is_stateful", False):
                return str(name)
    return None


def execution_device(module: torch.nn.Module) -> torch.device | None:
    """Where accelerate's hooks bring an offloaded model's inputs and weights; None if there are none."""
    for child in module.modules():
        hook = getattr(child, "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return None


def is_as_written(model: torch.nn.Module) -> bool:
    """Whether diffusers' own code runs and no other: neither a subclass's, nor a compilation's, nor a hook's."""
    return type(model).__module__.startswith("diffusers.") and not any(
        module._compiled_call_impl is not None
        or "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        for module in model.modules()
    )


def leaves_the_host_out(model: torch.nn.Module) -> bool:
    """Whether nothing around the model does what a CUDA graph cannot hold: bring weights from the host or cast them, as
    accelerate's and diffusers' hooks may, or replay graphs of its own, as a compilation may.
    """
    context = getattr(model, "dynamo_ctx", None)
    if context is not None and _replays_graphs(getattr(context, "compiler_config", None)):
        return False
    for module in model.modules():
        if getattr(module, "_hf_hook", None) is not None or _diffusers_hooks(module):
            return False
        for function in (module._compiled_call_impl, vars(module).get("forward")):
            said = getattr(function, "get_compiler_config", None)
            if said is not None and _replays_graphs(said()):
                return False
    return True


def _diffusers_hooks(module: torch.nn.Module) -> dict[str, Any]:
    hooks: dict[str, Any] = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return hooks


def _replays_graphs(config: dict[str, Any] | None) -> bool:
    """Whether code that was compiled with ``config`` may; a compiler that says nothing of itself may."""
    return config is None or bool(config.get("triton.cudagraphs", True))
