import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from kd_ranker.distillation.modes import MODES

TASKS = 2
LOGITS = np.random.default_rng(0).normal(size=(3, 4, 2 * TASKS)).astype(np.float32)


def test_aux_keeps_two_estimates_apart():
    mode = MODES["aux"]
    np.testing.assert_array_equal(mode.user_logits(LOGITS, {}), LOGITS[..., :TASKS])
    np.testing.assert_array_equal(mode.teacher_logits(LOGITS, {}), LOGITS[..., TASKS:])
    user, teacher = expit(LOGITS[..., :TASKS]), expit(LOGITS[..., TASKS:])
    np.testing.assert_allclose(mode.serve["user"](LOGITS), user, rtol=1e-5)
    np.testing.assert_allclose(mode.serve["teacher"](LOGITS), teacher, rtol=1e-5)
    np.testing.assert_allclose(mode.serve["blend"](LOGITS), (user + teacher) / 2, rtol=1e-5)


def test_shared_transforms_what_the_teacher_sees_and_nothing_else():
    mode, logits = MODES["shared"], LOGITS[..., :TASKS]
    start = mode.init_transform(TASKS, True)
    np.testing.assert_array_equal(mode.teacher_logits(logits, start), logits)
    learned = {"scale": jnp.array([2.0, 0.5]), "offset": jnp.array([-1.0, 3.0])}
    np.testing.assert_allclose(
        mode.teacher_logits(logits, learned), logits * [2.0, 0.5] + [-1.0, 3.0], rtol=1e-5
    )
    np.testing.assert_array_equal(mode.user_logits(logits, learned), logits)
    np.testing.assert_allclose(mode.serve["user"](logits), expit(logits), rtol=1e-5)


def test_shared_without_affine_is_strictly_one_estimate():
    mode, logits = MODES["shared"], LOGITS[..., :TASKS]
    transform = mode.init_transform(TASKS, False)
    assert transform == {}
    assert mode.teacher_logits(logits, transform) is logits
