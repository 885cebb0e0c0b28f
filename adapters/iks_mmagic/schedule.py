"""How many steps the optimizer of a network makes in the whole training that a config describes."""

from __future__ import annotations

from typing import Any

from torch import nn

from iks_plugin import OptionError


def optimizer_steps(runner: Any, model: nn.Module, network: str) -> int:
    """Steps of the optimizer of `network`, with gradient accumulation and MMagic's pauses of the generator.

    Args:
        runner: MMEngine's runner, before its train loop is built.
        model: the model that it has just built.
        network: the network's name in the model.

    Raises:
        OptionError: the config does not say how long the training is, or the network is never trained.
    """
    iterations = _iterations(runner)
    if not network.startswith("discriminator") and hasattr(model, "if_run_g"):  # SRGAN and its subclasses
        every, idle = int(model.disc_steps), int(model.disc_init_steps)  # type: ignore[arg-type]
        iterations = -(-iterations // every) + (-min(idle, iterations) // every)
        if iterations < 1:
            raise OptionError(
                f"config key iks: {network} is never trained: model.train_cfg lets the discriminator train alone for "
                f"{idle} iterations (disc_init_steps) and in all but every {every}. one (disc_steps)"
            )
    return -(-iterations // _accumulated(runner.optim_wrapper, network))


def _iterations(runner: Any) -> int:
    loop = runner._train_loop
    if not isinstance(loop, dict):
        return int(loop.max_iters)
    if loop.get("max_iters"):
        return int(loop["max_iters"])
    if loop.get("max_epochs"):
        if isinstance(runner._train_dataloader, dict):  # as the train loop would build it
            runner._train_dataloader = runner.build_dataloader(
                runner._train_dataloader,
                seed=runner.seed,
                diff_rank_seed=runner._randomness_cfg.get("diff_rank_seed", False),
            )
        return int(loop["max_epochs"]) * len(runner._train_dataloader)
    raise OptionError("config key train_cfg: expected max_iters or max_epochs, from which iks takes its schedule")


def _accumulated(optim_wrapper: Any, network: str) -> int:
    """Iterations whose gradients go into one step."""
    if isinstance(optim_wrapper, dict) and "optimizer" not in optim_wrapper:
        optim_wrapper = optim_wrapper.get(network, {})
    if isinstance(optim_wrapper, dict):
        return int(optim_wrapper.get("accumulative_counts", 1))
    return int(getattr(optim_wrapper, "_accumulative_counts", 1))
