"""How a student meets user labels and the teacher's probabilities."""
