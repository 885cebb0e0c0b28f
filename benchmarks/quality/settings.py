"""What a run is made of: the budget that every row shares, and what tells one row from another."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Budget:
    """What each row of a table gets, and what it is measured on; tables of different budgets must not be mixed.

    Attributes:
        dense_steps: optimizer steps of the dense network that every method starts from.
        steps: further steps, the same number for every method, dense included.
        batch: crops per step.
        patch: side of a crop of the low-resolution image, in pixels.
        dense_lr: learning rate of the dense training at its start, on a cosine to 0.
        precision: what training computes in, "float32" or "bfloat16" (autocast); weights and tests are always float32.
        device: "cpu" or "cuda": a network that was trained on the other is another network.
        data: fingerprint of the images (`data.fingerprint`).
    """

    dense_steps: int = 2500
    steps: int = 1500
    batch: int = 8
    patch: int = 40
    dense_lr: float = 1e-3
    precision: str = "float32"
    device: str = "cpu"
    data: str = ""


BUDGET_FIELDS = tuple(field.name for field in fields(Budget))


@dataclass(frozen=True)
class Case:
    """One training, and so one row.

    Attributes:
        network: a name of `networks.NETWORKS`.
        method: a name of `methods.METHODS`, with options of its own after a colon: "gmp:interval=5".
        sparsity: the target, in [0, 1); 0 for the dense network.
        seed: of the initial weights and of the order of the batches.
        lr: learning rate at the start of the sparse phase, on a cosine to 0.
        ramp: share of the sparse phase in which the sparsity rises; 0 for methods without a ramp.
    """

    network: str
    method: str
    sparsity: float
    seed: int
    lr: float
    ramp: float

    def __str__(self) -> str:
        ramp = f" ramp {self.ramp:g}" if self.ramp else ""
        sparsity = f" {self.sparsity:g}" if self.sparsity else ""
        return f"{self.network} {self.method}{sparsity} seed {self.seed} lr {self.lr:g}{ramp}"


CASE_FIELDS = tuple(field.name for field in fields(Case))
