import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from kd_ranker.distillation.modes import MODES

TASKS = 2
LOGITS = np.random.default_rng(0).normal(size=(3, 4, 2 * TASKS)).astype(np.float32)


def test_aux_keeps_two_estimates_apart():
    mode, user, teacher = MODES["aux"], LOGITS[..., :TASKS], LOGITS[..., TASKS:]
    np.testing.assert_array_equal(mode.user_logits(LOGITS, {}), user)
    np.testing.assert_array_equal(mode.teacher_logits(LOGITS, {}), teacher)
    served = {name: serve(LOGITS) for name, serve in mode.serve.items()}
    expected = {"user": expit(user), "teacher": expit(teacher)}
    expected["blend"] = (expected["user"] + expected["teacher"]) / 2
    assert served.keys() == expected.keys()
    for name, probability in expected.items():
        np.testing.assert_allclose(served[name], probability, rtol=1e-5)


def test_shared_transforms_only_what_the_teacher_sees():
    mode, logits = MODES["shared"], LOGITS[..., :TASKS]
    learned = {"scale": jnp.array([2.0, 0.5]), "offset": jnp.array([-1.0, 3.0])}
    np.testing.assert_allclose(
        mode.teacher_logits(logits, learned), logits * [2.0, 0.5] + [-1.0, 3.0], rtol=1e-5
    )
    np.testing.assert_array_equal(mode.user_logits(logits, learned), logits)
    np.testing.assert_allclose(mode.serve["user"](logits), expit(logits), rtol=1e-5)
    # At the start, and always without the affine transform, there is one estimate.
    start = mode.init_transform(TASKS, True)
    np.testing.assert_array_equal(mode.teacher_logits(logits, start), logits)
    assert mode.init_transform(TASKS, False) == {}
    assert mode.teacher_logits(logits, {}) is logits
