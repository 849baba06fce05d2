"""When training is fast and when it is slow: learning rate and sparsity over the steps."""

from __future__ import annotations

WARM_UP, DECAY, PRESSURE = 0.05, 0.2, 0.3


class Schedule:
    """Linear warm-up over the first 5 % of the steps, constant rate, linear decay over the last 20 %.

    `end_early` lets the decay begin at once.
    """

    def __init__(self, steps: int, *, constant: bool = False):
        self.steps, self.constant = steps, constant
        self.decay = max(1, round(DECAY * steps))

    def factor(self, step: int) -> float:
        """Return the share of the peak learning rate for `step`, counted from 0."""
        if self.constant:
            return 1.0
        warm_up = max(1, round(WARM_UP * self.steps))
        return min(1.0, (step + 1) / warm_up, (self.steps - step) / self.decay)

    def pressure(self, step: int) -> float:
        """Return the share of the sparsity that is asked for: it grows linearly over the first 30 % of the steps."""
        return 1.0 if self.constant else min(1.0, (step + 1) / max(1, round(PRESSURE * self.steps)))

    def end_early(self, step: int) -> None:
        """Let the decay begin after `step`, for as long as it would have taken in a run planned that way."""
        if step + 1 < self.steps - self.decay:
            self.decay = 1 if self.constant else max(1, round((step + 1) * DECAY / (1 - DECAY)))
            self.steps = step + 1 + self.decay
