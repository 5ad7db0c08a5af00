"""The report of one or more sweeps: `report.html`, its tables and figures, and the answer.

study         the files of sweeps, joined to one study per dataset, and what it describes
estimates     measures on test with intervals over requests and repeats; `intervals`: the formulas
claims        claims about distilling, each with its verdict
answer        what the final ranker's scores save, in at most four sentences, and notes
tables        the tables for people; `summary`: the one for a terminal; `figures`: the charts
              `training_curves`: how the chosen students trained, for the last two charts
timeout       what is left if the final ranker times out: a sentence and a table
write         all of it in a folder
"""
