"""Uniform layer drop: the emulator of offsite-tuning before its distillation (Xiao et al. 2023)."""


def kept_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """Evenly spread layers, the first and the last included.

    Args:
        num_layers: M, layers of the middle.
        count: S <= M, layers to keep.

    Returns:
        `round(i (M - 1) / (S - 1))` for i = 0..S-1; the middle one for S = 1, none for S = 0.
    """
    if count <= 1:
        return ((num_layers - 1) // 2,)[:count]
    return tuple(round(i * (num_layers - 1) / (count - 1)) for i in range(count))
