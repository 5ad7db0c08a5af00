"""Features of a moment that the datasets share; times are seconds since 1970."""

import numpy as np
from jaxtyping import Float64, Int

DAY = 24 * 3600  # seconds


def hour_features(time: int | Int[np.ndarray, "*n"]) -> Float64[np.ndarray, "*n 2"]:
    """[sin, cos] of the hour, which goes once around a circle in a day.

    >>> hour_features(6 * 3600).round(9) + 0.0
    array([1., 0.])
    """
    angle = 2 * np.pi * (time % DAY) / DAY
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1)


def weekday(time: int | Int[np.ndarray, "*n"]) -> Int[np.ndarray, "*n"]:
    """Day of the week, from 0, Monday, to 6.

    >>> int(weekday(1_704_067_200))  # 1 January 2024
    0
    """
    # 1 January 1970 was a Thursday.
    return np.asarray(time // DAY + 3) % 7


def weekday_features(time: int | Int[np.ndarray, "*n"]) -> Float64[np.ndarray, "*n 7"]:
    """Day of the week, one-hot from Monday."""
    return np.eye(7)[weekday(time)]


def moment_features(
    time: int | Int[np.ndarray, "*n"], pause: float | Float64[np.ndarray, "*n"]
) -> Float64[np.ndarray, "*n 11"]:
    """[sin and cos of the hour; weekday, one-hot from Monday; `pause`; 1 if that is unknown].

    Args:
      time: of the moment.
      pause: a feature of the time since the last event; NaN where there is none, which becomes 0.
    """
    last = np.stack([np.nan_to_num(pause), np.isnan(pause)], axis=-1)
    return np.concatenate([hour_features(time), weekday_features(time), last], axis=-1)
