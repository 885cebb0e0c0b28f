"""The two hooks of a sparse training: before all others that touch weights, and after them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmengine.hooks import Hook

if TYPE_CHECKING:
    from .training import SparseTraining


class FirstHook(Hook):  # type: ignore[misc]  # MMEngine has no types
    """Comes before EMA hooks: gives gates back before they swap weights, completes what is loaded before they read it.

    And before the logger, which is to find the sparsity.
    """

    priority = "VERY_HIGH"

    def __init__(self, training: SparseTraining) -> None:
        self._training = training

    def before_train(self, runner: Any) -> None:
        self._training.begin()

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        self._training.load(checkpoint)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self._training.begin_iteration()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        self._training.log_iteration(batch_idx)

    def after_train(self, runner: Any) -> None:
        self._training.end()

    def before_val_epoch(self, runner: Any) -> None:
        self._training.note_sparsity()

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self._training.close_validation("val")

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self._training.close_validation("test")


class LastHook(Hook):  # type: ignore[misc]
    """Comes after EMA hooks: what they have put in place is validated, and saved, without gates."""

    priority = "LOWEST"

    def __init__(self, training: SparseTraining) -> None:
        self._training = training

    def before_val_epoch(self, runner: Any) -> None:
        self._training.open_validation()

    def before_test_epoch(self, runner: Any) -> None:
        self._training.open_validation()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        self._training.save(checkpoint)
