"""Float tensors as a file stores them: one cast, and one refusal of what it cannot keep, for every writer."""

from __future__ import annotations

import torch

from ..errors import PhiquantError


def cast(
    name: str, values: torch.Tensor, dtype: torch.dtype, first_row: int, too_large: str
) -> tuple[torch.Tensor, bool]:
    """Some rows of the tensor `name` in `dtype`, and whether no value changed.

    PhiquantError for a value that is not finite, or not in `dtype`: `too_large` says what to do then. `first_row` is
    where the rows begin, for the index it names.
    """
    values = values.detach()
    stored = values.to(dtype)
    # A sum is finite only if every value is: one read, and the search only when there is something to find.
    if not bool(torch.isfinite(stored.sum(dtype=torch.float32))):
        for index in (~torch.isfinite(stored)).nonzero()[:1].tolist():
            value = values[tuple(index)]
            hint = too_large if bool(torch.isfinite(value)) else "repair the checkpoint"
            place = [index[0] + first_row, *index[1:]]
            raise PhiquantError(f"{name}: the value at {place} is {value.item()}: {hint}")
    widened = torch.promote_types(values.dtype, dtype) == dtype
    return stored, widened or torch.equal(stored.to(values.dtype), values)
