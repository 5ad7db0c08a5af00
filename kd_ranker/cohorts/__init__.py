"""Cohorts: the runs of a sweep that one program trains.

memory    how many runs fit the memory of the devices
plan      which run is in which cohort, and where each is stored
"""
