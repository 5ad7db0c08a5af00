"""The training of a cohort: the step, its devices, the loop, and the files of a run.

specs         from configs to stacks: what is static, hyperparameters, first states (`state`)
step          the step that one device runs; `program`: the step of a cohort, with its batches
mapping       devices, and the same step on one or many; `processes`: several processes as one
loop          calls of steps, then metrics, evaluations and checkpoints
active_runs   the runs that still train, without those that halving stopped
speed         how fast a run trains and where its time goes; `profile`: a trace of a few steps
divergence    runs with a loss that stopped being finite; `kept_steps`: the steps where they did
non_finite    what a run computes in such a step, and what of it is first not finite
optimizers    optimizers of the dense parameters, and schedules
workdir       the files of a run; `checkpoints`, `interruption`: resuming after a signal
"""
