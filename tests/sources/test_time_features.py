import datetime

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kd_ranker.sources.time_features import hour_features, weekday, weekday_features

seconds = st.integers(0, 2**33)


@given(seconds)
def test_a_moment_has_the_weekday_and_the_hour_of_the_calendar(time):
    moment = datetime.datetime.fromtimestamp(time, datetime.UTC)
    assert weekday(time) == moment.weekday()
    assert weekday_features(time).tolist() == [float(day == moment.weekday()) for day in range(7)]
    hour = moment.hour + moment.minute / 60 + moment.second / 3600
    # A point on the circle, an hour further by 15 degrees.
    sin, cos = hour_features(time)
    np.testing.assert_allclose(np.degrees(np.arctan2(sin, cos)) % 360, 15 * hour, atol=1e-6)


@given(st.lists(seconds, min_size=1))
def test_several_moments_are_taken_at_once(times):
    array = np.array(times)
    np.testing.assert_array_equal(weekday_features(array), [weekday_features(t) for t in times])
    np.testing.assert_allclose(hour_features(array), [hour_features(t) for t in times])
