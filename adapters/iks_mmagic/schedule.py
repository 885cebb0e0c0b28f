"""What a config says of a training: how many steps the optimizer of a network makes, and from which weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from iks_plugin import OptionError


def iterations_of(runner: Any) -> int | None:
    """How many iterations the training has; None if its epochs are counted and their length is yet to be seen.

    An epoch is as long as the training data, which are not there where a checkpoint is only tested.

    Args:
        runner: MMEngine's runner.

    Raises:
        OptionError: the config does not say.
    """
    loop = runner._train_loop
    if not isinstance(loop, dict):
        return int(loop.max_iters)
    if loop.get("max_iters"):
        return int(loop["max_iters"])
    if loop.get("max_epochs"):
        data = runner._train_dataloader
        return None if isinstance(data, dict) else int(loop["max_epochs"]) * len(data)
    raise OptionError("config key train_cfg: expected max_iters or max_epochs, from which iks takes its schedule")


def optimizer_steps(runner: Any, model: nn.Module, network: str, iterations: int) -> int:
    """Steps of the optimizer of `network`, with gradient accumulation and MMagic's pauses of the generator.

    Args:
        runner: MMEngine's runner, before its optimizers are built.
        model: the model that it has built.
        network: the network's name in the model.
        iterations: how many the training has.

    Raises:
        OptionError: the network is never trained.
    """
    if not network.startswith("discriminator") and hasattr(model, "if_run_g"):  # SRGAN and its subclasses
        every, idle = int(model.disc_steps), int(model.disc_init_steps)  # type: ignore[arg-type]
        iterations = -(-iterations // every) + (-min(idle, iterations) // every)
        if iterations < 1:
            raise OptionError(
                f"config key iks: {network} is never trained: model.train_cfg lets the discriminator train alone for "
                f"{idle} iterations (disc_init_steps) and in all but every {every}. one (disc_steps)"
            )
    return -(-iterations // _accumulated(runner.optim_wrapper, network))


def _accumulated(optim_wrapper: Any, network: str) -> int:
    """Iterations whose gradients go into one step."""
    if isinstance(optim_wrapper, dict) and "optimizer" not in optim_wrapper:
        optim_wrapper = optim_wrapper.get(network, {})
    if isinstance(optim_wrapper, dict):
        return int(optim_wrapper.get("accumulative_counts", 1))
    return int(getattr(optim_wrapper, "_accumulative_counts", 1))


def is_from_scratch(runner: Any, model: nn.Module, network: nn.Module) -> bool:
    """Whether the config names no checkpoint that the `network` of `model` gets its first weights from."""
    given = [getattr(module, "init_cfg", None) for module in (model, network)]
    initialisers = [each for one in given for each in (one if isinstance(one, list) else [one])]
    pretrained = any(isinstance(each, dict) and "Pretrained" in str(each.get("type")) for each in initialisers)
    return runner._load_from is None and not pretrained
