"""Students, the teacher, and the layers that they share."""
