"""What of a mask schedule is saved in its optimizer's state, and how it is checked and restored."""

from torch import Tensor

from speft_optim.salience import turn_state
from speft_optim.salience.streaming import TrainingSalience
from speft_optim.schedule.history import check_tensors, from_tensors, to_tensors
from speft_optim.weights.sparse_weight import SparseWeight


class SavedSchedule:
    """A schedule whose step counter, latest events and present turn are saved in its optimizer's state.

    Attributes:
        steps: how many optimizer steps were counted.
        history: one event for each selection or probe.
        training: the salience of training's own gradients; None where calibration batches give it.
    """

    steps: int
    history: list[dict]
    training: TrainingSalience | None
    _skipped: int

    def state_dict(self) -> dict[str, Tensor]:
        """Return the counter and the latest events; the masks themselves are in the optimizer's state.

        See `history.to_tensors`.
        """
        return to_tensors(self.steps, self.history)

    def check_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Refuse a state that `state_dict` cannot have returned.

        Raises:
            ValueError: a tensor has another dtype, shape or content.
        """
        check_tensors(state_dict)

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned; the optimizer's `load_state_dict` calls this."""
        self.steps, self.history = from_tensors(state_dict)

    def state_of(self, weight: SparseWeight) -> dict[str, Tensor]:
        """Return the state that is saved with a weight: nothing with batches, else see `salience/turn_state.py`."""
        return {} if self.training is None else turn_state.state_of(self.training, weight)

    def check_state_of(self, weight: SparseWeight, saved: dict[str, Tensor]) -> None:
        """Refuse a state that `state_of` cannot have returned.

        Raises:
            ValueError: a tensor has another dtype, shape or content, or the saved run selected in another way.
        """
        if self.training is not None:
            turn_state.check_state_of(self.training, weight, len(saved["values"]), saved)
        elif "schedule_turn" in saved:
            raise ValueError("The saved run's MaskSchedule had no batches; build this one without them too.")

    def load_state_of(self, weight: SparseWeight, saved: dict[str, Tensor]) -> None:
        """Restore what `state_of` returned."""
        if self.training is not None:
            turn_state.load_state_of(self.training, weight, saved)
            self._skipped = int(saved["skipped_steps"])
