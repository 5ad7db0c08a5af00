"""Between user labels and the teacher: modes, losses and the signals that they learn from.

modes           the heads of a student, and which of them see which labels
losses          distances between logits and the teacher's probabilities, and losses on user labels
teacher_signal  scores and stages as probabilities and weights
terms           the terms of a distillation loss, as the text of `distill.loss` and as a pytree
"""
