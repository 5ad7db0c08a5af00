"""The metrics, a file for each family; a metric is one object with all that is known about it.

metric      the type, and the final numbers that many metrics share
users       against the labels of users
teacher     against the final ranker's probabilities and order
funnel      what a funnel keeps of value, by candidates passed
top         a ranker's own top, by the truth
data        the requests on which all is measured
costs       compute, and savings
calibration the bins of probabilities in `calibration.csv`
registry    all of them: the columns of the tables, and their numbers
"""
