"""Students, the teacher, and the layers that they share.

model     a model as the step uses it, static part and parameters; how a class becomes one
student   multi_interest and two_tower, cheap per candidate
teacher   final_ranker, with attention to the history for each candidate
layers    lookups of embedding rows, and the layers of both
"""
